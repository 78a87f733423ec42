"""The operator against a Kubernetes API: claims, roles, drains, replacements, deletion, conditions."""

from __future__ import annotations

import asyncio

import pytest
from deepflow.v1 import common_pb2, worker_pb2

from controlplane.api.resources.names import ANNOTATION_PAUSED, ANNOTATION_ROLE_EPOCH, LABEL_ROLE, PORT_GRPC
from controlplane.kube.resources import MODEL_SERVINGS, ROLE_SCALERS, WARM_POOLS, key_of
from controlplane.operator.executors import NO_FILE
from tests.support.kube_world import World

ROLES = {
    "colocated": common_pb2.ROLE_COLOCATED,
    "prefill": common_pb2.ROLE_PREFILL,
    "decode": common_pb2.ROLE_DECODE,
}


async def scaled(world: World, name: str, replicas: int, role: str = "colocated") -> None:
    """Scales once the RoleScaler is there."""

    async def there() -> bool:
        return bool((await world.api.list(ROLE_SCALERS, world.namespace))[0])

    await world.until(there, why="the RoleScaler is made")
    await world.scale(name, role, replicas)


async def test_a_pool_fills_and_a_model_is_served_from_it(world: World) -> None:
    async with world.operator():
        await world.pool(size=2)
        await world.until_warm(2)
        await world.serving()
        (pod,) = await world.until_serving(1)
        await world.until_ready("Serving")
        await world.until_warm(2)  # the pool refills behind
    assert world.te(pod).revision.startswith("m@")
    status = (await world.get_serving())["status"]
    assert status["replicas"] == "C1/1" and status["revision"].startswith("m@")


async def test_roles_are_pushed_to_executors_and_mirrored_in_labels(world: World) -> None:
    async with world.operator():
        await world.pool(size=2)
        await world.serving(roles={"prefill": {"min": 1, "max": 3}, "decode": {"min": 1, "max": 3}})
        pods = await world.until_serving(2)
        assert {p["metadata"]["labels"][LABEL_ROLE] for p in pods} == {"prefill", "decode"}
        for pod in pods:
            te = world.te(pod)
            assert te.role == ROLES[pod["metadata"]["labels"][LABEL_ROLE]]
            assert str(te.epoch) == pod["metadata"]["annotations"][ANNOTATION_ROLE_EPOCH]


async def test_a_surplus_on_one_side_changes_its_role_and_nothing_is_drained(world: World) -> None:
    async with world.operator():
        await world.pool(size=3)
        roles = {"prefill": {"min": 1, "max": 3}, "decode": {"min": 1, "max": 3}}
        await world.serving(roles=roles, scaling={"mode": "Manual"})
        await world.until_serving(2)
        await world.scale("m", "prefill", 2)
        before = await world.until_serving(3)
    await world.scale("m", "prefill", 1)
    await world.scale("m", "decode", 2)
    async with world.operator():  # sees both at once

        async def turned() -> bool:
            pods = await world.serving_pods()
            labels = sorted(p["metadata"]["labels"][LABEL_ROLE] for p in pods)
            told = sorted(world.te(p).role for p in pods)
            decode = [ROLES["decode"]] * 2
            return labels == ["decode", "decode", "prefill"] and told == [ROLES["prefill"], *decode]

        await world.until(turned, why="one prefill executor decodes")
        after = await world.serving_pods()
    assert {p["metadata"]["uid"] for p in after} == {p["metadata"]["uid"] for p in before}


async def test_a_role_set_behind_our_back_is_set_again_above_its_epoch(world: World) -> None:
    async with world.operator():
        await world.pool(size=1)
        await world.serving()
        (pod,) = await world.until_serving(1)
        te = world.te(pod)
        te.role, te.epoch = ROLES["decode"], 40

        async def back() -> bool:
            return te.role == ROLES["colocated"] and te.epoch > 40

        await world.until(back, why="the role of the labels holds")


async def test_fewer_replicas_drain_the_idlest_and_wait_for_its_tasks(world: World) -> None:
    async with world.operator():
        await world.pool(size=2)
        await world.serving(scaling={"mode": "Manual"}, drainSeconds=30)
        await world.until_serving(1)
        await world.scale("m", "colocated", 2)
        busy, idle = sorted(await world.until_serving(2), key=lambda p: p["metadata"]["name"])
        world.te(busy).tasks, world.te(idle).tasks = 5, 1
        await asyncio.sleep(1)  # so that the tasks were seen
        await world.scale("m", "colocated", 1)

        async def draining() -> bool:
            return len(await world.pods(model_serving="m", state="draining")) == 1

        await world.until(draining, why="one drains")
        (leaving,) = await world.pods(model_serving="m", state="draining")
        await asyncio.sleep(1.0)
        assert (await world.pods(model_serving="m", state="draining")) != []  # its tasks are not over
        te = world.te(leaving)
        assert te.state == worker_pb2.EXECUTOR_STATE_DRAINING
        te.tasks = 0
        await world.until_serving(1)


async def test_a_drain_has_a_bound(world: World) -> None:
    async with world.operator():
        await world.pool(size=1)
        await world.serving(
            scaling={"mode": "Manual"}, roles={"colocated": {"min": 0, "max": 2}}, drainSeconds=1
        )
        await scaled(world, "m", 1)
        (pod,) = await world.until_serving(1)
        world.te(pod).tasks = 1
        await world.scale("m", "colocated", 0)
        await world.until_serving(0)
        await world.until_ready("ScaledToZero")


async def test_a_dead_executor_is_replaced(world: World) -> None:
    async with world.operator():
        await world.pool(size=1)
        await world.serving()
        (pod,) = await world.until_serving(1)
        name = pod["metadata"]["name"]
        await world.kubelet.pods[name].silence()
        await world.kubelet.report(name, ready=False, phase="Failed")

        async def another() -> bool:
            pods = await world.serving_pods()
            return len(pods) == 1 and pods[0]["metadata"]["name"] != name

        await world.until(another, why="another serves")
        await world.until_ready("Serving")


async def test_an_executor_that_is_silent_to_us_alone_goes_only_after_its_replacement_serves(
    world: World,
) -> None:
    seen: list[int] = []
    async with world.operator():
        await world.pool(size=1)
        await world.serving()
        (pod,) = await world.until_serving(1)
        name = pod["metadata"]["name"]
        await world.kubelet.pods[name].silence()  # its kubelet goes on calling it ready

        async def replaced() -> bool:
            pods = await world.serving_pods()
            seen.append(len(pods))
            return len(pods) == 1 and pods[0]["metadata"]["name"] != name

        await world.until(replaced, why="another serves")
    assert min(seen) >= 1


async def test_a_process_that_started_again_loads_again(world: World) -> None:
    async with world.operator():
        await world.pool(size=1)
        await world.serving()
        (pod,) = await world.until_serving(1)
        te = world.te(pod)
        te.state, te.revision, te.epoch, te.role = worker_pb2.EXECUTOR_STATE_WARM, "", 0, ROLES["decode"]

        async def again() -> bool:
            return te.loads == 2 and len(await world.serving_pods()) == 1

        await world.until(again, why="it loads again")
        assert te.role == ROLES["colocated"]


async def test_a_new_source_replaces_executors_one_by_one(world: World) -> None:
    fewest: list[int] = []
    async with world.operator():
        await world.pool(size=2)
        await world.serving(roles={"colocated": {"min": 2, "max": 2}})
        old = {p["metadata"]["uid"] for p in await world.until_serving(2)}
        other = world.folder / "other.gguf"
        other.write_bytes(b"another")
        patch = {"spec": {"model": {"uri": f"file://{other}"}}}
        await world.api.patch(MODEL_SERVINGS, world.namespace, "m", patch, manager="test")

        async def renewed() -> bool:
            pods = await world.serving_pods()
            fewest.append(len(pods))
            return len(pods) == 2 and not old & {p["metadata"]["uid"] for p in pods}

        await world.until(renewed, why="both are new")
    assert min(fewest) >= 2


@pytest.mark.parametrize("fails", [False, True])
async def test_the_next_executor_is_fed_by_the_first_or_fetches(world: World, fails: bool) -> None:
    async with world.operator():
        await world.pool(size=2)
        await world.until_warm(2)
        await world.serving()
        (pod,) = await world.until_serving(1)
        first = world.te(pod)
        await world.until_warm(2)
        for pod in await world.pods():
            world.te(pod).fail_fork = fails
        assert not first.requests[0].fork_from
        await world.scale("m", "colocated", 2)
        tes = [world.te(pod) for pod in await world.until_serving(2)]
    (second,) = (te for te in tes if te is not first)
    assert [request.path == NO_FILE for request in second.requests] == ([True, False] if fails else [True])
    for request in second.requests:
        (source,) = request.fork_from
        assert (source.te_id, source.incarnation) == (first.te_id, first.incarnation)
        assert source.address.endswith(f":{PORT_GRPC}")
        assert request.model_revision == first.revision


async def test_a_model_that_cannot_be_loaded_says_why(world: World) -> None:
    world.kubelet.configure = lambda name, te: setattr(te, "fail_load", "its architecture is unknown")
    async with world.operator():
        await world.pool(size=1)
        await world.serving()
        await world.until_ready("LoadFailed")
    conditions = {c["type"]: c for c in (await world.get_serving())["status"]["conditions"]}
    assert "its architecture is unknown" in conditions["RolesReady"]["message"]
    assert conditions["Ready"]["status"] == "False"


async def test_a_source_that_is_not_there_says_so(world: World) -> None:
    async with world.operator():
        await world.pool(size=1)
        await world.serving(model={"uri": f"file://{world.folder}/none.gguf"})
        await world.until_ready("LoadFailed")
    conditions = {c["type"]: c for c in (await world.get_serving())["status"]["conditions"]}
    assert "none.gguf" in conditions["RolesReady"]["message"]


async def test_deleting_a_model_drains_its_executors_first(world: World) -> None:
    async with world.operator():
        await world.pool(size=1)
        await world.serving(drainSeconds=30)
        (pod,) = await world.until_serving(1)
        te = world.te(pod)
        te.tasks = 1
        await asyncio.sleep(0.2)
        await world.api.delete(MODEL_SERVINGS, world.namespace, "m")
        await world.until_ready("Deleting")
        await asyncio.sleep(0.8)
        assert await world.pods(model_serving="m")
        te.tasks = 0

        async def gone() -> bool:
            return (
                not await world.pods(model_serving="m")
                and not (await world.api.list(MODEL_SERVINGS, world.namespace))[0]
            )

        await world.until(gone, why="pods and object are gone")

        async def scalers_gone() -> bool:
            return not (await world.api.list(ROLE_SCALERS, world.namespace))[0]

        if world.server is not None:  # without a controller manager nobody collects what lost its owner
            await world.until(scalers_gone, why="RoleScalers are gone")


async def test_without_a_pool_of_its_profile_it_says_so(world: World) -> None:
    async with world.operator():
        await world.serving(accelerator="gpu")
        await world.until_ready("ProfileUnknown")
        await world.pool("gpus", size=1, accelerator="gpu")
        await world.until_ready("Serving")


async def test_a_model_takes_pods_of_its_own_engine(world: World) -> None:
    async with world.operator():
        await world.pool(size=1)
        await world.serving(engine="vllm", roles={"colocated": {"min": 1, "max": 1}})
        await world.until_ready("EngineUnavailable")
        assert not await world.pods(model_serving="m")
        await world.pool("vllm", size=1, engine="vllm")
        (pod,) = await world.until_serving(1)
        assert pod["metadata"]["labels"]["deepflow.dev/warm-pool"] == "vllm"
        args = next(c for c in pod["spec"]["containers"] if c["name"] == "executor")["args"]
        assert args[args.index("--engine") + 1] == "vllm" and "--weights-dir" not in args
        (other,) = await world.pods(warm_pool="cpu")
        assert other["metadata"]["labels"]["deepflow.dev/state"] == "warm"


async def test_two_models_of_one_name_are_not_both_served(world: World) -> None:
    async with world.operator():
        await world.pool(size=2)
        await world.serving("m")
        await world.until_serving(1)
        await asyncio.sleep(1.1)  # creation times have whole seconds
        await world.serving("n", model={"uri": f"file://{world.model}", "aliases": ["m"]})
        await world.until_ready("NameConflict", "n")
        assert (await world.condition("Ready", "m"))[0] == "True"


async def test_the_higher_priority_gets_the_last_warm_pod(world: World) -> None:
    world.kubelet.hold.clear()
    async with world.operator():
        await world.serving("low", priority=0)
        await world.serving("high", priority=10)
        await world.pool(size=0, maxPods=1)
        await asyncio.sleep(0.5)
        world.kubelet.hold.set()
        await world.until_serving(1, "high")
        assert not await world.pods(model_serving="low")
        assert (await world.condition("CapacityAvailable", "low"))[0] == "False"


async def test_a_pool_renews_its_warm_pods_and_keeps_some_meanwhile(world: World) -> None:
    async with world.operator():
        await world.pool(size=2)
        await world.until_warm(2)
        old = {p["metadata"]["uid"] for p in await world.pods(state="warm")}
        await world.api.patch(
            WARM_POOLS, world.namespace, "cpu", {"spec": {"image": "deepflow/worker:2"}}, manager="test"
        )

        async def renewed() -> bool:
            pods = await world.pods(state="warm")
            return len(pods) == 2 and not old & {p["metadata"]["uid"] for p in pods}

        await world.until(renewed, why="both are new")


async def test_a_smaller_pool_gives_pods_back(world: World) -> None:
    async with world.operator():
        await world.pool(size=3)
        await world.until_warm(3)
        await world.api.patch(WARM_POOLS, world.namespace, "cpu", {"spec": {"size": 1}}, manager="test")
        await world.until_warm(1)


async def test_paused_means_nothing_is_changed(world: World) -> None:
    async with world.operator():
        await world.pool(size=1)
        await world.serving()
        await world.until_serving(1)
        note = {"metadata": {"annotations": {ANNOTATION_PAUSED: "true"}}}
        await world.api.patch(MODEL_SERVINGS, world.namespace, "m", note, manager="test")
        await world.until_ready("Paused")
        await world.scale("m", "colocated", 3)
        await asyncio.sleep(0.5)
        assert len(await world.pods(model_serving="m")) == 1


async def test_an_idle_system_writes_nothing(world: World) -> None:
    async with world.operator() as operator:
        await world.pool(size=1)
        await world.serving()
        await world.serving("p", roles={"prefill": {"min": 1, "max": 2}, "decode": {"min": 1, "max": 2}})
        await world.until_serving(1)
        await world.until_serving(2, "p")
        await world.until_warm(1)
        await asyncio.sleep(1.0)
        before = world.api.writes
        for _ in range(3):  # and neither do reconciles without cause
            for obj in operator.cluster.servings:
                operator.servings.queue.add(key_of(obj))
            for obj in operator.cluster.pools:
                operator.pools.queue.add(key_of(obj))
            await asyncio.sleep(1.0)
        assert world.api.writes == before
