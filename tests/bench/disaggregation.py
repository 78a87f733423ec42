"""When disaggregation pays: 1P1D beside 1C on equal cores, and what the transfer takes of it.

    python -m tests.bench.disaggregation [--quick] [--json PATH] [--cells 512/128@8 …] [--rounds N]

1C has all cores in one executor, 1P1D half of them in each of two. Both are started as a user starts them
and driven through their gateways. The load of a cell is closed: so many streams, each starting its next
request as soon as one ends, so that prompts keep coming while others decode. `gap` is the time between two
tokens of a stream: what a prompt computed in between costs those who read along. `handover` is how much
longer the second token takes than later ones: what the client sees of the transfer (on 1C, of nothing).
"""

from __future__ import annotations

import argparse
import itertools
import time
from contextlib import ExitStack
from dataclasses import dataclass

from tests.bench import common
from tests.bench.client import Prompts, Sample, batch, complete
from tests.bench.peers.compare import Cell
from tests.bench.serve import TOPOLOGIES
from tests.support.stack import MODEL, Stack, running_stack

CELLS = tuple(map(Cell.parse, ("128/64@1", "128/64@8", "512/128@1", "512/128@8", "1024/32@4")))
QUICK_CELLS = tuple(map(Cell.parse, ("128/16@1", "256/16@4")))
ROUNDS = 5
REQUESTS_A_STREAM = 2


@dataclass(frozen=True, slots=True)
class Run:
    """One load on one topology; milliseconds."""

    topology: str
    cell: str
    round: int
    errors: int
    ttft: float
    tpot: float
    gap_p99: float  # of all gaps of all streams
    tokens_per_s: float
    handover: float  # median
    handover_share: float  # of the requests' whole time
    other_work: float


def summarise(
    topology: str, cell: Cell, number: int, samples: list[Sample], wall: float, other: float
) -> Run:
    good = [sample for sample in samples if not sample.error]
    gaps = [gap for s in good for gap in common.gaps([s.first, *s.rest])]
    whole = sum(s.rest[-1] for s in good)
    handovers = [s.rest[0] - s.first - common.median(common.gaps(s.rest)) for s in good]
    return Run(
        topology=topology,
        cell=str(cell),
        round=number,
        errors=len(samples) - len(good),
        ttft=1e3 * common.median([s.first for s in good]),
        tpot=1e3 * common.median([s.per_token for s in good]),
        gap_p99=1e3 * common.percentile(gaps, 99),
        tokens_per_s=sum(s.tokens for s in good) / wall,
        handover=1e3 * common.median(handovers),
        handover_share=sum(handovers) / whole if whole else 0.0,
        other_work=other,
    )


async def measure(
    stacks: dict[str, Stack], cells: list[Cell], rounds: int, samples: common.Samples[Run]
) -> None:
    prompts = Prompts(time.time_ns())
    first = time.time_ns()
    pids = [pid for stack in stacks.values() for pid in stack.pids()]

    async def load(name: str, cell: Cell, requests: int) -> tuple[list[Sample], float]:
        port = stacks[name].port
        return await batch(
            lambda: complete(port, MODEL, prompts.next(cell.prompt), cell.output), cell.concurrency, requests
        )

    for name in stacks:  # buffers and cost models get warm
        await load(name, Cell(128, 8, 2), 2)
    for number in range(rounds):
        names = list(stacks) if number % 2 == 0 else list(reversed(stacks))
        for cell in cells:
            for name in names:
                other = common.OtherWork(pids)
                done, wall = await load(name, cell, REQUESTS_A_STREAM * cell.concurrency)
                samples.add(summarise(name, cell, first + number, done, wall, other.share()))


def add_rows(report: common.Report, runs: list[Run]) -> None:
    cells = sorted({Cell.parse(run.cell) for run in runs}, key=lambda c: (c.prompt, c.concurrency))
    for cell, topology in itertools.product(cells, TOPOLOGIES):
        found = [run for run in runs if (run.cell, run.topology) == (str(cell), topology)]
        group = [run for run in found if run.other_work <= common.MOST_OTHER_WORK]
        medians = {
            name: common.median([getattr(run, name) for run in group])
            for name in ("ttft", "tpot", "gap_p99", "tokens_per_s", "handover", "handover_share")
        }
        report.add(
            tokens=f"{cell.prompt}/{cell.output}",
            streams=cell.concurrency,
            topology=topology,
            runs=len(group),
            disturbed=len(found) - len(group),
            ttft_ms=medians["ttft"],
            tpot_ms=medians["tpot"],
            gap_ms_p99=medians["gap_p99"],
            tokens_per_s=medians["tokens_per_s"],
            handover_ms=medians["handover"],
            handover_percent=100 * medians["handover_share"],
        )


async def main() -> int:
    parser = common.parser(str(__doc__).splitlines()[0])
    parser.add_argument("--cells", nargs="*", type=Cell.parse, help="PROMPT/OUTPUT@STREAMS …")
    parser.add_argument("--rounds", type=int, help=f"runs of each cell (default {ROUNDS})")
    parser.add_argument("--samples", metavar="FILE", help="add the runs to FILE, report over all in it")
    args: argparse.Namespace = parser.parse_args()
    report = common.Report("1P1D beside 1C")
    cells = args.cells or list(QUICK_CELLS if args.quick else CELLS)
    samples = common.Samples(args.samples, Run)
    with ExitStack() as opened:
        stacks = {n: opened.enter_context(running_stack(n, "--kv-cache-bytes", "512M")) for n in TOPOLOGIES}
        await measure(stacks, cells, args.rounds or (1 if args.quick else ROUNDS), samples)
    add_rows(report, samples.all)
    failed = float(sum(run.errors for run in samples.all))
    report.check("requests that failed", failed, "requests", "0", not failed)
    return report.finish(args.json)


if __name__ == "__main__":
    common.run(main())
