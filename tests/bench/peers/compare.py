"""This engine beside its peers: one client, one API, the same weights, cell by cell in turn.

Called by `tests.bench.engine --peers`. A cell is a prompt length, an output length and a concurrency; a run
of a cell is one wave of requests, all sent at once. Every round runs every cell on every engine, in an order
that turns, so that a machine that slows down slows all; ratios are taken within a round.

Long tables can be measured in short windows: `--hold FILE` starts the servers and keeps them, `--running
FILE` measures on them, `--samples FILE` adds the runs to a file and reports over all of it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson

from controlplane.nodeagent.sources import fetch
from controlplane.nodeagent.uri import DEFAULT_MODEL_URI
from tests.bench import common
from tests.bench.client import Prompts, batch, complete
from tests.bench.peers import servers
from tests.bench.peers.servers import Server

OURS = ("bf16", "int8", "int4")  # weight precisions of this engine
QUICK_PEERS = ("llama.cpp-bf16", "llama.cpp-q8")  # vLLM alone takes half a minute to start
PEERS = ("vllm-bf16", "vllm-f32", "llama.cpp-bf16", "llama.cpp-q8", "llama.cpp-q4")
ROUNDS = 5
SEQUENTIAL_REQUESTS = 2  # a run at concurrency 1: one after the other


@dataclass(frozen=True, slots=True)
class Cell:
    prompt: int  # tokens
    output: int  # tokens
    concurrency: int

    def __str__(self) -> str:
        return f"{self.prompt}/{self.output}@{self.concurrency}"

    @classmethod
    def parse(cls, text: str) -> Cell:
        found = re.fullmatch(r"(\d+)/(\d+)@(\d+)", text)
        if found is None:
            raise argparse.ArgumentTypeError(f"{text!r} is not PROMPT/OUTPUT@CONCURRENCY")
        return cls(*map(int, found.groups()))


CELLS = tuple(Cell(*shape, streams) for shape in ((128, 64), (512, 128)) for streams in (1, 8, 16, 32))
QUICK_CELLS = (Cell(128, 16, 1), Cell(128, 16, 8))


@dataclass(frozen=True, slots=True)
class Run:
    """One wave: medians over its requests, milliseconds; output tokens a second of the whole wave."""

    engine: str
    cell: str
    round: int
    requests: int
    errors: int
    ttft_ms: float
    tpot_ms: float
    tokens_per_s: float
    other_work: float = 0.0  # share of the machine that went elsewhere meanwhile

    @property
    def disturbed(self) -> bool:
        return self.other_work > common.MOST_OTHER_WORK


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("beside the peers")
    group.add_argument("--peers", action="store_true", help="measure against vLLM and llama.cpp")
    group.add_argument("--ours", nargs="*", choices=OURS, help="our weight precisions (default all)")
    group.add_argument("--against", nargs="*", choices=PEERS, help="default all; with --quick not vLLM")
    group.add_argument("--cells", nargs="*", type=Cell.parse, help="PROMPT/OUTPUT@CONCURRENCY …")
    group.add_argument("--hold", metavar="FILE", help="start the servers, describe them in FILE, wait")
    group.add_argument("--running", metavar="FILE", help="measure on servers held by --hold")
    group.add_argument("--samples", metavar="FILE", help="add the runs to FILE, report over all in it")


def start(stack: contextlib.ExitStack, args: argparse.Namespace) -> list[Server]:
    """Starts what was asked for; a peer that is not installed is left out, visibly."""
    started = []
    model = fetch(DEFAULT_MODEL_URI).path
    slots = max(cell.concurrency for cell in CELLS)
    for precision in args.ours:
        opened = servers.deepflow(precision, args.threads)
        started.append(stack.enter_context(opened))
    for peer in args.against:
        name, precision = peer.rsplit("-", 1)
        try:
            if name == "vllm":
                opened = servers.vllm(precision, args.threads, compiled=not args.quick)
            else:
                opened = servers.llamacpp(precision, args.threads, model, slots)
            started.append(stack.enter_context(opened))
        except servers.Missing as reason:
            print(f"LEFT OUT: {reason}", file=sys.stderr)
    for server in started:
        print(f"{label(server)} {server.version} on port {server.port}, up in {server.start_seconds:.1f} s"
              f" {server.notes}", flush=True)  # fmt: skip
    return started


def label(server: Server) -> str:
    return f"{server.name}-{server.precision}"


async def run_cell(server: Server, cell: Cell, prompts: Prompts, number: int, pids: Sequence[int]) -> Run:
    other_work = common.OtherWork(pids)
    requests = max(SEQUENTIAL_REQUESTS, cell.concurrency)
    samples, wall = await batch(
        lambda: complete(server.port, server.model, prompts.next(cell.prompt), cell.output),
        cell.concurrency,
        requests,
    )
    good = [sample for sample in samples if not sample.error]
    for sample in samples:
        if sample.error:
            print(f"{label(server)} {cell}: {sample.error}", file=sys.stderr)
    return Run(
        engine=label(server),
        cell=str(cell),
        round=number,
        requests=requests,
        errors=requests - len(good),
        ttft_ms=1e3 * common.median([s.first for s in good]),
        tpot_ms=1e3 * common.median([s.per_token for s in good]),
        tokens_per_s=sum(s.tokens for s in good) / wall,
        other_work=other_work.share(),
    )


async def measure(
    found: Sequence[Server], cells: Sequence[Cell], rounds: int, samples: common.Samples[Run]
) -> None:
    """All runs: every round, every cell on every engine."""
    prompts = Prompts(time.time_ns())
    first = time.time_ns()  # rounds of several calls stay apart in one file of samples
    pids = [pid for server in found for pid in server.pids]
    for server in found:  # buffers get warm, graphs get compiled
        await batch(lambda s=server: complete(s.port, s.model, prompts.next(32), 4), 2, 2)  # type: ignore[misc]
    for number in range(rounds):
        turned = [*found[number % len(found) :], *found[: number % len(found)]]
        for cell in cells:
            for server in turned:
                samples.add(await run_cell(server, cell, prompts, first + number, pids))


def rows(runs: Sequence[Run]) -> list[dict[str, object]]:
    """A row a cell and engine: medians over its runs that were not disturbed."""
    found: dict[tuple[Cell, str], list[Run]] = {}
    for run in runs:
        found.setdefault((Cell.parse(run.cell), run.engine), []).append(run)
    keys = sorted(found, key=lambda k: (k[0].prompt, k[0].output, k[0].concurrency))
    table: list[dict[str, object]] = []
    for cell, engine in keys:
        group = [run for run in found[cell, engine] if not run.disturbed]
        speeds = [run.tokens_per_s for run in group]
        table.append(
            {
                "tokens": f"{cell.prompt}/{cell.output}",
                "streams": cell.concurrency,
                "engine": engine,
                "runs": len(group),
                "disturbed": len(found[cell, engine]) - len(group),
                "errors": sum(run.errors for run in group),
                "ttft_ms": common.median([run.ttft_ms for run in group]),
                "tpot_ms": common.median([run.tpot_ms for run in group]),
                "tokens_per_s": common.median(speeds),
                "spread": f"{min(speeds):.0f}-{max(speeds):.0f}" if speeds else None,
            }
        )
    return table


def ratio(runs: Sequence[Run], cell: Cell, aim: Aim) -> float | None:
    """Median over rounds of our figure over the best of theirs; None where no round has both."""
    best = max if aim.at_least else min
    by_round: dict[int, dict[str, float]] = {}
    for run in runs:
        if run.cell == str(cell) and not run.errors and not run.disturbed:
            by_round.setdefault(run.round, {})[run.engine] = getattr(run, aim.what)
    values = []
    for figures in by_round.values():
        theirs = [value for engine, value in figures.items() if engine.startswith(aim.theirs)]
        if aim.ours in figures and theirs:
            values.append(figures[aim.ours] / best(theirs))
    return common.median(values) if values else None


@dataclass(frozen=True, slots=True)
class Aim:
    """A bound on a ratio to a peer (the best of its settings) at some concurrencies and prompt lengths."""

    ours: str
    theirs: str
    what: str
    bound: float
    at_least: bool
    streams: tuple[int, ...]
    prompt: int | None = None  # any


BATCHES = (8, 16, 32)
AIMS = (
    Aim("deepflow-bf16", "vllm", "tokens_per_s", 2.2, True, (1,)),
    Aim("deepflow-bf16", "vllm", "tokens_per_s", 1.3, True, BATCHES),
    Aim("deepflow-bf16", "vllm", "tpot_ms", 0.45, False, (1,)),
    Aim("deepflow-bf16", "vllm", "ttft_ms", 0.85, False, (1,), 128),
    Aim("deepflow-bf16", "vllm", "ttft_ms", 0.9, False, (1,), 512),
    Aim("deepflow-int8", "vllm", "tokens_per_s", 3.0, True, (1,)),
    Aim("deepflow-int8", "vllm", "tokens_per_s", 2.0, True, BATCHES),
    Aim("deepflow-int8", "vllm", "ttft_ms", 0.6, False, (1,)),
    *(
        Aim(f"deepflow-{ours}", f"llama.cpp-{theirs}", "tokens_per_s", bound, True, streams)
        for ours, theirs in (("bf16", "bf16"), ("int8", "q8"), ("int4", "q4"))
        for bound, streams in ((0.9, (1,)), (1.0, BATCHES))
    ),
)


def judge(report: common.Report, runs: Sequence[Run]) -> None:
    """A check for every aim and cell; what this run cannot tell is `null`."""
    ran = {run.engine for run in runs}
    for aim in AIMS:
        if aim.ours not in ran:
            continue
        for cell in CELLS:
            if cell.concurrency not in aim.streams or aim.prompt not in (None, cell.prompt):
                continue
            value = ratio(runs, cell, aim)
            holds = None if value is None else (value >= aim.bound) == aim.at_least or value == aim.bound
            sign = ">=" if aim.at_least else "<="
            name = f"{aim.what} of {aim.ours} over {aim.theirs}, {cell}"
            report.check(name, value, "x", f"{sign} {aim.bound}", holds)


def hold(found: Sequence[Server], path: Path) -> None:
    path.write_bytes(orjson.dumps([asdict(server) for server in found], option=orjson.OPT_INDENT_2))
    print(f"holding; stop with SIGTERM to {os.getpid()}", flush=True)
    ends = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    signal.sigwait(ends)


def main(args: argparse.Namespace) -> int:
    if args.ours is None:
        args.ours = OURS[:1] if args.quick else OURS
    if args.against is None:
        args.against = QUICK_PEERS if args.quick else PEERS
    report = common.Report("engine beside its peers")
    with contextlib.ExitStack() as stack:
        if args.running:
            found = [Server(**item) for item in orjson.loads(Path(args.running).read_bytes())]
            wanted = [*(f"deepflow-{precision}" for precision in args.ours), *args.against]
            found = [server for server in found if label(server) in wanted]
        else:
            found = start(stack, args)
        if args.hold:
            hold(found, Path(args.hold))
            return 0
        cells = args.cells or (QUICK_CELLS if args.quick else CELLS)
        rounds = args.rounds or (1 if args.quick else ROUNDS)
        samples = common.Samples(args.samples, Run)
        asyncio.run(measure(found, cells, rounds, samples))
    for row in rows(samples.all):
        report.add(**row)
    judge(report, samples.all)
    return report.finish(args.json)
