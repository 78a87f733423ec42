"""Waking from zero, following the load, advice, overrides, zero again; with a real Valkey."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from redis.asyncio import Redis

from controlplane.api.resources.names import ANNOTATION_RESUME
from controlplane.fleet.demand import DemandWriter
from controlplane.kube.resources import MODEL_SERVINGS, ROLE_SCALERS
from controlplane.operator.scalers import replicas_owner
from tests.support.fake_te import FakeTe
from tests.support.kube_world import World

ZERO = {"colocated": {"min": 0, "max": 4}}


@pytest.fixture
async def redis(clean_valkey: str) -> AsyncIterator[Redis]:
    client = Redis.from_url(clean_valkey)
    yield client
    await client.aclose()


def busy(_: str, te: FakeTe) -> None:
    te.queued_tokens, te.waiting = 2600, 4  # 2.6 s of work, and several to share it


async def scaler(world: World, role: str = "colocated") -> dict[str, Any]:
    return await world.api.get(ROLE_SCALERS, world.namespace, f"m-{role}")


async def test_a_held_request_wakes_a_model_once(world: World, redis: Redis) -> None:
    gateway = DemandWriter(redis, "g-1")
    async with world.operator(redis):
        await world.pool(size=2)
        await world.until_warm(2)
        await world.serving(roles={"prefill": {"min": 0, "max": 2}, "decode": {"min": 0, "max": 2}})
        await world.until_ready("ScaledToZero")
        gateway.record_held(f"{world.namespace}/m", 3)
        await gateway.flush()
        await world.until_serving(2)
        await world.until_ready("Serving")

        async def told() -> bool:
            wake = (await world.get_serving())["status"].get("lastWake") or {}
            return wake.get("seconds") is not None and wake["path"] == "warm"

        await world.until(told, why="status.lastWake says how it went")
    assert replicas_owner(await scaler(world, "decode")) == "deepflow-activator"
    history = (await world.get_serving())["status"]["scalingHistory"]
    assert sorted((h["role"], h["from"], h["to"], h["by"]) for h in history) == [
        ("decode", 0, 1, "activator"),
        ("prefill", 0, 1, "activator"),
    ]


async def test_a_request_that_nobody_held_wakes_too(world: World, redis: Redis) -> None:
    gateway = DemandWriter(redis, "g-1")
    gateway.record_demand(f"{world.namespace}/m")
    await gateway.flush()  # before it was at zero: wakes nobody
    async with world.operator(redis):
        await world.pool(size=1)
        await world.serving(roles=ZERO)
        await world.until_ready("ScaledToZero")
        await asyncio.sleep(0.5)
        assert not await world.pods(model_serving="m")
        gateway._models.clear()
        gateway.record_demand(f"{world.namespace}/m")
        await gateway.flush()
        await world.until_serving(1)


async def test_an_idle_model_goes_to_zero_and_stays_in_the_catalogue(world: World, redis: Redis) -> None:
    gateway = DemandWriter(redis, "g-1")
    async with world.operator(redis):
        await world.pool(size=1)
        await world.serving(roles=ZERO, scaling={"scaleToZeroAfterSeconds": 2})
        await world.until_ready("ScaledToZero")
        gateway.record_held(f"{world.namespace}/m", 1)
        await gateway.flush()
        (pod,) = await world.until_serving(1)
        world.te(pod).tasks = 1
        gateway.record_held(f"{world.namespace}/m", 0)
        await gateway.flush()
        await asyncio.sleep(3.0)
        assert len(await world.serving_pods()) == 1  # a task runs
        world.te(pod).tasks = 0
        await world.until_serving(0)
        await world.until_ready("ScaledToZero")
    status = (await world.get_serving())["status"]
    assert status["scalingHistory"][0]["reason"] == "Idle" and status["revision"].startswith("m@")


async def test_an_idle_model_sleeps_first_and_a_request_wakes_it_where_it_is(
    world: World, redis: Redis
) -> None:
    gateway = DemandWriter(redis, "g-1")

    async def held(count: int) -> None:
        gateway.record_held(f"{world.namespace}/m", count)
        await gateway.flush()

    async with world.operator(redis):
        await world.pool(size=1, maxPods=4)
        await world.serving(roles=ZERO, scaling={"scaleToZeroAfterSeconds": 1, "sleepSeconds": 600})
        await world.until_ready("ScaledToZero")
        await held(1)
        (pod,) = await world.until_serving(1)
        te = world.te(pod)
        loads = te.loads
        await held(0)

        async def sleeps() -> bool:
            role = (await world.get_serving())["status"]["roles"][0]
            return te.asleep != "" and (role["asleep"], role["ready"], role["draining"]) == (1, 0, 0)

        await world.until(sleeps, why="its executor sleeps")
        await world.until_ready("ScaledToZero")
        (there,) = await world.pods(model_serving="m")
        assert there["metadata"]["uid"] == pod["metadata"]["uid"]
        assert there["metadata"]["labels"]["deepflow.dev/state"] == "asleep" and not te.drained_with

        await held(1)
        (woken,) = await world.until_serving(1)
        assert woken["metadata"]["uid"] == pod["metadata"]["uid"] and te.loads == loads + 1

        async def told() -> bool:
            wake = (await world.get_serving())["status"].get("lastWake") or {}
            return wake.get("seconds") is not None and wake["path"] == "wake"

        await world.until(told, why="status.lastWake says that it was woken")
        await held(0)
        await world.until(sleeps, why="it sleeps again")
        # Another model lacks an executor that the pool cannot give: the sleeper makes room.
        await world.serving("other", roles={"colocated": {"min": 9, "max": 9}})

        async def gone() -> bool:
            return not await world.pods(model_serving="m")

        await world.until(gone, why="the sleeper's pod is given back")


async def test_without_redis_nobody_goes_to_zero(world: World) -> None:
    away = Redis.from_url("redis://127.0.0.1:1/0")
    async with world.operator(away):
        await world.pool(size=1)
        await world.serving(roles=ZERO, scaling={"scaleToZeroAfterSeconds": 1, "mode": "Auto"})

        async def there() -> bool:
            return bool((await world.api.list(ROLE_SCALERS, world.namespace))[0])

        await world.until(there, why="the RoleScaler is made")
        await world.scale("m", "colocated", 1)
        await world.until_serving(1)
        note = {"metadata": {"annotations": {ANNOTATION_RESUME: "now"}}}
        await world.api.patch(ROLE_SCALERS, world.namespace, "m-colocated", note, manager="kubectl")
        await asyncio.sleep(2.5)
        assert len(await world.serving_pods()) == 1
    await away.aclose()


async def test_load_adds_executors_and_says_why(world: World, redis: Redis) -> None:
    world.kubelet.configure = busy
    async with world.operator(redis):
        await world.pool(size=1)
        await world.serving(roles={"colocated": {"min": 1, "max": 3}})
        await world.until_serving(3)
    status = (await world.get_serving())["status"]
    assert status["scalingHistory"][-1]["reason"] in ("QueueTime", "Panic")
    assert replicas_owner(await scaler(world)) == "deepflow-autoscaler"


async def test_advice_is_said_and_not_done(world: World, redis: Redis) -> None:
    world.kubelet.configure = busy
    async with world.operator(redis):
        await world.pool(size=1)
        await world.serving(roles={"colocated": {"min": 1, "max": 3}}, scaling={"mode": "Advisory"})
        await world.until_serving(1)

        async def advised() -> bool:
            status = (await world.get_serving()).get("status") or {}
            said = (await scaler(world)).get("status") or {}
            return bool(status.get("scalingHistory")) and said.get("recommended", 1) > 1

        await world.until(advised, why="the advice stands in status")
        assert len(await world.serving_pods()) == 1
        assert (await world.condition("ScalingActive"))[1] == "Advisory"
    assert (await world.get_serving())["status"]["scalingHistory"][0]["advisory"] is True


async def test_what_a_person_sets_holds_until_it_is_given_back(world: World, redis: Redis) -> None:
    world.kubelet.configure = busy
    async with world.operator(redis):
        await world.pool(size=1)
        await world.serving(roles={"colocated": {"min": 1, "max": 4}})
        await world.until_serving(4)
        await world.scale("m", "colocated", 2)
        await world.until_serving(2)
        await asyncio.sleep(1.0)  # the load asks for more all the while
        assert (await scaler(world))["spec"]["replicas"] == 2
        assert (await world.condition("ScalingActive")) == ("False", "Overridden")
        assert (await scaler(world))["status"]["override"]["by"] == "kubectl"
        note = {"metadata": {"annotations": {ANNOTATION_RESUME: "now"}}}
        await world.api.patch(ROLE_SCALERS, world.namespace, "m-colocated", note, manager="kubectl")
        await world.until_serving(4)

        async def forgotten() -> bool:
            found = await scaler(world)
            return "override" not in found["status"] and ANNOTATION_RESUME not in (
                found["metadata"].get("annotations") or {}
            )

        await world.until(forgotten, why="the override is over")


async def test_zero_that_a_person_set_is_not_woken(world: World, redis: Redis) -> None:
    gateway = DemandWriter(redis, "g-1")
    async with world.operator(redis):
        await world.pool(size=1)
        await world.serving(roles=ZERO)
        await world.until_ready("ScaledToZero")
        gateway.record_held(f"{world.namespace}/m", 1)
        await gateway.flush()
        await world.until_serving(1)
        await world.scale("m", "colocated", 0)
        await world.until_serving(0)
        await asyncio.sleep(1.0)
        assert not await world.pods(model_serving="m")
        patch = {"spec": {"scaling": {"mode": "Manual"}}}
        await world.api.patch(MODEL_SERVINGS, world.namespace, "m", patch, manager="test")
        await world.until_serving(1)  # where others set all counts, zero only means idle
