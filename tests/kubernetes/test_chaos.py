"""What goes wrong at the API and at the operator: it converges, no pod is leaked or claimed twice."""

from __future__ import annotations

import asyncio
import contextlib
import random

import pytest

from controlplane.api.resources.names import ANNOTATION_SERVING_UID, LABEL_SERVING, LABEL_STATE
from controlplane.kube.resources import MODEL_SERVINGS
from tests.support.kube_api import Fault, Write
from tests.support.kube_world import World, connect


async def check_nothing_is_lost(world: World, models: list[str], warm: int) -> None:
    """Every model has its executor, the pool is full, and every pod is somebody's."""
    for model in models:
        await world.until_serving(1, model)
    await world.until_warm(warm)
    pods = await world.pods()
    assert len(pods) == len(models) + warm
    claimed = [pod for pod in pods if pod["metadata"]["labels"][LABEL_STATE] != "warm"]
    names = [pod["metadata"]["labels"][LABEL_SERVING] for pod in claimed]
    assert sorted(names) == sorted(models)
    for pod in claimed:
        owners = [owner["uid"] for owner in pod["metadata"]["ownerReferences"]]
        assert owners == [pod["metadata"]["annotations"][ANNOTATION_SERVING_UID]]
        assert world.te(pod).loads == 1  # an executor loads one model, once


def once_claimed(world: World) -> dict[str, set[str]]:
    """Follows who claims which pod: uid of the pod -> uids of claimants."""
    claims: dict[str, set[str]] = {}
    server = world.server
    assert server is not None

    def look(write: Write) -> None:
        if write.plural == "pods" and write.verb == "patch":
            obj = server.objects_by_key.get((write.plural, write.namespace, write.name))
            claimant = ((obj or {}).get("metadata") or {}).get("annotations", {}).get(ANNOTATION_SERVING_UID)
            if obj is not None and claimant:
                claims.setdefault(obj["metadata"]["uid"], set()).add(claimant)

    server.on_write = look
    return claims


@pytest.mark.parametrize("seed", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in range(2, 6))])
async def test_errors_conflicts_and_lost_watches(emulated: World, seed: int) -> None:
    world, server = emulated, emulated.server
    assert server is not None
    rand = random.Random(seed)
    claims = once_claimed(world)
    models = [f"m{number}" for number in range(4)]
    async with world.operator():
        await world.pool(size=2)
        for model in models:
            await world.serving(model)

        async def hurt() -> None:
            for _ in range(30):
                match rand.randrange(4):
                    case 0:
                        server.drop_watches()
                    case 1:
                        server.compact()  # 410 for every watch
                    case _:
                        status = rand.choice([409, 429, 500, 503])
                        method = rand.choice(["PATCH", "POST", "DELETE", "GET"])
                        server.faults.append(Fault(status, times=rand.randint(1, 3), method=method,
                                                   after=rand.random() < 0.4))  # fmt: skip
                await asyncio.sleep(0.05)
            server.faults.clear()

        await hurt()
        await check_nothing_is_lost(world, models, warm=2)
    assert all(len(claimants) == 1 for claimants in claims.values())


async def test_killed_at_every_step_of_a_claim(emulated: World) -> None:
    """An operator is ended after each write and each call that the one before made, then another begins."""
    world = emulated
    claims = once_claimed(world)
    async with world.operator():
        await world.pool(size=1)
        await world.until_warm(1)
    server = world.server
    assert server is not None
    follow = server.on_write
    await world.serving("m")
    world.kubelet.configure = lambda name, te: setattr(te, "load_seconds", 0.3)
    steps = 0
    for _ in range(40):
        seen = asyncio.Event()

        def stop_there(write: Write, seen: asyncio.Event = seen) -> None:
            follow(write)
            if write.manager.startswith("deepflow"):
                seen.set()

        server.on_write = stop_there
        async with world.operator():
            try:
                await asyncio.wait_for(seen.wait(), 1.5)
                steps += 1
            except TimeoutError:
                break  # it wrote nothing more: all is done
    assert steps >= 4  # finalizer, RoleScaler, claim, serving, statuses
    server.on_write = follow
    async with world.operator():
        await check_nothing_is_lost(world, ["m"], warm=1)
    assert all(len(claimants) == 1 for claimants in claims.values())


async def test_two_operators_at_once(world: World) -> None:
    """Nobody elected a leader: both act on everything."""
    models = [f"m{number}" for number in range(5)]
    second = connect(str(world.server.url)) if world.server is not None else world.api
    async with world.operator(identity="op-1"), world.operator(api=second, identity="op-2"):
        await world.pool(size=2)
        for model in models:
            await world.serving(model)
        await check_nothing_is_lost(world, models, warm=2)
    if second is not world.api:
        await second.close()


async def test_an_answer_that_was_lost_claims_nothing_twice(emulated: World) -> None:
    world, server = emulated, emulated.server
    assert server is not None
    claims = once_claimed(world)
    async with world.operator():
        await world.pool(size=2)
        await world.until_warm(2)
        for status in (500, 503):
            server.faults.append(Fault(status, times=1, method="PATCH", plural="pods", after=True))
        await world.serving("m")
        await check_nothing_is_lost(world, ["m"], warm=2)
    assert all(len(claimants) == 1 for claimants in claims.values())


async def test_pods_of_a_model_that_was_removed_by_force_are_drained(emulated: World) -> None:
    world, server = emulated, emulated.server
    assert server is not None
    async with world.operator():
        await world.pool(size=1)
        await world.serving("m")
        await world.until_serving(1)
    server.owned.clear()  # and no garbage collector runs
    patch = {"metadata": {"finalizers": None}}
    await world.api.patch(MODEL_SERVINGS, world.namespace, "m", patch, manager="somebody")
    await world.api.delete(MODEL_SERVINGS, world.namespace, "m")
    async with world.operator():

        async def gone() -> bool:
            return not await world.pods(model_serving="m")

        await world.until(gone, why="its executor is gone")


async def test_a_leader_that_loses_its_lease_ends(emulated: World) -> None:
    from controlplane.kube.lease import LeaseTimes
    from controlplane.operator.run import Process

    world, server = emulated, emulated.server
    assert server is not None
    settings = world.settings(
        leader_elect=True, lease_namespace=world.namespace, health_port=0, host="127.0.0.1"
    )
    process = Process(world.api, settings, times=LeaseTimes(duration=1.0, deadline=0.5, retry=0.1))
    task = asyncio.create_task(process.run())

    async def leads() -> bool:
        return process.operator is not None and process.ready

    await world.until(leads, why="it leads")
    server.faults.append(Fault(403, times=10_000, plural="leases"))
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(task, 10)
    assert task.done() and process.operator is None


async def test_sixty_four_claims_at_once(emulated: World) -> None:
    """Of one model: each pod is claimed once and loads once, fed in a tree; deleted, nothing is left."""
    world, count = emulated, 64
    claims = once_claimed(world)
    world.kubelet.configure = lambda name, te: setattr(te, "load_seconds", 0.5)
    async with world.operator():
        await world.pool(size=count, maxPods=count + 2)
        await world.until_warm(count)
        await world.serving(roles={"colocated": {"min": count, "max": count}})
        pods = await world.until_serving(count)
        assert len(claims) == count and all(len(claimants) == 1 for claimants in claims.values())
        tes = [world.te(pod) for pod in pods]
        assert {te.loads for te in tes} == {1}
        fed = [[source.te_id for source in te.requests[-1].fork_from] for te in tes]
        assert max(map(len, fed)) <= 8 and sum(map(bool, fed)) >= count - 2  # who is first has nobody to ask
        first = [sources[0] for sources in fed if sources]
        assert len(set(first)) >= count // 4, "one source is asked by too many"
        await world.api.delete(MODEL_SERVINGS, world.namespace, "m")

        async def gone() -> bool:
            return not await world.pods(model_serving="m")

        await world.until(gone, why="every executor has left")
        await world.until_warm(count)
        assert len(await world.pods()) == count
