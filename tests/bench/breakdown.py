"""Where the time of a decode step goes beside the executor: the engine's loop, gRPC, the gateway.

Called by `tests.bench.engine`. The same load (so many streams, the same context) is run three times: by
the engine in this process, over the worker protocol, and through the gateway. What is compared is the
time between two tokens of a stream while all streams decode and no prompt is computed.
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
from flowserve.executor.local import LocalExecutor
from flowserve.rtc import RTC
from tests.bench import common
from tests.bench.client import Prompts, batch, complete
from tests.support.stack import MODEL, Stack
from tests.support.worker_client import greedy

OUTPUT_TOKENS = 48
SECONDS = 120.0


def gap(streams: Sequence[Sequence[float]]) -> float:
    """Median seconds between tokens of a stream from the last first token to the first last one."""
    begin, end = max(s[0] for s in streams), min(s[-1] for s in streams)
    gaps = [b - a for stream in streams for a, b in itertools.pairwise(stream) if a >= begin and b <= end]
    return common.median(gaps)


def in_engine(executor: LocalExecutor, streams: int, context: int) -> float:
    """The gap in an engine of this process. `context` is the mean over the tokens."""
    arrivals: dict[str, list[float]] = {}
    ended = threading.Semaphore(0)

    def on_event(event: StepEvent) -> None:
        now = time.perf_counter()
        for delta in event.deltas:
            if delta.tokens:
                arrivals.setdefault(delta.task_id, []).append(now)
            if delta.finish is not None:
                ended.release()

    engine = Engine(executor, RTC(executor.store), EngineConfig(), handover=None, on_event=on_event)
    engine.start()
    try:
        prompts = Prompts(time.time_ns())
        params = SamplingParams(temperature=0.0, ignore_eos=True)
        for index in range(streams):
            prompt = prompts.next(context - OUTPUT_TOKENS // 2)
            engine.submit(EngineTask(str(index), 1, TaskKind.UNIFIED, prompt, params, OUTPUT_TOKENS))
        for _ in range(streams):
            if not ended.acquire(timeout=SECONDS):
                raise RuntimeError("the engine did not finish")
    finally:
        engine.stop()
    return gap(list(arrivals.values()))


async def served(stack: Stack, streams: int, context: int) -> tuple[float, float]:
    """The gaps over the worker protocol and through the gateway of a 1C stack."""
    prompts = Prompts(time.time_ns())
    length = context - OUTPUT_TOKENS // 2
    async with stack.client(stack.executor("colocated"), "bench") as client:
        runs = await asyncio.gather(
            *(
                client.generate(
                    prompts.next(length),
                    revision=stack.revision,
                    max_tokens=OUTPUT_TOKENS,
                    sampling=greedy(ignore_eos=True),
                    timeout=SECONDS,
                )
                for _ in range(streams)
            )
        )
    direct = gap([[at for at, _ in run.arrivals] for run in runs])
    samples, _ = await batch(
        lambda: complete(stack.port, MODEL, prompts.next(length), OUTPUT_TOKENS), streams, streams
    )
    failed = [sample.error for sample in samples if sample.error]
    if failed:
        raise RuntimeError(f"a request failed: {failed[0]}")
    # All were sent within a few milliseconds: their times count from one moment.
    return direct, gap([[sample.first, *sample.rest] for sample in samples])
