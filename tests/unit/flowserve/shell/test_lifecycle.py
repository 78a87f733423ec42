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

    def close(self) -> bool:
        self.closed = True
        return True


class Loads:
    """A loader under control: each load waits for `go`, then returns or raises `failure`."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.go.set()
        self.failure: Exception | None = None
        self.models: list[FakeModel] = []

    def __call__(self, spec: LoadSpec, role: Role) -> Any:
        assert self.go.wait(10)
        if self.failure is not None:
            raise self.failure
        self.models.append(FakeModel(spec))
        return self.models[-1]


def make(loads: Callable[..., Any] | None = None, offers: Callable[[], int] = lambda: 0) -> Lifecycle:
    return Lifecycle(
        loads or Loads(),
        role=Role.COLOCATED,
        on_model=lambda model: None,
        on_change=lambda: None,
        transfers_left=offers,
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
