"""States, epochs and drains of one executor. Needs nothing; loaders and engines are scripted."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from flowserve.engine.types import ErrorCode, LoadReport, Role
from flowserve.shell.lifecycle import Lifecycle, Refusal, Refused, State
from flowserve.shell.loading import LoadFailed, LoadReason, LoadSpec
from flowserve.shell.start import Start

SPEC = LoadSpec("model@1", "/nowhere/model.gguf")
OTHER = LoadSpec("other@1", "/nowhere/other.gguf")


@dataclass
class Engine:
    active_tasks: int = 0
    roles: list[Role] = field(default_factory=list)

    def set_role(self, role: Role) -> None:
        self.roles.append(role)

    def load(self) -> LoadReport:
        return LoadReport(step=7, running=self.active_tasks)


@dataclass
class FakeModel:
    spec: LoadSpec
    engine: Engine = field(default_factory=Engine)
    num_blocks: int = 10
    load_seconds: float = 0.0
    start: Start = field(default_factory=lambda: Start("warm", {"te_load": 0.1}, 1.0))
    closed: bool = False
    falls: threading.Event = field(default_factory=threading.Event)  # set: falling asleep does not hang
    stuck: bool = False
    can_sleep: bool = True

    def close(self) -> bool:
        self.closed = True
        return True

    def sleep(self) -> FakeModel:
        assert self.falls.wait(10)
        if self.stuck:
            raise RuntimeError("its engine does not stop")
        return self


class Loads:
    """A loader under control: each load waits for `go`, then returns or raises `failure`."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.go.set()
        self.failure: Exception | None = None
        self.models: list[FakeModel] = []
        self.woken: list[FakeModel] = []
        self.no_memory = 0  # how often

    def __call__(self, spec: LoadSpec, role: Role) -> Any:
        assert self.go.wait(10)
        if self.failure is not None:
            raise self.failure
        if self.no_memory:
            self.no_memory -= 1
            raise LoadFailed(LoadReason.NO_MEMORY, "out of memory")
        self.models.append(FakeModel(spec))
        self.models[-1].falls.set()
        return self.models[-1]

    def preload_weights(self, spec: LoadSpec) -> str:
        assert self.go.wait(10)
        if self.failure is not None:
            raise self.failure
        return "built"

    def wake(self, asleep: Any, spec: LoadSpec, role: Role) -> Any:
        if self.no_memory:
            self.no_memory -= 1
            asleep.close()
            raise LoadFailed(LoadReason.NO_MEMORY, "out of memory")
        self.woken.append(asleep)
        return asleep


def make(loads: Any = None, offers: Callable[[], int] = lambda: 0, max_asleep: int = 4) -> Lifecycle:
    async def let_go() -> None:
        pass

    return Lifecycle(
        loads or Loads(),
        role=Role.COLOCATED,
        on_model=lambda model: None,
        on_sleep=let_go,
        on_change=lambda: None,
        transfers_left=offers,
        max_asleep=max_asleep,
    )


async def test_a_warm_executor_refuses_tasks_until_its_model_is_loaded() -> None:
    life = make()
    error = life.accepts("model@1")
    assert error is not None and error.code is ErrorCode.MODEL_NOT_LOADED and error.retryable
    await life.load_model(SPEC)
    assert life.state is State.READY and life.accepts("model@1") is None
    error = life.accepts("other@1")
    assert error is not None and error.code is ErrorCode.MODEL_NOT_LOADED and "other@1" in error.message


async def test_loading_the_same_revision_again_changes_nothing() -> None:
    loads = Loads()
    life = make(loads)
    first = await life.load_model(SPEC)
    assert await life.load_model(LoadSpec("model@1", "/elsewhere")) is first
    assert len(loads.models) == 1
    with pytest.raises(Refused) as refused:
        await life.load_model(OTHER)
    assert refused.value.refusal is Refusal.STALE and life.state is State.READY


async def test_concurrent_loads_of_one_model_are_one_load_and_another_is_refused() -> None:
    loads = Loads()
    loads.go.clear()
    life = make(loads)
    first, second = (asyncio.create_task(life.load_model(SPEC)) for _ in range(2))
    await asyncio.sleep(0.01)
    assert life.state is State.LOADING
    with pytest.raises(Refused) as refused:
        await life.load_model(OTHER)
    assert refused.value.refusal is Refusal.BUSY
    loads.go.set()
    assert await first is await second
    assert len(loads.models) == 1


async def test_a_caller_that_goes_away_does_not_stop_the_load() -> None:
    loads = Loads()
    loads.go.clear()
    life = make(loads)
    caller = asyncio.create_task(life.load_model(SPEC))
    await asyncio.sleep(0.01)
    caller.cancel()
    await asyncio.gather(caller, return_exceptions=True)
    loads.go.set()
    await life.load_model(SPEC)
    assert life.state is State.READY and len(loads.models) == 1


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (LoadFailed(LoadReason.NOT_FOUND, "no such file"), LoadReason.NOT_FOUND),
        (RuntimeError("the driver says no"), LoadReason.INTERNAL),
    ],
)
async def test_a_failed_load_leaves_the_executor_warm_with_the_message(
    failure: Exception, reason: LoadReason
) -> None:
    loads = Loads()
    loads.failure = failure
    life = make(loads)
    with pytest.raises(LoadFailed) as failed:
        await life.load_model(SPEC)
    assert failed.value.reason is reason
    assert life.state is State.WARM and str(failure) in life.message
    loads.failure = None
    await life.load_model(SPEC)
    assert life.state is State.READY and life.message == ""


async def test_a_model_that_arrives_after_the_drain_is_closed() -> None:
    loads = Loads()
    loads.go.clear()
    life = make(loads)
    load = asyncio.create_task(life.load_model(SPEC))
    await asyncio.sleep(0.01)
    assert (await life.drain(1)).drained
    loads.go.set()
    with pytest.raises(LoadFailed):
        await load
    assert life.state is State.DRAINING and loads.models[0].closed and life.model is None


async def test_roles_follow_the_newest_epoch_only() -> None:
    loads = Loads()
    life = make(loads)
    await life.load_model(SPEC)
    life.set_role(Role.PREFILL, 3)
    life.set_role(Role.PREFILL, 3)  # the answer was lost, the leader asks again
    for role, epoch in ((Role.DECODE, 3), (Role.PREFILL, 2), (Role.DECODE, 0)):
        with pytest.raises(Refused) as refused:
            life.set_role(role, epoch)
        assert refused.value.refusal is Refusal.STALE
    life.set_role(Role.DECODE, 4)
    assert loads.models[0].engine.roles == [Role.COLOCATED, Role.PREFILL, Role.DECODE]
    report = life.load_report()
    assert (report.step, report.role, report.role_epoch) == (7, Role.DECODE, 4)


async def test_a_role_set_while_loading_reaches_the_engine() -> None:
    loads = Loads()
    loads.go.clear()
    life = make(loads)
    load = asyncio.create_task(life.load_model(SPEC))
    await asyncio.sleep(0.01)
    life.set_role(Role.DECODE, 1)
    loads.go.set()
    await load
    assert loads.models[0].engine.roles[-1] is Role.DECODE


async def test_a_drain_waits_for_tasks_and_offers() -> None:
    loads, offers = Loads(), 2
    life = make(loads, lambda: offers)
    await life.load_model(SPEC)
    engine = loads.models[0].engine
    engine.active_tasks = 1
    drain = asyncio.create_task(life.drain(10))
    await asyncio.sleep(0.05)
    error = life.accepts("model@1")
    assert error is not None and error.code is ErrorCode.DRAINING and error.retryable
    assert life.load_report().draining and not drain.done()
    engine.active_tasks = 0
    await asyncio.sleep(0.05)
    assert not drain.done()
    offers = 0
    assert (await drain).drained


async def test_a_drain_gives_up_at_its_bound_and_may_be_repeated() -> None:
    loads = Loads()
    life = make(loads)
    await life.load_model(SPEC)
    loads.models[0].engine.active_tasks = 3
    result = await life.drain(0.05)
    assert not result.drained and result.tasks_left == 3
    loads.models[0].engine.active_tasks = 0
    assert (await life.drain(1)).drained


async def test_a_failed_executor_takes_nothing() -> None:
    life = make()
    life.fail("the step loop stood still")
    error = life.accepts("model@1")
    assert error is not None and error.code is ErrorCode.INTERNAL and error.retryable
    with pytest.raises(Refused):
        await life.load_model(SPEC)
    assert (await life.drain(0)).drained and life.state is State.FAILED


async def test_a_model_sleeps_and_wakes() -> None:
    loads = Loads()
    life = make(loads)
    assert (await life.sleep(1)).revision == ""  # warm: nothing is awake
    first = await life.load_model(SPEC)
    slept = await life.sleep(1)
    assert slept.revision == "model@1" and life.state is State.SLEEPING and life.model is None
    error = life.accepts("model@1")
    assert error is not None and error.code is ErrorCode.MODEL_NOT_LOADED and error.retryable
    assert life.load_report().draining and life.sleepers.revisions == ["model@1"]
    assert (await life.sleep(1)).revision == ""  # again: it sleeps already
    life.set_role(Role.DECODE, 1)
    assert await life.load_model(SPEC) is first and loads.woken == [first] and len(loads.models) == 1
    assert life.state is State.READY and life.sleepers.revisions == []
    assert loads.models[0].engine.roles[-1] is Role.DECODE


async def test_models_sleep_in_turn_and_the_longest_asleep_is_given_up() -> None:
    loads = Loads()
    life = make(loads, max_asleep=2)
    specs = [LoadSpec(f"model@{number}", "/m") for number in range(3)]
    for spec in specs:
        await life.load_model(spec)
        await life.sleep(1)
    assert life.sleepers.revisions == ["model@1", "model@2"]
    assert [model.closed for model in loads.models] == [True, False, False]
    await life.load_model(specs[1])
    assert loads.woken == [loads.models[1]] and life.sleepers.revisions == ["model@2"]


async def test_other_options_for_a_sleeping_model_are_another_load() -> None:
    loads = Loads()
    life = make(loads)
    await life.load_model(SPEC)
    await life.sleep(1)
    await life.load_model(LoadSpec(SPEC.revision, SPEC.path, kv_cache_bytes=1))
    assert loads.models[0].closed and not loads.woken and life.sleepers.revisions == []


async def test_sleeping_models_are_given_up_for_memory_and_a_failed_wake_is_a_load() -> None:
    loads = Loads()
    life = make(loads)
    for spec in (SPEC, OTHER):
        await life.load_model(spec)
        await life.sleep(1)
    loads.no_memory = 1
    await life.load_model(OTHER)  # its wake fails and takes it along, so does the other: then it is loaded
    assert life.state is State.READY and [model.closed for model in loads.models] == [True, True, False]
    await life.sleep(1)
    loads.no_memory = 9
    with pytest.raises(LoadFailed):
        await life.load_model(LoadSpec("third@1", "/m"))
    assert life.state is State.WARM and loads.models[2].closed  # nothing is left that could give memory
    loads.failure, loads.no_memory = LoadFailed(LoadReason.NOT_FOUND, "no such file"), 0
    with pytest.raises(LoadFailed):
        await life.load_model(SPEC)
    assert life.state is State.WARM


async def test_a_failed_load_leaves_the_sleepers_asleep() -> None:
    loads = Loads()
    life = make(loads)
    await life.load_model(SPEC)
    await life.sleep(1)
    loads.failure = LoadFailed(LoadReason.NOT_FOUND, "no such file")
    with pytest.raises(LoadFailed):
        await life.load_model(OTHER)
    assert life.state is State.SLEEPING and life.sleepers.revisions == ["model@1"]


async def test_a_sleep_waits_for_tasks_and_gives_up_at_its_bound() -> None:
    loads = Loads()
    life = make(loads)
    await life.load_model(SPEC)
    loads.models[0].engine.active_tasks = 2
    with pytest.raises(Refused) as refused:
        await life.sleep(0.05)
    assert refused.value.refusal is Refusal.BUSY and "2 tasks" in str(refused.value)
    assert life.state is State.READY and life.accepts("model@1") is None  # it serves on
    sleep = asyncio.create_task(life.sleep(10))
    await asyncio.sleep(0.05)
    assert not sleep.done() and life.accepts("model@1") is not None
    loads.models[0].engine.active_tasks = 0
    assert (await sleep).revision == "model@1"


async def test_a_load_waits_for_a_model_that_falls_asleep_and_wakes_it() -> None:
    loads = Loads()
    life = make(loads)
    await life.load_model(SPEC)
    loads.models[0].falls.clear()
    sleep, again = asyncio.create_task(life.sleep(1)), asyncio.create_task(life.sleep(1))
    await asyncio.sleep(0.02)
    load = asyncio.create_task(life.load_model(SPEC))
    await asyncio.sleep(0.02)
    assert life.state is State.SLEEPING and not load.done()
    loads.models[0].falls.set()
    assert (await sleep).revision == (await again).revision == "model@1"
    await load
    assert life.state is State.READY and loads.woken


async def test_a_drain_ends_a_sleep_that_waits() -> None:
    loads = Loads()
    life = make(loads)
    await life.load_model(SPEC)
    loads.models[0].engine.active_tasks = 1
    sleep = asyncio.create_task(life.sleep(10))
    await asyncio.sleep(0.02)
    assert (await life.drain(0)).tasks_left == 1
    with pytest.raises(Refused):
        await sleep
    assert life.state is State.DRAINING and life.model is not None


async def test_an_engine_whose_models_do_not_sleep_serves_on() -> None:
    loads = Loads()
    life = make(loads)
    await life.load_model(SPEC)
    loads.models[0].can_sleep = False
    with pytest.raises(Refused) as refused:
        await life.sleep(1)
    assert refused.value.refusal is Refusal.INVALID and life.accepts("model@1") is None


async def test_what_cannot_be_put_to_sleep_is_given_up() -> None:
    loads = Loads()
    life = make(loads)
    await life.load_model(SPEC)
    loads.models[0].stuck = True
    with pytest.raises(Refused):
        await life.sleep(1)
    assert life.state is State.FAILED and "does not stop" in life.message
    assert life.model is not None  # whose engine stands still: the watchdog sees that


async def test_weights_are_put_into_memory_beside_a_warm_executor() -> None:
    loads = Loads()
    life = make(loads)
    came, _ = await life.preload(SPEC)
    assert came == "built" and list(life.preloaded) == ["model@1"] and life.state is State.WARM
    await life.preload(OTHER)
    await life.preload(SPEC)
    assert list(life.preloaded) == ["other@1", "model@1"]
    loads.go.clear()
    first = asyncio.create_task(life.preload(SPEC))
    await asyncio.sleep(0.01)
    with pytest.raises(Refused) as refused:
        await life.preload(OTHER)  # one at a time
    assert refused.value.refusal is Refusal.BUSY
    load = asyncio.create_task(life.load_model(SPEC))  # does not wait for it
    await asyncio.sleep(0.01)
    assert life.state is State.LOADING
    loads.go.set()
    await asyncio.gather(first, load)
    with pytest.raises(Refused):
        await life.preload(OTHER)  # it has its model
    for failure in (LoadFailed(LoadReason.NO_MEMORY, "no room"), RuntimeError("the driver says no")):
        warm = Loads()
        warm.failure = failure
        life = make(warm)
        with pytest.raises(LoadFailed):
            await life.preload(SPEC)
        assert life.state is State.WARM and not life.preloaded


class RoleMachine(RuleBasedStateMachine):
    """Whatever leaders send, in whatever order: the highest epoch that was accepted stands."""

    def __init__(self) -> None:
        super().__init__()
        self.life = make()
        self.accepted: list[tuple[Role, int]] = [(Role.COLOCATED, 0)]

    @rule(role=st.sampled_from(Role), epoch=st.integers(0, 6))
    def set_role(self, role: Role, epoch: int) -> None:
        current = self.accepted[-1]
        try:
            self.life.set_role(role, epoch)
        except Refused:
            assert epoch <= current[1] and (role, epoch) != current
        else:
            assert epoch > current[1] or (role, epoch) == current
            self.accepted.append((role, epoch))

    @invariant()
    def stands(self) -> None:
        assert (self.life.role, self.life.role_epoch) == self.accepted[-1]


TestRoles = RoleMachine.TestCase
