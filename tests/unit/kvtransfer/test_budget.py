"""The bound on bytes in flight: order, the bound itself, and cancelled waiters. Needs nothing."""

from __future__ import annotations

import asyncio
import random

import pytest

from kvtransfer.budget import ByteBudget


async def test_copies_wait_in_order_and_a_large_one_is_not_overtaken() -> None:
    budget = ByteBudget(10)
    order: list[str] = []
    go = {name: asyncio.Event() for name in "abcd"}

    async def copy(name: str, size: int) -> None:
        async with budget.hold(size):
            order.append(name)
            await go[name].wait()

    async with asyncio.TaskGroup() as group:
        for name, size in (("a", 6), ("b", 9), ("c", 1), ("d", 1000)):
            group.create_task(copy(name, size))
            await asyncio.sleep(0)
        assert (order, budget.used, budget.waiting) == (["a"], 6, 3)  # c would fit, but b is before it
        for name in "abcd":
            go[name].set()
            await asyncio.sleep(0.01)
    assert order == ["a", "b", "c", "d"] and budget.used == 0


@pytest.mark.parametrize("seed", range(20))
async def test_whatever_is_cancelled_the_bound_holds_and_nothing_is_lost(seed: int) -> None:
    rng = random.Random(seed)
    budget = ByteBudget(100)
    running = peak = 0

    async def copy(size: int) -> None:
        nonlocal running, peak
        async with budget.hold(size):
            running += min(size, 100)
            peak = max(peak, running)
            try:
                await asyncio.sleep(rng.random() * 0.002)
            finally:
                running -= min(size, 100)

    tasks = [asyncio.create_task(copy(rng.randint(1, 150))) for _ in range(60)]
    for task in rng.sample(tasks, 30):
        await asyncio.sleep(rng.random() * 0.001)
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert peak <= 100
    assert (budget.used, budget.waiting, running) == (0, 0, 0)
