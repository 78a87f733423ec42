"""Part of tests.bench.scale: as many executors again start while the first ones serve."""

from __future__ import annotations

import asyncio
import os
import random
import time
from dataclasses import dataclass, field

from controlplane.local.executors import Executor
from controlplane.local.starts import Node, StartFailed
from tests.bench import common

KV_BYTES = 16 << 20
TOKENS = 48  # of a request
LOAD = 0.45  # of the machine's cores, counted in requests that had one to themselves


@dataclass(slots=True)
class Load:
    """Requests at random times to random executors; what became of them."""

    made: Node
    executors: list[Executor]
    rate: float  # requests a second
    gaps: list[float] = field(default_factory=list)  # mean seconds between tokens, by request
    failed: int = 0

    async def run(self, until: asyncio.Event) -> None:
        random_ = random.Random(7)
        async with asyncio.TaskGroup() as group:
            while not until.is_set():
                group.create_task(self._one(random_.choice(self.executors)))
                await asyncio.sleep(random_.expovariate(self.rate))

    async def _one(self, executor: Executor) -> None:
        try:
            came = await self.made.generate(executor, TOKENS)
            self.gaps.append((came[-1] - came[0]) / (len(came) - 1))
        except StartFailed as error:
            print(f"failed: {error}")
            self.failed += 1


async def live(made: Node, report: common.Report, count: int, seconds: float) -> tuple[float, int]:
    """P99 of the time between tokens while as many executors again start, over that before; and failures."""
    executors = [made.add(forked=True) for _ in range(count)]
    await asyncio.gather(*(made.first_token(executor, KV_BYTES) for executor in executors))
    one = common.median([await _timed(made, executor) for executor in executors[:5]])
    rate = LOAD * (os.cpu_count() or 1) / one
    found: list[Load] = []
    more: list[Executor] = []
    started = 0.0
    for growing in (False, True):
        load, until = Load(made, executors, rate), asyncio.Event()
        running = asyncio.create_task(load.run(until))
        began = time.perf_counter()
        if growing:
            for _ in range(count):
                executor = made.add(forked=True)
                await made.first_token(executor, KV_BYTES)
                more.append(executor)
            started = time.perf_counter() - began
        await asyncio.sleep(max(0.0, seconds - (time.perf_counter() - began)))
        until.set()
        await running
        found.append(load)
    p99 = [common.percentile(load.gaps, 99) for load in found]
    for name, load, value in zip(("before", "while as many start"), found, p99, strict=True):
        report.add(
            live=name, executors=count, requests=len(load.gaps), failed=load.failed,
            tpot_ms_p50=common.percentile(load.gaps, 50) * 1e3, tpot_ms_p99=value * 1e3,
            load=LOAD, started_s=started if load is found[1] else 0.0,
        )  # fmt: skip
    await asyncio.gather(*(made.remove(executor) for executor in [*executors, *more]))
    return p99[1] / p99[0], sum(load.failed for load in found)


async def _timed(made: Node, executor: Executor) -> float:
    started = time.perf_counter()
    await made.generate(executor, TOKENS)
    return time.perf_counter() - started
