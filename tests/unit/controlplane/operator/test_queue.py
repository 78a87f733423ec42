"""The work queue: a key once, one worker a key, failures later and later."""

from __future__ import annotations

import asyncio

import pytest

from controlplane.kube.client import Conflict, Unavailable
from controlplane.operator import queue
from controlplane.operator.queue import Controller, WorkQueue


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


async def test_a_key_waits_once_and_runs_again_if_it_was_added_meanwhile() -> None:
    work: WorkQueue[str] = WorkQueue("t")
    for _ in range(3):
        work.add("a")
    assert len(work) == 1 and await work.get() == "a"
    work.add("a")
    assert len(work) == 0  # nobody else gets it while it is worked on
    work.done("a")
    assert await work.get() == "a"
    work.done("a")
    assert len(work) == 0


async def test_failures_come_back_later_each_time_up_to_a_bound() -> None:
    clock = Clock()
    work: WorkQueue[str] = WorkQueue("t", clock=clock, rand=lambda: 0.5)
    waits = [work.failed("a") for _ in range(20)]
    assert waits[:3] == [0.05, 0.1, 0.2] and waits[-1] == queue.MAX_RETRY_SECONDS
    assert work.failed("b") == 0.05  # each key by itself
    work.succeeded("a")
    assert work.failed("a", at_least=7.0) == 7.0


async def test_the_earliest_of_several_times_counts() -> None:
    clock = Clock()
    work: WorkQueue[str] = WorkQueue("t", clock=clock)
    work.add_after("a", 50.0)
    work.add_after("a", 5.0)
    work.add_after("a", 20.0)
    clock.now = 6.0
    assert await work.get() == "a"
    work.done("a")
    clock.now = 100.0
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(work.get(), 0.05)


async def test_one_failing_key_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "FIRST_RETRY_SECONDS", 0.001)
    seen: dict[str, int] = {"good": 0, "bad": 0, "broken": 0}
    done = asyncio.Event()

    async def reconcile(key: str) -> float | None:
        seen[key] += 1
        if key == "bad" and seen[key] < 4:
            raise Conflict(409, "Conflict", "changed")
        if key == "broken" and seen[key] < 3:
            raise ValueError("a bug")
        if seen["bad"] >= 4 and seen["broken"] >= 3 and seen["good"]:
            done.set()
        return None

    controller: Controller[str] = Controller("t", reconcile, workers=2)
    task = asyncio.create_task(controller.run())
    for key in seen:
        controller.queue.add(key)
    await asyncio.wait_for(done.wait(), 10)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert seen == {"good": 1, "bad": 4, "broken": 3}


async def test_the_servers_word_on_when_to_come_again_is_heeded() -> None:
    async def reconcile(key: str) -> float | None:
        raise Unavailable(429, "TooManyRequests", "slow down", 30.0)

    controller: Controller[str] = Controller("t", reconcile)
    task = asyncio.create_task(controller.run())
    controller.queue.add("a")
    await asyncio.sleep(0.05)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    (due,) = controller.queue._due.values()
    assert due - controller.queue._clock() > 25
