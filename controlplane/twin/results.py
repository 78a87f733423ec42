"""Figures of one simulation, and honest comparison of several.

Times in seconds. A request counts for goodput if it ended and met both targets of its SLO. Comparisons are
paired: the same seeds, hence the same arrivals, for both sides, and an interval from Student's t over the
pairs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from controlplane.twin.cluster import Cluster

_T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Two-sided 95 % quantiles of Student's t by degrees of freedom."""


@dataclass(frozen=True, slots=True)
class Slo:
    """Time to first token up to `ttft` plus `ttft_per_token` for each prompt token; mean time per token up
    to `tpot`.

    The part per token is for workloads whose prompts differ a hundredfold: nobody promises 100,000 tokens
    in the time of 100.
    """

    ttft: float
    tpot: float
    ttft_per_token: float = 0.0


@dataclass(frozen=True, slots=True)
class Summary:
    """One simulation in numbers; NaN where nothing was seen."""

    policy: str
    requests: int
    ended: int
    dropped: int
    ttft_mean: float
    ttft_p50: float
    ttft_p90: float
    ttft_p99: float
    tpot_mean: float
    tpot_p50: float
    tpot_p99: float
    goodput: float  # requests per second within the SLO, over the span of arrivals
    attained: float  # their share of all requests
    throughput: float  # output tokens per second until the last one
    cached: float  # share of prompt tokens found in caches
    split: float  # share of requests that were disaggregated
    busy: float  # mean share of time that executors spent in steps
    preemptions: int
    flips: int
    seconds: float  # simulated
    reasons: dict[str, int]

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def ttft(cluster: Cluster) -> npt.NDArray[np.float64]:
    """Seconds from arrival to first token; NaN for those that had none."""
    return cluster.first_at - cluster.workload.arrival + cluster.profile.request_seconds


def tpot(cluster: Cluster) -> npt.NDArray[np.float64]:
    """Mean seconds per token after the first; NaN for single tokens and those that did not end."""
    more = cluster.workload.output - 1
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(more > 0, (cluster.ended_at - cluster.first_at) / more, np.nan)


def met(cluster: Cluster, slo: Slo) -> npt.NDArray[np.bool_]:
    """Which requests ended within their SLO."""
    limit = slo.ttft + slo.ttft_per_token * cluster.workload.prompt
    per_token = tpot(cluster)
    ok = ~np.isnan(cluster.ended_at) & (ttft(cluster) <= limit)
    good: npt.NDArray[np.bool_] = ok & (np.isnan(per_token) | (per_token <= slo.tpot))
    return good


def summarize(cluster: Cluster, slo: Slo, skip: float = 0.0) -> Summary:
    """All figures; requests of the first `skip` share of arrivals warm up and are left out."""
    load = cluster.workload
    keep = np.arange(len(load)) >= int(len(load) * skip)
    first, per_token = ttft(cluster)[keep], tpot(cluster)[keep]
    first, per_token = first[~np.isnan(first)], per_token[~np.isnan(per_token)]
    good = met(cluster, slo)[keep]
    arrivals = load.arrival[keep]
    span = max(float(arrivals[-1] - arrivals[0]), 1e-9)
    ended = ~np.isnan(cluster.ended_at)
    tes = cluster.tes
    end = float(np.nanmax(cluster.ended_at)) if ended.any() else span
    return Summary(
        policy=cluster.policy.name,
        requests=len(load),
        ended=int(ended.sum()),
        dropped=len(cluster.reasons),
        ttft_mean=_mean(first),
        ttft_p50=_percentile(first, 50),
        ttft_p90=_percentile(first, 90),
        ttft_p99=_percentile(first, 99),
        tpot_mean=_mean(per_token),
        tpot_p50=_percentile(per_token, 50),
        tpot_p99=_percentile(per_token, 99),
        goodput=float(good.sum()) / span,
        attained=float(good.mean()),
        throughput=float(load.output[ended].sum()) / max(end - float(load.arrival[0]), 1e-9),
        cached=float(cluster.cached_tokens.sum() / load.prompt.sum()),
        split=float(cluster.split.mean()),
        busy=sum(te.busy_seconds for te in tes) / (len(tes) * max(cluster.now, 1e-9)),
        preemptions=sum(te.preemptions for te in tes),
        flips=cluster.flips,
        seconds=cluster.now,
        reasons=dict(Counter(cluster.reasons.values())),
    )


def _mean(values: npt.NDArray[np.float64]) -> float:
    return float(values.mean()) if len(values) else math.nan


def _percentile(values: npt.NDArray[np.float64], q: float) -> float:
    return float(np.percentile(values, q)) if len(values) else math.nan


@dataclass(frozen=True, slots=True)
class Paired:
    """Mean of ratios over pairs, with a 95 % interval (infinite for fewer than two pairs)."""

    ratio: float
    low: float
    high: float


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> Paired:
    """`ours / theirs` pair by pair, the interval from the logarithms. Raises ValueError for unequal
    lengths."""
    if len(ours) != len(theirs) or not ours:
        raise ValueError(f"{len(ours)} and {len(theirs)} values make no pairs")
    if min(*ours, *theirs) <= 0 or not all(map(math.isfinite, (*ours, *theirs))):
        return Paired(math.nan, math.nan, math.nan)
    logs = np.log(np.asarray(ours)) - np.log(np.asarray(theirs))
    mean, count = float(logs.mean()), len(logs)
    if count < 2:
        return Paired(math.exp(mean), 0.0, math.inf)
    half = _T95.get(count - 1, 1.96) * float(logs.std(ddof=1)) / math.sqrt(count)
    return Paired(math.exp(mean), math.exp(mean - half), math.exp(mean + half))


def jain(shares: Sequence[float]) -> float:
    """Jain's index of fairness: 1 = equal shares, 1/n = one has all. Raises ValueError for nothing."""
    if not len(shares):
        raise ValueError("no shares")
    total, squares = float(sum(shares)), float(sum(share * share for share in shares))
    return total * total / (len(shares) * squares) if squares > 0 else 1.0
