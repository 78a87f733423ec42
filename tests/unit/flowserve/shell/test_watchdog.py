"""When an engine is given up. Needs nothing."""

from __future__ import annotations

import asyncio

import pytest

from flowserve.engine.types import LoadReport
from flowserve.shell.watchdog import MAX_STEP_FAILURES, verdict, watch


class Engine:
    def __init__(self) -> None:
        self.age = 0.0
        self.consecutive_failures = 0
        self.lost = ""

    def load(self) -> LoadReport:
        return LoadReport(step=9, running=2, age_seconds=self.age)


@pytest.mark.parametrize(("age", "given_up"), [(0.1, False), (29.9, False), (30.1, True)])
def test_a_loop_that_stands_still_is_given_up(age: float, given_up: bool) -> None:
    engine = Engine()
    engine.age = age
    reason = verdict(engine, 30.0)
    assert (reason is not None) is given_up
    if reason is not None:
        assert "step 9" in reason and "2 running" in reason


def test_single_failed_steps_are_no_reason_a_long_row_is() -> None:
    engine = Engine()
    engine.consecutive_failures = MAX_STEP_FAILURES - 1
    assert verdict(engine, 30.0) is None
    engine.consecutive_failures = MAX_STEP_FAILURES
    assert verdict(engine, 30.0) is not None


def test_an_executor_that_is_lost_is_given_up_at_once() -> None:
    engine = Engine()
    engine.lost = "rank 1 has ended"
    assert "rank 1 has ended" in str(verdict(engine, 30.0))


async def test_the_watch_returns_only_with_a_reason() -> None:
    engine: Engine | None = None
    task = asyncio.create_task(watch(lambda: engine, 0.04))
    await asyncio.sleep(0.05)
    engine = Engine()
    await asyncio.sleep(0.05)
    assert not task.done()
    engine.age = 1.0
    async with asyncio.timeout(5):
        assert "stood still" in await task
