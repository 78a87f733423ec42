"""Serving end to end: TTFT, TPOT and tokens/s for 1C and 1P1D, and what the gateway itself adds.

    python -m tests.bench.serve [--quick] [--json PATH]

Two stacks, 1C (all cores) and 1P1D (the cores shared out), are started as a user starts them and
measured in turn, so that a machine that slows down slows both. "Direct" drives the same executors over
the worker protocol with ready-made token ids: no gateway, template, tokenizer, job executor or SSE. The
gateway's added latency is the difference of means of the two, alternating in one run; percentiles are
never subtracted. Prompts differ between requests, so that no prefix is found in a cache.

The client runs on the same cores as everything else and takes its share of them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager

from deepflow.v1 import common_pb2

from tests.bench import common
from tests.bench.client import Prompts, Sample, batch, complete
from tests.support.stack import MODEL, Stack, running_stack
from tests.support.worker_client import WorkerClient, generate_disaggregated, greedy

PROMPT_TOKENS = 128
OUTPUT_TOKENS = 64
CONCURRENCY = (1, 8, 32)
TOPOLOGIES = ("1C", "1P1D")
START_SECONDS = 15.0  # the aim for a second start
STREAMS = 128  # the load aim
LOAD_SECONDS = 120.0


async def through_gateway(stack: Stack, prompt: Sequence[int]) -> Sample:
    return await complete(stack.port, MODEL, prompt, OUTPUT_TOKENS)


async def direct(clients: dict[str, WorkerClient], revision: str, prompt: Sequence[int]) -> Sample:
    started = time.perf_counter()
    sampling = greedy(ignore_eos=True)
    if "prefill" in clients:
        run = await generate_disaggregated(
            clients["prefill"], clients["decode"], prompt, revision=revision,
            max_tokens=OUTPUT_TOKENS, sampling=sampling, timeout=600,
        )  # fmt: skip
    else:
        run = await clients["colocated"].generate(
            prompt, revision=revision, max_tokens=OUTPUT_TOKENS, sampling=sampling, timeout=600
        )
    if run.finish != common_pb2.FINISH_REASON_LENGTH:
        return Sample(0.0, error=str(run.error))
    times = [at - started for at, _ in run.arrivals]
    return Sample(times[0], times[1:], len(run.tokens))


@asynccontextmanager
async def connected(stack: Stack) -> AsyncIterator[dict[str, WorkerClient]]:
    """A client of each executor, by role."""
    async with AsyncExitStack() as opened:
        yield {
            te["role"]: await opened.enter_async_context(stack.client(te, "bench"))
            for te in stack.executors()
        }


async def measure(
    args: object, report: common.Report, stacks: dict[str, Stack], opened: AsyncExitStack
) -> None:
    quick = args.quick  # type: ignore[attr-defined]  # argparse namespace
    rounds = 1 if quick else 5
    concurrency = (1, 8) if quick else CONCURRENCY
    prompts = Prompts(int(time.time()))
    figures: dict[tuple[str, int, str], list[tuple[list[Sample], float]]] = {}
    asks: dict[str, dict[str, Callable[[], Awaitable[Sample]]]] = {}
    for name, stack in stacks.items():
        clients = await opened.enter_async_context(connected(stack))
        asks[name] = {
            "gateway": lambda s=stack: through_gateway(s, prompts.next(PROMPT_TOKENS)),  # type: ignore[misc]
            "direct": lambda s=stack, c=clients: direct(c, s.revision, prompts.next(PROMPT_TOKENS)),  # type: ignore[misc]
        }
        await batch(asks[name]["gateway"], 2, 2)  # buffers and cost models get warm
    for round_number in range(rounds):
        for level in concurrency:
            requests = level if quick else max(4, level)
            for name, ways in asks.items():
                for way in list(ways) if round_number % 2 == 0 else reversed(ways):
                    run = await batch(ways[way], level, requests)
                    figures.setdefault((name, level, way), []).append(run)
    errors = 0
    for (name, level, way), runs in sorted(
        figures.items(), key=lambda item: (item[0][1], item[0][0], item[0][2])
    ):
        samples = [sample for run, _ in runs for sample in run]
        good = [sample for sample in samples if not sample.error]
        errors += len(samples) - len(good)
        report.add(
            topology=name,
            concurrency=level,
            way=way,
            requests=len(samples),
            errors=len(samples) - len(good),
            ttft_ms_p50=1e3 * common.median([s.first for s in good]),
            ttft_ms_p99=1e3 * common.percentile([s.first for s in good], 99),
            ttft_ms_mean=1e3 * common.mean([s.first for s in good]),
            tpot_ms_p50=1e3 * common.median([s.per_token for s in good]),
            tpot_ms_mean=1e3 * common.mean([s.per_token for s in good]),
            tokens_per_s=common.median(
                [sum(s.tokens for s in run if not s.error) / wall for run, wall in runs]
            ),
        )
    rows = {(r["topology"], r["concurrency"], r["way"]): r for r in report.rows}
    for name in stacks:
        for level in concurrency:
            through, bare = rows[name, level, "gateway"], rows[name, level, "direct"]
            for what in ("ttft", "tpot"):
                added = through[f"{what}_ms_mean"] - bare[f"{what}_ms_mean"]  # type: ignore[operator]
                report.check(
                    f"gateway's added mean {what.upper()}, {name}, concurrency {level}",
                    added, "ms", "stated, no bound yet", None,
                )  # fmt: skip
    report.check("requests that failed", float(errors), "requests", "0", errors == 0)


async def load(report: common.Report, stack: Stack) -> None:
    """128 streams at once for two minutes: errors and the longest silence of any stream."""
    prompts = Prompts(1)
    ends = time.perf_counter() + LOAD_SECONDS
    samples: list[Sample] = []

    async def client() -> None:
        while time.perf_counter() < ends:
            samples.append(await through_gateway(stack, prompts.next(PROMPT_TOKENS)))

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(STREAMS)))
    wall = time.perf_counter() - started
    good = [sample for sample in samples if not sample.error]
    gap = max(sample.longest_gap for sample in good)
    report.add(
        topology="1P1D", concurrency=STREAMS, way="gateway", requests=len(samples),
        errors=len(samples) - len(good), ttft_ms_p50=1e3 * common.median([s.first for s in good]),
        ttft_ms_p99=1e3 * common.percentile([s.first for s in good], 99),
        ttft_ms_mean=1e3 * common.mean([s.first for s in good]),
        tpot_ms_p50=1e3 * common.median([s.per_token for s in good]),
        tpot_ms_mean=1e3 * common.mean([s.per_token for s in good]),
        tokens_per_s=sum(s.tokens for s in good) / wall,
    )  # fmt: skip
    failed = float(len(samples) - len(good))
    report.check(f"errors with {STREAMS} streams for 2 min", failed, "requests", "0", not failed)
    report.check(f"longest silence with {STREAMS} streams", gap, "s", "< 60 (stall deadline)", gap < 60)


async def main() -> int:
    args = common.parser(__doc__.splitlines()[0]).parse_args()
    report = common.Report("serve")
    with ExitStack() as opened:
        stacks: dict[str, Stack] = {}
        second = 0.0
        for name in TOPOLOGIES:
            started = time.perf_counter()
            stacks[name] = opened.enter_context(running_stack(name, "--kv-cache-bytes", "512M"))
            second = time.perf_counter() - started
        async with AsyncExitStack() as clients:
            await measure(args, report, stacks, clients)
        names = [check.name for check in report.checks]
        assert len(names) == len(set(names))
        if args.quick:
            report.check(f"errors with {STREAMS} streams for 2 min", None, "requests", "0", None)
            report.check(f"longest silence with {STREAMS} streams", None, "s", "< 60 (stall deadline)", None)
        else:
            await load(report, stacks["1P1D"])
        report.check("start with model and packages in place", second, "s", f"< {START_SECONDS:.0f}",
                     second < START_SECONDS)  # fmt: skip
    return report.finish(args.json)


if __name__ == "__main__":
    common.run(main())
