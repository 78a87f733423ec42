"""The gateway alone, against a token source that speaks the worker protocol; beside Rust front ends.

    python -m tests.bench.gateway [--quick] [--json PATH]        latency, throughput, 1,000 streams, memory
    python -m tests.bench.gateway --profile         the ten costliest functions per token, per request
    python -m tests.bench.gateway --peers FOLDER    beside Dynamo's frontend and vllm-router
    python -m tests.bench.gateway --soak            1,000 streams for 2 minutes, slow and leaving clients
    python -m tests.bench.gateway --processes       two gateway processes on one port beside one

"Direct" drives the same source over the worker protocol with ready-made token ids. What the gateway adds is
the difference of the means of the two, alternating in one run; percentiles are never subtracted. Clients
begin at random moments: a source with steps would hide what does not pass over to the next step.

Peers live in virtual environments FOLDER/dynamo and FOLDER/vllm-router (also $DEEPFLOW_PEERS);
docs/benchmarks.md says how to make them. One that is absent is reported as skipped. Client, source and
gateway share the cores.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import pstats
import random
import re
import signal
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from tests.bench import common
from tests.bench.gateway_peers import PROMPT_WORDS, STREAMS, peers
from tests.bench.gateway_rig import (
    REVISION,
    Answer,
    Rig,
    Stream,
    chat_request,
    closed_loop,
    rig,
)
from tests.support.worker_client import WorkerClient, greedy

STEP_SECONDS = 0.02  # of the paced source: 50 tokens a second and stream
MANY = 1000
MANY_STEP_SECONDS = 0.25  # so that 1,000 streams are 4,000 tokens a second
SOAK_SECONDS = 120.0
SLOW_SHARE, LEAVING_SHARE = 0.10, 0.05


# -- added latency ---------------------------------------------------------------------------------------


async def latency(report: common.Report, opened: Rig, *, rounds: int, tokens: int) -> None:
    """64 streams at a fixed rate, through the gateway and directly, in turn."""
    rng = random.Random(1)
    samples: dict[str, list[tuple[float, float]]] = {"gateway": [], "direct": []}
    failed = 0
    client = WorkerClient(
        opened.source_address, "secret", "direct", tasks_address=opened.source_tasks_address
    )
    async with client:

        async def direct(number: int) -> tuple[float, float] | None:
            prompt = [1000 + (number * 7 + i) % 40_000 for i in range(200)]
            started = time.perf_counter()
            run = await client.generate(
                prompt, revision=REVISION, max_tokens=tokens, sampling=greedy(ignore_eos=True)
            )
            first, last = run.arrivals[0][0], run.arrivals[-1][0]
            return first - started, (last - first) / (tokens - 1)

        async def through(number: int) -> tuple[float, float] | None:
            connection = connections[number % STREAMS]
            request = chat_request(words=PROMPT_WORDS, max_tokens=tokens, seed=number)
            answer = await connection.ask(opened.port, request)
            if not answer.ok or answer.tokens != tokens:
                return None
            # The last event before the usage event: the finish comes with the last token.
            return answer.first - answer.started, (answer.last - answer.first) / (tokens - 1)

        async def batch(way: Callable[[int], Awaitable[tuple[float, float] | None]], first: int) -> None:
            nonlocal failed

            async def one(number: int) -> None:
                nonlocal failed
                await asyncio.sleep(rng.random() * 0.3)
                sample = await way(number)
                if sample is None:
                    failed += 1
                else:
                    samples["gateway" if way is through else "direct"].append(sample)

            await asyncio.gather(*(one(first + i) for i in range(STREAMS)))

        connections = [Stream() for _ in range(STREAMS)]
        await batch(through, 0)  # warm
        samples = {"gateway": [], "direct": []}
        for turn in range(rounds):
            for way in (through, direct) if turn % 2 else (direct, through):
                await batch(way, (turn + 1) * 1000)
        for connection in connections:
            connection.close()
    means = {}
    for way, found in samples.items():
        firsts, rests = [f for f, _ in found], [r for _, r in found]
        means[way] = common.mean(firsts), common.mean(rests)
        report.add(
            what=f"{STREAMS} streams at {1 / STEP_SECONDS:.0f} tok/s each", way=way, requests=len(found),
            ttft_ms_mean=1e3 * common.mean(firsts), ttft_ms_p50=1e3 * common.median(firsts),
            ttft_ms_p99=1e3 * common.percentile(firsts, 99), itl_ms_mean=1e3 * common.mean(rests),
        )  # fmt: skip
    ttft, itl = (1e3 * (means["gateway"][i] - means["direct"][i]) for i in (0, 1))
    report.check(f"added mean TTFT at {STREAMS} streams", ttft, "ms", "<= 3", ttft <= 3)
    report.check(f"added mean inter-token time at {STREAMS} streams", itl, "ms", "<= 0.3", itl <= 0.3)
    report.check(f"requests lost at {STREAMS} streams", float(failed), "requests", "0", failed == 0)


# -- throughput ------------------------------------------------------------------------------------------


async def throughput(
    report: common.Report, opened: Rig, *, seconds: float, name: str, streams: int = STREAMS
) -> float:
    """Long streams at full speed: tokens/s through the gateway and what it burns for them."""
    tokens = 500
    ends = time.perf_counter() + seconds
    done: list[Answer] = []
    lost = 0

    async def one(number: int) -> None:
        nonlocal lost
        connection = Stream()
        turn = 0
        while time.perf_counter() < ends:
            turn += 1
            request = chat_request(words=20, max_tokens=tokens, seed=number + 1000 * turn)
            answer = await connection.ask(opened.port, request)
            lost += not answer.ok or answer.tokens != tokens
            done.append(answer)
        connection.close()

    cpu, source_cpu, mine, started = (
        opened.cpu(),
        opened.source.cpu(),
        time.process_time(),
        time.perf_counter(),
    )
    await asyncio.gather(*(one(number) for number in range(streams)))
    wall = time.perf_counter() - started
    made = sum(answer.tokens for answer in done)
    rate, burnt = made / wall, opened.cpu() - cpu
    report.add(
        what=name, streams=streams, requests=len(done), tokens_per_s=rate, gateway_cores=burnt / wall,
        tokens_per_event=made / max(1, sum(answer.events for answer in done)),
        us_per_token=1e6 * burnt / made, source_cores=(opened.source.cpu() - source_cpu) / wall,
        client_cores=(time.process_time() - mine) / wall,
    )  # fmt: skip
    report.check(f"{name}: answers lost", float(lost), "answers", "0", lost == 0)
    return rate


async def many(report: common.Report, opened: Rig, *, tokens: int) -> None:
    """1,000 streams at once: nothing lost, and what an open stream holds in memory."""
    await closed_loop(opened.port, 64, 128, words=PROMPT_WORDS, max_tokens=2)
    before, cpu, started = opened.rss(), opened.cpu(), time.perf_counter()
    highest = before

    async def watch() -> None:
        nonlocal highest
        while True:
            await asyncio.sleep(0.2)
            highest = max(highest, opened.rss())

    watcher = asyncio.create_task(watch())
    answers, wall = await closed_loop(opened.port, MANY, MANY, words=PROMPT_WORDS, max_tokens=tokens)
    watcher.cancel()
    lost = sum(not answer.ok or answer.tokens != tokens for answer in answers)
    good = [answer for answer in answers if answer.ok]
    report.add(
        what=f"{MANY} streams at {1 / MANY_STEP_SECONDS:.0f} tok/s each", requests=len(answers), streams=MANY,
        ttft_ms_mean=1e3 * common.mean([a.first - a.started for a in good]),
        ttft_ms_p99=1e3 * common.percentile([a.first - a.started for a in good], 99),
        tokens_per_s=sum(a.tokens for a in good) / wall,
        gateway_cores=(opened.cpu() - cpu) / (time.perf_counter() - started),
    )  # fmt: skip
    report.check(f"answers lost of {MANY} at once", float(lost), "answers", "0", lost == 0)
    report.check("memory per open stream", (highest - before) / MANY / 1024, "KiB", "stated", None)


# -- soak ------------------------------------------------------------------------------------------------


async def soak(report: common.Report, opened: Rig, seconds: float) -> None:
    """1,000 streams, one in ten of the clients slow, one in twenty leaving in mid-answer."""
    tokens = 120
    # As many streams before, so that what is kept for good (words, the allocator's arenas) is there already.
    await closed_loop(opened.port, MANY, 3 * MANY, words=50, max_tokens=4, first_seed=1_000_000)
    ends = time.perf_counter() + seconds
    counts = {"well": 0, "slow": 0, "left": 0, "lost": 0}
    gaps: list[float] = []
    memory: list[tuple[float, int]] = []

    async def one(number: int) -> None:
        rng = random.Random(number)
        share = number / MANY
        slow = 2.0 if share < SLOW_SHARE else 0.0
        leaves = SLOW_SHARE <= share < SLOW_SHARE + LEAVING_SHARE
        await asyncio.sleep(rng.random() * 5)
        connection = Stream()
        turn = 0
        while time.perf_counter() < ends:
            turn += 1
            request = chat_request(words=50, max_tokens=tokens, seed=number + MANY * turn)
            answer = await connection.ask(
                opened.port, request, slow=slow, stop_after=rng.randrange(1, 60) if leaves else 0
            )
            if leaves:
                counts["left"] += 1
                continue
            counts["slow" if slow else "well"] += 1
            counts["lost"] += not answer.ok or answer.tokens != tokens
            if not slow:
                gaps.append(answer.longest_gap)
        connection.close()

    async def watch() -> None:
        while True:
            memory.append((time.perf_counter(), opened.rss()))
            await asyncio.sleep(1)

    watcher = asyncio.create_task(watch())
    cpu, started = opened.cpu(), time.perf_counter()
    await asyncio.gather(*(one(number) for number in range(MANY)))
    wall = time.perf_counter() - started
    watcher.cancel()
    settled = [size for at, size in memory if started + 0.3 * seconds < at < ends]
    quarter = max(1, len(settled) // 4)
    early, late = common.mean(settled[:quarter]), common.mean(settled[-quarter:])
    growth = (late - early) / early * 100
    report.add(
        what=f"{MANY} streams, {seconds:.0f} s", answers=counts["well"], slow=counts["slow"],
        left=counts["left"],
        gateway_cores=(opened.cpu() - cpu) / wall, rss_mib_early=early / 2**20, rss_mib_late=late / 2**20,
        gap_ms_p50=1e3 * common.median(gaps), gap_ms_max=1e3 * max(gaps, default=0.0),
    )  # fmt: skip
    told = seconds >= SOAK_SECONDS
    stall = max(gaps, default=0.0)
    report.check("answers lost among slow and leaving clients", float(counts["lost"]), "answers", "0",
                 counts["lost"] == 0)  # fmt: skip
    report.check("longest silence of a reading client", stall, "s", f"< {8 * MANY_STEP_SECONDS:g} (8 steps)",
                 stall < 8 * MANY_STEP_SECONDS)  # fmt: skip
    report.check("growth of memory, first to last quarter", growth, "%", "< 5", growth < 5 if told else None)


# -- profile ---------------------------------------------------------------------------------------------


async def profile(report: common.Report) -> None:
    """The ten costliest functions of long streams, and of requests of one token."""
    for unit, tokens, requests in (("token", 400, 192), ("request", 1, 3000)):
        with (
            tempfile.TemporaryDirectory(prefix="dfb-") as folder,
            rig(
                token_seconds=0,
                module="tests.bench.gateway_profiled",
                env={"DEEPFLOW_BENCH_PROFILE": f"{folder}/profile"},
            ) as opened,
        ):
            gateway = opened.gateways[0]
            await closed_loop(opened.port, 16, 64, words=PROMPT_WORDS, max_tokens=4)
            gateway.signal(signal.SIGUSR1)
            answers, _ = await closed_loop(
                opened.port, STREAMS, requests, words=PROMPT_WORDS, max_tokens=tokens, first_seed=10_000
            )
            gateway.signal(signal.SIGUSR2)
            target = Path(folder) / "profile"
            for _ in range(200):
                if target.exists():
                    break
                await asyncio.sleep(0.05)
            units = sum(answer.tokens for answer in answers) if unit == "token" else len(answers)
            _costliest(report, target, unit, units)


def _costliest(report: common.Report, path: Path, unit: str, units: int) -> None:
    stats = pstats.Stats(str(path))
    rows = []
    for (file, line, name), (_, calls, own, whole, _) in stats.stats.items():  # type: ignore[attr-defined]  # typeshed lacks it
        short = re.sub(r".*/(site-packages|controlplane|lib/python[\d.]+)/", r"\1/", file)
        if "loop" in name and "run" in name:
            continue  # waits for events
        rows.append((own, whole, calls, f"{short}:{line}({name})" if line else name))
    rows.sort(reverse=True)
    total = sum(row[0] for row in rows)
    report.add(per=unit, function="all of them", us=1e6 * total / units)
    for own, whole, calls, name in rows[:10]:
        report.add(per=unit, function=name[-80:], us=1e6 * own / units, us_with_callees=1e6 * whole / units,
                   calls=calls / units)  # fmt: skip


# -- main ------------------------------------------------------------------------------------------------


async def processes(report: common.Report, *, quick: bool) -> None:
    """One process beside two on the same port, in turn."""
    rates: dict[int, list[float]] = {1: [], 2: []}
    for turn in range(1 if quick else 3):
        for count in (1, 2) if turn % 2 == 0 else (2, 1):
            with rig(token_seconds=0, gateways=count) as opened:
                await closed_loop(opened.port, 16, 64, words=20, max_tokens=4)
                name = f"{count} process{'es' * (count > 1)}"
                rates[count].append(await throughput(report, opened, seconds=8, name=name))
    ratio = common.median(rates[2]) / common.median(rates[1])
    # Source and client need about a core themselves: two processes have nowhere to run on fewer than four.
    told = (os.cpu_count() or 1) >= 4
    report.check("two processes / one", ratio, "x", ">= 1.8", ratio >= 1.8 if told else None)


async def main() -> int:
    parser = common.parser(__doc__.splitlines()[0])
    parser.add_argument("--profile", action="store_true", help="the ten costliest functions")
    parser.add_argument("--soak", action="store_true", help=f"{MANY} streams for {SOAK_SECONDS:.0f} s")
    parser.add_argument("--processes", action="store_true", help="two gateway processes beside one")
    parser.add_argument("--peers", metavar="FOLDER", nargs="?",
                        const=os.environ.get("DEEPFLOW_PEERS", ""),
                        help="virtual environments of Dynamo and vllm-router")  # fmt: skip
    args: argparse.Namespace = parser.parse_args()
    report = common.Report("gateway")
    quick = args.quick
    if args.profile:
        await profile(report)
    if args.peers is not None:
        await peers(report, args.peers, quick=quick)
    if args.processes:
        await processes(report, quick=quick)
    if args.soak:
        with rig(token_seconds=MANY_STEP_SECONDS) as opened:
            await soak(report, opened, 20 if quick else SOAK_SECONDS)
    if not (args.profile or args.soak or args.processes or args.peers is not None):
        with rig(token_seconds=STEP_SECONDS) as opened:
            await latency(report, opened, rounds=2 if quick else 8, tokens=50)
        with rig(token_seconds=0) as opened:
            await closed_loop(opened.port, 16, 64, words=20, max_tokens=4)
            for _ in range(1 if quick else 3):
                await throughput(report, opened, seconds=4 if quick else 8, name="full speed")
        with rig(token_seconds=MANY_STEP_SECONDS) as opened:
            await many(report, opened, tokens=20 if quick else 60)
    return report.finish(args.json)


if __name__ == "__main__":
    common.run(main())
