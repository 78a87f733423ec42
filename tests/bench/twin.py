"""Our policy beside others on the digital twin, and how fast the twin is.

    python -m tests.bench.twin [--part cells|phases|overload|scale] [--quick] [--json PATH]

cells     Azure and Mooncake conversation traces, superposed, on clusters of several sizes at three loads;
every policy sees the same arrivals of each seed. A cell holds where ours is the best or within 2 % of it.
phases    prefill-heavy, decode-heavy, prefill-heavy: ours with live roles against the best static split.
overload  twice the capacity with two priorities and several tenants.
scale     a million requests over a thousand executors, on one core.

Splits run at their best prefill share, looked for in eighths on 16 executors at the first seed of each
cell. Ours starts with everyone colocated; above capacity, where goodput alone counts, from the share with
the most of it, found in the same way. Figures are of simulated time, so they are the same on any machine;
only `scale` measures this one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import orjson

from controlplane.twin.cluster import HOLD_SECONDS, Cluster
from controlplane.twin.costs import roofline_profile
from controlplane.twin.results import Slo, Summary, jain, met, paired_ratio, summarize, ttft
from controlplane.twin.scenario import COLOCATED, FIXED, OURS, SHARES, SPLIT, capacity, simulate
from controlplane.twin.workload import Phase, Workload, merge, phases, poisson, read_trace, superpose
from tests.bench import common

TRACES = Path(__file__).parents[1] / "traces"
FILES = {"azure": "azure_llm_conv_2023.csv.xz", "mooncake": "mooncake_conversation.jsonl.xz"}
SLOS = {"azure": Slo(1.0, 0.05), "mooncake": Slo(2.0, 0.1, ttft_per_token=5e-4)}
"""Ours: a second and 20 tokens a second for chats; half a second more per 1,000 tokens of long prompts."""
SIZES = (16, 64, 512)
LOADS = (0.5, 0.8, 1.2)
SEEDS = (1, 2, 3)
PER_EXECUTOR = 200  # requests
SHARE_SIZE, SHARE_PER_EXECUTOR = 16, 60  # what a split's best share is looked for on
STOPPED = 3  # exit code: --stop-after was reached
WARM = 0.1  # share of arrivals left out: caches and queues fill
WITHIN = 0.02
BELOW = ("ttft_mean", "ttft_p99", "tpot_p99")
PROFILE = roofline_profile()


@dataclass(frozen=True)
class Cell:
    trace: str
    executors: int
    load: float


def workload(cell: Cell, per: int, seed: int, whole: float) -> Workload:
    trace = read_trace(TRACES / FILES[cell.trace]).capped(PROFILE.max_model_len)
    return superpose(trace, per * cell.executors, cell.load * whole * cell.executors, seed)


def per_executor(trace: str) -> float:
    """Requests per second that one of 16 colocated executors completes in a flood."""
    made = superpose(read_trace(TRACES / FILES[trace]).capped(PROFILE.max_model_len), 16 * 150, 1.0, 0)
    return capacity(made, PROFILE, 16) / 16


class Kept:
    """Figures of runs that are done, in a file: a long series goes on where it stopped."""

    def __init__(self, path: Path | None, stop_after: float = math.inf) -> None:
        self._path = path
        self._ends = time.monotonic() + stop_after
        self._found: dict[str, dict[str, object]] = {}
        if path is not None and path.exists():
            self._found = orjson.loads(path.read_bytes())

    def _get(self, key: str, run: Callable[[], dict[str, object]]) -> dict[str, object]:
        if key not in self._found:
            if time.monotonic() > self._ends:
                raise SystemExit(STOPPED)
            self._found[key] = run()
            if self._path is not None:
                self._path.write_bytes(orjson.dumps(self._found, option=orjson.OPT_NON_STR_KEYS))
        return self._found[key]

    def summary(self, key: str, run: Callable[[], Summary]) -> Summary:
        return Summary(**self._get(key, lambda: run().to_json()))  # type: ignore[arg-type]  # as it was written

    def number(self, key: str, run: Callable[[], float]) -> float:
        return float(self._get(key, lambda: {"number": run()})["number"])  # type: ignore[arg-type]  # likewise


def start_share(cell: Cell, seed: int, whole: float, name: str, kept: Kept) -> float | None:
    """The prefill share with the most goodput, on a small cluster; None: everyone colocated, which only
    ours may."""
    small = replace(cell, executors=min(cell.executors, SHARE_SIZE))
    work = workload(small, SHARE_PER_EXECUTOR, seed, whole)
    tried: list[tuple[float, float, float | None]] = []
    for share in (*SHARES, None) if name == OURS else SHARES:
        run = partial(one_run, work, name, small, seed, share)
        found = kept.summary(f"{small}/{name}/start {share}/{seed}", run)
        tried.append((found.goodput, -found.ttft_mean, share))
    return max(tried, key=lambda entry: entry[:2])[2]


def one_run(work: Workload, name: str, cell: Cell, seed: int, share: float | None) -> Summary:
    slo = SLOS[cell.trace]
    cluster = simulate(work, PROFILE, name, cell.executors, seed=seed, prefill_share=share, slo=slo)
    return summarize(cluster, slo, WARM)


def run_cell(
    cell: Cell, per: int, seeds: tuple[int, ...], whole: float, kept: Kept, names: tuple[str, ...]
) -> dict[str, list[Summary]]:
    """Figures of every policy, seed by seed."""
    found: dict[str, list[Summary]] = {}
    shares: dict[str, float | None] = {}
    for seed in seeds:
        work = workload(cell, per, seed, whole)
        for name in names:
            if (name in SPLIT or (name == OURS and cell.load > 1)) and name not in shares:
                shares[name] = start_share(cell, seed, whole, name, kept)
            run = partial(one_run, work, name, cell, seed, shares.get(name))
            found.setdefault(name, []).append(kept.summary(f"{cell}/{per}/{name}/{seed}", run))
    return found


def judge(report: common.Report, cell: Cell, found: dict[str, list[Summary]]) -> None:
    """A row a policy; a check a figure: ours against the best other, paired over the seeds."""
    for name, runs in found.items():
        report.add(
            trace=cell.trace, executors=cell.executors, load=cell.load, policy=name,
            ttft_ms=1e3 * common.mean([s.ttft_mean for s in runs]),
            ttft_p99_ms=1e3 * common.mean([s.ttft_p99 for s in runs]),
            tpot_p99_ms=1e3 * common.mean([s.tpot_p99 for s in runs]),
            goodput=common.mean([s.goodput for s in runs]),
            in_slo=common.mean([s.attained for s in runs]),
            cached=common.mean([s.cached for s in runs]), split=common.mean([s.split for s in runs]),
        )  # fmt: skip
    if OURS not in found:
        return
    figures = ("goodput",) if cell.load > 1 else (*BELOW, "goodput")
    for figure in figures:
        less = figure in BELOW

        def value(name: str, figure: str = figure) -> list[float]:
            return [float(getattr(s, figure)) for s in found[name]]

        others = [name for name in found if name != OURS]
        pick: Callable[..., str] = min if less else max
        best = pick(others, key=lambda name: common.mean(value(name)))
        pair = paired_ratio(value(OURS), value(best))
        ratio = pair.ratio
        if math.isnan(ratio):  # a seed without any: what is left is the ratio of the means
            ratio = common.mean(value(OURS)) / max(common.mean(value(best)), 1e-9)
        holds = ratio <= 1 + WITHIN if less else ratio >= 1 - WITHIN
        report.check(
            f"{cell.trace}, {cell.executors} executors, load {cell.load}: {figure} over {best}'s"
            f" [{pair.low:.2f}, {pair.high:.2f}]",
            ratio, "x", f"<= {1 + WITHIN}" if less else f">= {1 - WITHIN}", holds,
        )  # fmt: skip


def cells(
    report: common.Report,
    quick: bool,
    traces: tuple[str, ...],
    sizes: tuple[int, ...],
    kept: Kept,
    names: tuple[str, ...],
    per_te: int,
) -> None:
    wholes = {trace: kept.number(f"capacity {trace}", partial(per_executor, trace)) for trace in traces}
    for trace in traces:
        for size in sizes:
            for load in LOADS[1:2] if quick else LOADS:
                cell = Cell(trace, size, load)
                per, seeds = (40, SEEDS[:1]) if quick else (per_te, SEEDS)
                found = run_cell(cell, per, seeds, wholes[trace], kept, names)
                judge(report, cell, found)


# -- phases ----------------------------------------------------------------------------------------------

PREFILL_HEAVY, DECODE_HEAVY = (6000, 24), (200, 600)  # prompt and output tokens
PHASE_SLO = Slo(2.0, 0.05)
PHASE_LOAD = 0.75


def phase_shift(report: common.Report, quick: bool, kept: Kept) -> None:
    """Each phase at the same share of what colocated executors complete of its requests."""
    size, seconds = (8, 60.0) if quick else (16, 120.0)
    rates = {
        shape: PHASE_LOAD
        * kept.number(
            f"capacity {shape} {size}",
            partial(capacity, poisson(*shape, 1.0, 60 * size, 0, spread=0.3), PROFILE, size),
        )
        for shape in (PREFILL_HEAVY, DECODE_HEAVY)
    }
    ratios: list[float] = []
    for seed in SEEDS[:1] if quick else SEEDS:
        parts = [Phase(seconds, rates[s], *s) for s in (PREFILL_HEAVY, DECODE_HEAVY, PREFILL_HEAVY)]
        work = phases(parts, seed)

        def figures(name: str, share: float | None, work: Workload = work, seed: int = seed) -> Summary:
            return kept.summary(
                f"phases {size} {name} {share} {seed}", partial(phase_run, work, name, size, seed, share)
            )

        splits = {share: figures("static-split", share) for share in SHARES}
        share = max(splits, key=lambda each: (splits[each].goodput, -splits[each].ttft_mean))
        for name, start in ((OURS, share), (OURS, None), (FIXED, None), ("least-requests", None)):
            label = name if start is None else f"{name}, roles from {start:.0%} prefill"
            _phase_row(report, seed, label, figures(name, start))
        _phase_row(report, seed, f"static-split, {share:.0%} prefill", splits[share])
        ours = figures(OURS, share)
        ratios.append(ours.goodput / max(splits[share].goodput, 1e-9))
        report.check(
            f"seed {seed}: dropped while roles changed",
            float(ours.dropped),
            "requests",
            "0",
            not ours.dropped,
        )
    ratio = common.mean(ratios)
    report.check("phase shift: goodput over the best static split's", ratio, "x", ">= 1.3", ratio >= 1.3)


def phase_run(work: Workload, name: str, size: int, seed: int, share: float | None) -> Summary:
    cluster = simulate(work, PROFILE, name, size, seed=seed, prefill_share=share, slo=PHASE_SLO)
    return summarize(cluster, PHASE_SLO)


def _phase_row(report: common.Report, seed: int, policy: str, s: Summary) -> None:
    report.add(
        seed=seed, policy=policy, goodput=s.goodput, in_slo=s.attained, ttft_ms=1e3 * s.ttft_mean,
        ttft_p99_ms=1e3 * s.ttft_p99, tpot_p99_ms=1e3 * s.tpot_p99, flips=s.flips, split=s.split,
        dropped=s.dropped,
    )  # fmt: skip


# -- scale -----------------------------------------------------------------------------------------------


def scale(report: common.Report, quick: bool) -> None:
    """Time of a long run, decisions included: of its processor, as others may share this machine, and of
    the wall."""
    size, count = (100, 20_000) if quick else (1000, 1_000_000)
    whole = per_executor("azure")
    work = superpose(read_trace(TRACES / FILES["azure"]), count, 0.8 * whole * size, 1)
    started, used = time.perf_counter(), time.process_time()
    cluster = simulate(work, PROFILE, OURS, size)
    wall, cpu = time.perf_counter() - started, time.process_time() - used
    summary = summarize(cluster, SLOS["azure"])
    report.add(requests=count, executors=size, cpu_s=cpu, wall_s=wall, us_per_request=1e6 * cpu / count,
               simulated_s=summary.seconds, ended=summary.ended, decisions=cluster.decisions)  # fmt: skip
    report.check(
        "a million requests over a thousand executors, processor time", None if quick else cpu, "s", "< 600",
        None if quick else cpu < 600,
    )  # fmt: skip


# -- overload --------------------------------------------------------------------------------------------

TENANTS = 4
HIGH_SHARE = 0.3  # of capacity, asked by the high band
HIGH, LOW = 10, 0
OVERLOAD_SPLIT = 0.375  # prefill executors: the best of the eighths for this shape
HOLD_SHARE, WAIT_SHARE, HOLD_STEP_SHARE = 0.25, 0.5, 0.9
"""Of the SLO: prompts wait in the fair queue while executors have more to prefill, at most so long, and
nothing starts while decoding takes longer. Ours: queue, wait and prefill together stay within the SLO."""


def overload(report: common.Report, quick: bool) -> None:
    """The high band alone; then all within capacity; then twice the capacity in all."""
    size, count = (4, 200) if quick else (16, 600)
    shape = (1000, 200)
    whole = capacity(poisson(*shape, 1.0, 100 * size, 0, spread=0.5), PROFILE, size)
    slo = SLOS["azure"]

    def run(work: Workload, seed: int, name: str = OURS) -> Cluster:
        ours = name == OURS
        return simulate(
            work, PROFILE, name, size, seed=seed, slo=slo, horizon=float(work.arrival[-1]) + 120,
            prefill_share=OVERLOAD_SPLIT if ours else None,
            hold_seconds=HOLD_SHARE * slo.ttft if ours else 0.0,
            hold_step_seconds=HOLD_STEP_SHARE * slo.tpot if ours else 0.0,
            max_wait=WAIT_SHARE * slo.ttft if ours else HOLD_SECONDS,
        )  # fmt: skip

    for seed in SEEDS[:1] if quick else SEEDS:
        high = _band(shape, HIGH_SHARE * whole, count * size // 8, seed, 0, HIGH)
        was = float(met(run(high, seed), slo).mean())
        goodput: dict[float, float] = {}
        for load in (1.0, 2.0):
            # Three tenants ask alike, the fourth for three times as much.
            asked = (load - HIGH_SHARE) * whole / (TENANTS + 2)
            low = [
                _band(shape, asked * times, int(asked * times * high.span), seed * 100 + tenant, tenant, LOW)
                for tenant, times in zip(range(1, TENANTS + 1), (1, 1, 1, 3), strict=True)
            ]
            work = merge([high, *low], "overload")
            for name in (OURS, "least-requests"):
                both = run(work, seed, name)
                first = work.priority == HIGH
                cost = work.prompt + work.output
                ended = ~np.isnan(both.ended_at) & (both.ended_at <= work.arrival[-1])
                shares = [float(cost[ended & (work.tenant == t)].sum()) for t in range(1, TENANTS + 1)]
                good = float(met(both, slo).sum()) / work.span
                kept = float(met(both, slo)[first].mean())
                told = len(both.reasons) + int((~np.isnan(both.ended_at)).sum())
                report.add(
                    seed=seed, load=load, policy=name, high_alone=was, high_in_slo=kept, goodput=good,
                    ttft_high_ms=1e3 * float(np.nanmean(ttft(both)[first])), jain=jain(shares),
                    dropped=len(both.reasons), told=told - len(work),
                )  # fmt: skip
                if name == OURS:
                    goodput[load] = good
                    last = (kept, jain(shares), float(told - len(work)))
        kept, index, missing = last
        ratio = kept / max(was, 1e-9)
        report.check(f"seed {seed}: high band in its SLO, over alone", ratio, "x", ">= 0.9", ratio >= 0.9)
        report.check(f"seed {seed}: Jain's index of the tenants' cost", index, "", ">= 0.95", index >= 0.95)
        ratio = goodput[2.0] / max(goodput[1.0], 1e-9)
        report.check(f"seed {seed}: goodput at 2x over at 1x", ratio, "x", ">= 0.9", ratio >= 0.9)
        report.check(f"seed {seed}: neither ended nor told why", missing, "requests", "0", not missing)


def _band(shape: tuple[int, int], rate: float, count: int, seed: int, tenant: int, priority: int) -> Workload:
    made = poisson(*shape, rate, max(count, 2), seed, spread=0.5)
    zeros = np.zeros(len(made), dtype=np.int64)
    return replace(made, tenant=zeros + tenant, priority=zeros + priority)


def main() -> int:
    parser = common.parser(__doc__.splitlines()[0])
    parser.add_argument("--part", choices=("cells", "phases", "overload", "scale"), action="append")
    parser.add_argument("--sizes", type=int, nargs="+", help="executors of the cells")
    parser.add_argument("--per", type=int, default=PER_EXECUTOR, help="requests an executor, of the cells")
    parser.add_argument("--traces", choices=FILES, nargs="+", help="of the cells")
    parser.add_argument("--resume", type=Path, help="keep the cells' figures here, and go on from them")
    parser.add_argument("--others", action="store_true", help="leave ours out, to fill --resume")
    parser.add_argument("--stop-after", type=float, default=math.inf, help="seconds; go on with --resume")
    args = parser.parse_args()
    code = 0
    for part in args.part or ("cells", "phases", "overload", "scale"):
        report = common.Report(f"twin: {part}")
        if part == "cells":
            sizes = tuple(args.sizes or (SIZES[:1] if args.quick else SIZES))
            names = (*COLOCATED, *SPLIT) if args.others else (OURS, *COLOCATED, *SPLIT)
            traces = tuple(args.traces or FILES)
            cells(report, args.quick, traces, sizes, Kept(args.resume, args.stop_after), names, args.per)
        elif part == "phases":
            phase_shift(report, args.quick, Kept(args.resume, args.stop_after))
        elif part == "overload":
            overload(report, args.quick)
        else:
            scale(report, args.quick)
        path = f"{args.json}.{part}" if args.json and len(args.part or ()) != 1 else args.json
        code |= report.finish(path)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
