"""Where the time of a decode step goes beside the executor: the engine's loop, gRPC, the gateway.

Called by `tests.bench.engine`. The same load (so many streams, the same context) is run three times: by
the engine in this process, over the worker protocol, and through the gateway. What is compared is the
time between two tokens of a stream while all streams decode and no prompt is computed: every prompt was asked
before, so that its blocks are in the prefix cache and all streams start at once. (Prompts differ between
streams: each reads KV of its own.)
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Sequence

from flowserve.engine.config import EngineConfig
from flowserve.engine.engine import Engine
from flowserve.engine.types import EngineTask, SamplingParams, StepEvent, TaskKind
from flowserve.executor.interface import ModelInfo, SequenceSlice, SliceResult
from flowserve.executor.local import LocalExecutor
from flowserve.rtc import RTC
from tests.bench import common
from tests.bench.client import Prompts, complete
from tests.support.stack import MODEL, Stack
from tests.support.worker_client import TaskRun, greedy

OUTPUT_TOKENS = 48
SECONDS = 120.0


def gap(streams: Sequence[Sequence[float]]) -> float:
    """Median seconds between tokens of a stream from the last first token to the first last one."""
    begin, end = max(s[0] for s in streams), min(s[-1] for s in streams)
    gaps = [b - a for stream in streams for a, b in itertools.pairwise(stream) if a >= begin and b <= end]
    return common.median(gaps)


def some_prompts(streams: int, context: int) -> list[list[int]]:
    """One for each stream, so long that `context` is the mean over its decode steps."""
    prompts = Prompts(time.time_ns())
    return [prompts.next(context - OUTPUT_TOKENS // 2) for _ in range(streams)]


class Watched:
    """An executor that notes when each of its calls began and ended."""

    def __init__(self, executor: LocalExecutor) -> None:
        self._executor = executor
        self.calls: list[tuple[int, float, float]] = []  # slices, begin, end

    @property
    def info(self) -> ModelInfo:
        return self._executor.info

    def execute(self, batch: Sequence[SequenceSlice]) -> list[SliceResult]:
        begin = time.perf_counter()
        results = self._executor.execute(batch)
        self.calls.append((len(batch), begin, time.perf_counter()))
        return results

    def close(self) -> None:
        """The executor stays its owner's."""

    def pause(self, streams: int) -> float:
        """Median seconds from the end of a step of `streams` slices to the begin of the next one."""
        full = [
            then[1] - now[2] for now, then in itertools.pairwise(self.calls) if now[0] == then[0] == streams
        ]
        return common.median(full)


def in_engine(executor: LocalExecutor, streams: int, context: int) -> tuple[float, float]:
    """The gap in an engine of this process, and the pause in it between two calls of the executor: all
    that scheduling, bookkeeping and handing out could save by running beside a step."""
    arrivals: dict[str, list[float]] = {}
    ended = threading.Semaphore(0)

    def on_event(event: StepEvent) -> None:
        now = time.perf_counter()
        for delta in event.deltas:
            if delta.tokens:
                arrivals.setdefault(delta.task_id, []).append(now)
            if delta.finish is not None:
                ended.release()

    prompts = some_prompts(streams, context)
    params = SamplingParams(temperature=0.0, ignore_eos=True)
    watched = Watched(executor)
    engine = Engine(watched, RTC(executor.store), EngineConfig(), handover=None, on_event=on_event)
    engine.start()
    try:
        for tokens in (1, OUTPUT_TOKENS):
            arrivals.clear()
            watched.calls.clear()
            for index, prompt in enumerate(prompts):
                task = EngineTask(f"{index}/{tokens}", 1, TaskKind.UNIFIED, prompt, params, tokens)
                engine.submit(task)
            for _ in range(streams):
                if not ended.acquire(timeout=SECONDS):
                    raise RuntimeError("the engine did not finish")
    finally:
        engine.stop()
    return gap(list(arrivals.values())), watched.pause(streams)


async def served(stack: Stack, streams: int, context: int) -> tuple[float, float]:
    """The gaps over the worker protocol and through the gateway of a 1C stack."""
    prompts = some_prompts(streams, context)
    async with stack.client(stack.executor("colocated"), "bench") as client:

        async def generate(prompt: list[int], tokens: int) -> TaskRun:
            return await client.generate(
                prompt,
                revision=stack.revision,
                max_tokens=tokens,
                sampling=greedy(ignore_eos=True),
                timeout=SECONDS,
            )

        await asyncio.gather(*(generate(prompt, 1) for prompt in prompts))
        runs = await asyncio.gather(*(generate(prompt, OUTPUT_TOKENS) for prompt in prompts))
    direct = gap([[at for at, _ in run.arrivals] for run in runs])
    # The gateway's tenant has a cache of its own: its prompts are asked before, too.
    await asyncio.gather(*(complete(stack.port, MODEL, prompt, 2) for prompt in prompts))
    samples = await asyncio.gather(*(complete(stack.port, MODEL, p, OUTPUT_TOKENS) for p in prompts))
    failed = [sample.error for sample in samples if sample.error]
    if failed:
        raise RuntimeError(f"a request failed: {failed[0]}")
    # All were sent within a few milliseconds: their times count from one moment.
    return direct, gap([[sample.first, *sample.rest] for sample in samples])
