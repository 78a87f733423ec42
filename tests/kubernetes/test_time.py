"""What becomes true by time alone: no object changes and no watch tells, so each must bring its own look.

Every one of these stood still for the ten minutes of the operator's look without cause until it had one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from controlplane.api.resources.names import PORT_GRPC
from controlplane.kube.resources import MODEL_SERVINGS, PODS, ROLE_SCALERS, WARM_POOLS
from controlplane.operator import pools, servings
from controlplane.operator.plan.values import TeState, Timing
from controlplane.operator.scalers import replicas_owner
from kvtransfer.tls import Tls
from tests.support.certificates import Authority
from tests.support.kube_api import Fault
from tests.support.kube_world import World


@pytest.fixture
async def redis(clean_valkey: str) -> AsyncIterator[Redis]:
    client = Redis.from_url(clean_valkey)
    yield client
    await client.aclose()


async def test_a_pool_whose_pods_were_refused_tries_again(
    emulated: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, server = emulated, emulated.server
    assert server is not None
    monkeypatch.setattr(pools, "HOLD_SECONDS", 0.3)
    async with world.operator():
        server.faults.append(Fault(403, times=1, method="POST", plural="pods"))  # as a quota does
        await world.pool(size=1)

        async def told() -> bool:
            found = await world.api.get(WARM_POOLS, world.namespace, "cpu")
            return [c["reason"] for c in (found.get("status") or {}).get("conditions", [])] == ["PodFailed"]

        await world.until(told, why="the pool says that its pods are refused")
        await world.until_warm(1, seconds=10.0)


@pytest.mark.parametrize("mode", ["Auto", "Advisory"])
async def test_an_override_ends_with_its_time_though_nothing_is_to_change(
    world: World, redis: Redis, mode: str
) -> None:
    async with world.operator(redis):
        await world.pool(size=1)
        scaling = {"overrideHoldSeconds": 3, "mode": mode}
        await world.serving(roles={"colocated": {"min": 1, "max": 3}}, scaling=scaling)
        await world.until_serving(1)
        await world.scale("m", "colocated", 2)
        await world.until_serving(2)

        async def overridden() -> bool:
            return (await world.condition("ScalingActive"))[1] == "Overridden"

        async def over() -> bool:
            found = await world.api.get(ROLE_SCALERS, world.namespace, "m-colocated")
            theirs = mode == "Auto" and replicas_owner(found) != "deepflow-autoscaler"
            return not theirs and not await overridden()

        await world.until(overridden, why="kubectl's count holds")
        await world.until(over, seconds=15.0, why="it holds no longer")
        await asyncio.sleep(1.0)
        assert not await overridden()  # and does not begin anew
        found = await world.api.get(ROLE_SCALERS, world.namespace, "m-colocated")
        assert found["spec"]["replicas"] == 2
        assert ("override" in found["status"]) is (mode != "Auto")  # who decided stays told


async def test_a_name_that_is_given_up_goes_to_who_was_refused_for_it(world: World) -> None:
    async with world.operator():
        await world.pool(size=1)
        await world.serving("first", model={"uri": f"file://{world.model}", "id": "name"})
        await world.until_serving(1, "first")
        await asyncio.sleep(1.1)  # creation times have seconds: who came first is known
        await world.serving("second", model={"uri": f"file://{world.model}", "aliases": ["name"]})
        await world.until_ready("NameConflict", "second")
        await world.api.delete(MODEL_SERVINGS, world.namespace, "first")
        await world.until_ready("Serving", "second", seconds=20.0)


async def test_certificates_that_were_exchanged_are_shown_to_executors_that_were_known(
    emulated: World, tmp_path: Path
) -> None:
    world = emulated
    before, after = Authority(tmp_path / "before"), Authority(tmp_path / "after")
    folder = before.write(tmp_path / "operator")
    world.kubelet.tls = Tls(before.write(tmp_path / "executor"))
    async with world.operator(tls=Tls(folder), timing=Timing()) as operator:
        await world.pool(size=1)
        await world.serving()
        (pod,) = await world.until_serving(1)
        executor = world.kubelet.pods[pod["metadata"]["name"]]
        uid = pod["metadata"]["uid"]
        await executor.silence()

        async def missed() -> bool:
            return (te := operator.cluster.executors.te(uid)) is not None and te.silent_since is not None

        await world.until(missed, seconds=20.0, why="its silence is noticed")
        executor.tls = world.kubelet.tls = Tls(after.write(tmp_path / "executor-after"))
        after.write(folder)
        await executor.start_executor(PORT_GRPC)

        async def seen() -> bool:
            te = operator.cluster.executors.te(uid)
            return te is not None and te.state is TeState.READY and te.silent_since is None

        await world.until(seen, seconds=20.0, why="the operator speaks to it again")


async def test_a_pod_of_a_lost_node_does_not_keep_a_deleted_model(
    emulated: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = emulated
    monkeypatch.setattr(servings, "LOST_SECONDS", 1.0)
    async with world.operator():
        await world.pool(size=1)
        await world.serving()
        (pod,) = await world.until_serving(1)
        name = pod["metadata"]["name"]
        # Its kubelet is gone: the pod is deleted, and nobody ever says that it has ended.
        stays = {"metadata": {"finalizers": ["test/lost-node"]}}
        await world.api.patch(PODS, world.namespace, name, stays, manager="test")
        await world.api.delete(MODEL_SERVINGS, world.namespace, "m")

        async def gone() -> bool:
            return not (await world.api.list(MODEL_SERVINGS, world.namespace))[0]

        await world.until(gone, seconds=20.0, why="the ModelServing is gone")
        assert (await world.api.get(PODS, world.namespace, name))["metadata"]["deletionTimestamp"]
