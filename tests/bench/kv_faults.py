"""KV transfers under random faults, and under load for long: what ends how, and whether anything is left.

    python -m tests.bench.kv_faults [--quick] [--json PATH] [--first SEED] [--schedules N]
    python -m tests.bench.kv_faults --soak [--quick] [--json PATH]

Faults: 2,000 schedules (see tests/support/kv_faults.py) on real prefill and decode processes. Soak: ten
minutes of transfers without faults, over every transport, into pools that stay almost full; memory and
descriptors of both processes at the end beside those after the first tenth.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

from tests.bench import common
from tests.support.kv_faults import Outcome, Schedule, Transfer, lanes, run_all, schedule

SCHEDULES = 2000
LANES = 4  # most of a schedule is waiting for leases and deadlines
QUICK_SECONDS = 35.0
SOAK_SECONDS = 600.0
GROWTH_KIB = 8 << 10
"""What an allocator may keep more after nine tenths of a soak; a page leaked in 1,000 transfers is more."""


async def faults(args: argparse.Namespace, report: common.Report) -> None:
    seeds = range(args.first, args.first + args.schedules)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="dff-") as folder:
        limit = QUICK_SECONDS if args.quick else float("inf")
        found = await run_all(Path(folder), seeds, LANES, limit)
    pulls = sum((outcome.pulls for outcome in found.values()), Counter[str]())
    released = sum((outcome.released for outcome in found.values()), Counter[str]())
    faulted = Counter(fault.kind for seed in found for fault in schedule(seed).faults)
    for what, counts in (("fault", faulted), ("pull ended", pulls), ("transfer released", released)):
        for name, number in counts.most_common():
            report.add(what=what, name=name, number=number)
    bad = {seed: outcome.problems for seed, outcome in found.items() if outcome.problems}
    for seed, problems in bad.items():
        print(f"seed {seed}: {problems}\n  {schedule(seed)}")
    report.add(what="schedules", name=f"in {time.perf_counter() - started:.0f} s", number=len(found))
    enough = len(found) >= SCHEDULES
    report.check(
        "schedules that hung, leaked, or gave wrong bytes", float(len(bad)), f"of {len(found)}",
        f"0 of {SCHEDULES}", False if bad else True if enough else None,
    )  # fmt: skip


def calm(rng: random.Random, number: int) -> Schedule:
    """Transfers without faults that fill most of both pools."""
    base = schedule(rng.randrange(1 << 30))
    transfers: tuple[Transfer, ...] = tuple(
        replace(item, pull_after=rng.choice((0.0, 0.02)), slow=False, pause=min(item.pause, 0.01))
        for item in base.transfers[:4]
    )
    return Schedule(number, transfers, ())


async def soak(args: argparse.Namespace, report: common.Report) -> None:
    seconds = QUICK_SECONDS if args.quick else SOAK_SECONDS
    rng = random.Random(args.first)
    early: dict[str, int] = {}
    outcome = Outcome()
    problems: list[str] = []
    ended: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="dfs-") as folder:
        async with lanes(Path(folder), 1) as (lane,):
            started = time.perf_counter()
            number = 0
            while (spent := time.perf_counter() - started) < seconds:
                number += 1
                outcome = await lane.run(calm(rng, number))
                problems += outcome.problems
                ended += outcome.pulls
                if not early and spent >= seconds / 10:
                    early = dict(outcome.usage)
                    report.add(after_s=spent, transfers=ended.total(), **early)
            report.add(after_s=spent, transfers=ended.total(), **outcome.usage)
    print(dict(ended), problems[:5])
    long_enough = not args.quick
    failed = ended.total() - ended["ok"] - ended["pool_full"] - ended["prefill_refused"]
    report.check(
        "transfers that failed", float(failed + len(problems)), "transfers", "0", not failed + len(problems)
    )
    for name in ("p", "d"):
        fds = outcome.usage[f"{name}_fds"] - early[f"{name}_fds"]
        kib = outcome.usage[f"{name}_rss"] - early[f"{name}_rss"]
        report.check(
            f"descriptors more, {name}", float(fds), "fds", "<= 2", fds <= 2 if long_enough else None
        )
        flat = kib <= GROWTH_KIB
        report.check(
            f"memory more, {name}", kib / 1024, "MiB", f"<= {GROWTH_KIB >> 10}", flat if long_enough else None
        )


async def main() -> int:
    parser = common.parser(__doc__.splitlines()[0])
    parser.add_argument("--soak", action="store_true", help="ten minutes without faults")
    parser.add_argument(
        "--first", type=int, default=0, help="first seed; with --schedules 1 a failed one again"
    )
    parser.add_argument("--schedules", type=int, default=SCHEDULES)
    args = parser.parse_args()
    report = common.Report("kv_faults")
    await (soak if args.soak else faults)(args, report)
    return report.finish(args.json)


if __name__ == "__main__":
    common.run(main())
