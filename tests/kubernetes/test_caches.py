"""Models that are kept ahead: fetched by pods' fetchers, told by node, retried, and then silent."""

from __future__ import annotations

import asyncio

import pytest
from deepflow.v1 import worker_pb2
from redis.asyncio import Redis

from controlplane.fleet.demand import DemandWriter
from controlplane.kube.resources import MODEL_CACHES, PODS, WARM_POOLS, Json, ResourceType
from controlplane.operator import caches
from tests.support.kube_world import World


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(caches, "IDLE_SECONDS", 0.2)
    monkeypatch.setattr(caches, "FAILED_SECONDS", 0.2)
    monkeypatch.setattr(caches, "HOPELESS_SECONDS", 0.2)


async def cache(world: World, *uris: str, pools: tuple[str, ...] = ()) -> None:
    body = {
        "apiVersion": MODEL_CACHES.api_version, "kind": "ModelCache",
        "metadata": {"namespace": world.namespace, "name": "c"},
        "spec": {"models": [{"uri": uri} for uri in uris], "pools": list(pools)},
    }  # fmt: skip
    await world.api.create(MODEL_CACHES, body, manager="test")


async def bind(world: World, pod: str, node: str) -> None:
    """What a scheduler does; the emulator knows no bindings."""
    if world.server is not None:
        await world.api.patch(PODS, world.namespace, pod, {"spec": {"nodeName": node}}, manager="test")
        return
    body = {
        "apiVersion": "v1", "kind": "Binding",
        "metadata": {"namespace": world.namespace, "name": pod}, "target": {"kind": "Node", "name": node},
    }  # fmt: skip
    await world.api.create(ResourceType("", "v1", "Binding", f"pods/{pod}/binding"), body, manager="test")


async def status(world: World) -> Json:
    found: Json = (await world.api.get(MODEL_CACHES, world.namespace, "c")).get("status") or {}
    return found


async def until_reason(world: World, reason: str) -> Json:
    async def there() -> bool:
        return [c["reason"] for c in (await status(world)).get("conditions", [])] == [reason]

    await world.until(there, why=reason)
    return await status(world)


async def test_models_are_fetched_ahead_and_told_by_node(world: World) -> None:
    uri = f"file://{world.model}"
    async with world.operator():
        await cache(world, uri)
        await until_reason(world, "NoPods")
        await world.pool(size=3)
        await world.until_warm(3)
        for number, pod in enumerate(await world.pods()):
            await bind(world, pod["metadata"]["name"], f"node-{number % 2}")

        async def there() -> bool:  # until a pod is bound it counts under the node "unknown"
            nodes = (await status(world)).get("nodes", [])
            return [(node["name"], node["pods"]) for node in nodes] == [("node-0", 2), ("node-1", 1)]

        await world.until(there, why="each node has its pods")
        said = await until_reason(world, "Cached")
        assert said["readyNodes"] == 2
        size = world.model.stat().st_size
        assert said["nodes"][0]["models"] == [
            {"uri": uri, "state": "Ready", "bytesDone": size, "bytesTotal": size, "message": ""}
        ]
        assert said["wantedNodes"] == 2
        assert said["observedGeneration"] == 1
        before = await world.api.get(MODEL_CACHES, world.namespace, "c")
        await asyncio.sleep(1.0)  # many looks
        after = await world.api.get(MODEL_CACHES, world.namespace, "c")
        assert after["metadata"]["resourceVersion"] == before["metadata"]["resourceVersion"]


async def test_what_fails_is_told_and_asked_for_again(world: World) -> None:
    missing = world.folder / "later.gguf"
    async with world.operator():
        await world.pool(size=1)
        await world.until_warm(1)
        await cache(world, f"file://{missing}", f"file://{world.model}")
        await until_reason(world, "FetchFailed")

        async def told() -> bool:
            models = (await status(world))["nodes"][0]["models"]
            return {m["uri"]: (m["state"], "later.gguf" in m["message"]) for m in models} == {
                f"file://{missing}": ("Failed", True), f"file://{world.model}": ("Ready", False),
            }  # fmt: skip

        await world.until(told, why="each model has its own state")
        missing.write_bytes(b"now it is there")
        await until_reason(world, "Cached")


async def test_other_pools_are_not_asked_and_a_pool_s_own_models_are(world: World) -> None:
    own = world.folder / "own.gguf"
    own.write_bytes(b"of the pool")
    async with world.operator() as operator:
        await world.pool("cpu", size=1)
        await world.pool("other", size=1, models=[f"file://{own}"])
        await world.until_warm(2)
        await cache(world, f"file://{world.model}", pools=("cpu",))
        assert (await until_reason(world, "Cached"))["nodes"][0]["pods"] == 1

        async def both() -> bool:
            kept = operator.caches._kept
            return {uri for _, uri in kept} == {f"file://{own}", f"file://{world.model}"} and len(kept) == 2

        await world.until(both, why="each pool has its own")
        await world.api.delete(MODEL_CACHES, world.namespace, "c")
        change = {"spec": {"models": None}}
        await world.api.patch(WARM_POOLS, world.namespace, "other", change, manager="test")

        async def nothing() -> bool:
            return not operator.caches._kept

        await world.until(nothing, why="what nobody wants is forgotten")


async def test_warm_pods_hold_the_weights_of_what_is_likely_next_and_are_claimed_for_it(
    world: World, clean_valkey: str
) -> None:
    redis = Redis.from_url(clean_valkey)
    gateway = DemandWriter(redis, "g-1")
    zero = {"colocated": {"min": 0, "max": 1}}
    other = world.folder / "other.gguf"
    other.write_bytes(b"another model: nothing here reads it")
    async with world.operator(redis):
        await world.pool(size=3, weights={"sizeLimit": "1Gi"})
        await world.until_warm(3)
        await world.serving(roles=zero)
        await world.serving("other", roles=zero, model={"uri": f"file://{other}"})
        await asyncio.sleep(0.5)
        assert not any(pod.te.preloads for pod in world.kubelet.pods.values())  # nothing speaks for either
        for name in ("m", "other"):
            gateway.record_demand(f"{world.namespace}/{name}")
        await gateway.flush()  # both are woken; by then it is known what is likely
        await world.until_serving(1)
        await world.until_serving(1, "other")
        await world.scale("other", "colocated", 0)  # there is room for it again

        def holders() -> list[str]:
            return [name for name, pod in world.kubelet.pods.items()
                    if pod.te.state == worker_pb2.EXECUTOR_STATE_WARM
                    and any(r.model_revision.startswith("other@") for r in pod.te.preloads)]  # fmt: skip

        async def held() -> bool:
            return bool(holders())

        await world.until(held, why="a warm pod holds the weights of the model that went to zero")
        (holder,) = holders()
        (request,) = world.kubelet.pods[holder].te.preloads
        assert request.path == str(other) and request.dtype == "auto"
        await asyncio.sleep(0.6)
        assert len(world.kubelet.pods[holder].te.preloads) == 1  # told once
        await world.scale("other", "colocated", 1)
        (claimed,) = await world.until_serving(1, "other")
        assert claimed["metadata"]["name"] == holder
    await redis.aclose()


async def test_a_pool_may_hold_nothing_ahead(world: World) -> None:
    async with world.operator():
        await world.pool(size=1, weights={"sizeLimit": "1Gi", "ahead": False})
        await cache(world, f"file://{world.model}")
        await world.serving(roles={"colocated": {"min": 0, "max": 1}})
        await world.until_warm(1)
        await until_reason(world, "Cached")
        await asyncio.sleep(0.6)
        assert not any(pod.te.preloads for pod in world.kubelet.pods.values())
