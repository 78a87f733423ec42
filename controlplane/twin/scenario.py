"""Named policies, capacity, and runs side by side: what the command and the benches share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from controlplane.scheduling.heatmap import HeatMap
from controlplane.scheduling.roles import RolePolicy
from controlplane.scheduling.types import Policy, Role
from controlplane.twin.baselines import (
    Conditional,
    LeastRequests,
    PowerOfTwo,
    PrefixAffinity,
    RoundRobin,
    StaticSplit,
    split_roles,
)
from controlplane.twin.cluster import HOLD_SECONDS, Cluster, Placing
from controlplane.twin.costs import CostProfile
from controlplane.twin.ours import Ours
from controlplane.twin.results import Slo, Summary, summarize
from controlplane.twin.workload import Workload

OURS = "deepflow"
FIXED = "deepflow-fixed-roles"
COLOCATED = ("round-robin", "least-requests", "power-of-two", "prefix-affinity")
SPLIT = ("static-split", "conditional-2048-0.7")
POLICIES = (OURS, FIXED, *COLOCATED, *SPLIT)

_MAKERS: dict[str, Callable[[int], Placing]] = {
    FIXED: lambda seed: Ours(seed=seed, name=FIXED),
    "round-robin": RoundRobin,
    "least-requests": LeastRequests,
    "power-of-two": PowerOfTwo,
    "prefix-affinity": PrefixAffinity,
    "static-split": StaticSplit,
    "conditional-2048-0.7": Conditional,
}
DEFAULT_SLO = Slo(2.0, 0.1)
QUEUE_SHARE, STEP_SHARE = 0.5, 0.7
"""Of an SLO's times: where the role controller calls a side fully loaded. Ours, by `tests/bench/twin.py`:
at 1.0 of the time per token it acts when the SLO is lost already."""
SHARES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
"""Prefill shares that a static split is tried with (ours: eighths, the finest that 16 executors tell apart
well)."""


class UnknownPolicy(ValueError):
    """No policy of that name; says which there are."""


def make_policy(
    name: str,
    seed: int,
    *,
    slo: Slo | None = None,
    heat_map: HeatMap | None = None,
    hold_seconds: float = 0.0,
    hold_step_seconds: float = 0.0,
) -> Placing:
    """Ours moves roles to keep the SLO."""
    if name == OURS:
        aim = slo or DEFAULT_SLO
        roles = RolePolicy(
            prefill_target_seconds=QUEUE_SHARE * aim.ttft, step_target_seconds=STEP_SHARE * aim.tpot
        )
        policy = Policy(heat_map=heat_map, hold_seconds=hold_seconds, hold_step_seconds=hold_step_seconds)
        return Ours(policy, seed, roles=roles)
    try:
        return _MAKERS[name](seed)
    except KeyError:
        raise UnknownPolicy(f"unknown policy {name!r}; there are {', '.join(POLICIES)}") from None


def roles_for(policy: str, executors: int, prefill_share: float | None) -> list[Role]:
    """Fixed roles of a split (its share rounded, each side at least one), else all colocated."""
    if policy in SPLIT or (policy in (OURS, FIXED) and prefill_share is not None):
        share = 0.5 if prefill_share is None else prefill_share
        return split_roles(executors, min(executors - 1, max(1, round(executors * share))))
    return [Role.COLOCATED] * executors


def simulate(
    load: Workload,
    profile: CostProfile,
    policy: str,
    executors: int,
    *,
    seed: int = 0,
    prefill_share: float | None = None,
    slo: Slo | None = None,
    heat_map: HeatMap | None = None,
    hold_seconds: float = 0.0,
    hold_step_seconds: float = 0.0,
    max_wait: float = HOLD_SECONDS,
    horizon: float = float("inf"),
    progress: Callable[[int, int], None] | None = None,
) -> Cluster:
    """One run to its end (or `horizon`, simulated seconds). Raises UnknownPolicy, ValueError for impossible
    roles."""
    roles = roles_for(policy, executors, prefill_share)
    made = make_policy(
        policy, seed, slo=slo, heat_map=heat_map, hold_seconds=hold_seconds,
        hold_step_seconds=hold_step_seconds,
    )  # fmt: skip
    cluster = Cluster(load, roles, profile, made, horizon=horizon, max_wait=max_wait)
    cluster.run(progress)
    return cluster


def capacity(load: Workload, profile: CostProfile, executors: int, *, seed: int = 0) -> float:
    """Requests per second that `executors` colocated executors complete while they are never idle.

    All requests arrive within a tenth of the time that the busiest resource needs for them; the middle of the
    completions (from a fifth to four fifths) gives the rate, so that filling and emptying do not count.
    """
    tokens = float((load.prompt + load.output).mean())
    burst = executors / (tokens * profile.slope) * 10
    cluster = simulate(load.at_rate(burst), profile, "least-requests", executors, seed=seed)
    ends = np.sort(cluster.ended_at[~np.isnan(cluster.ended_at)])
    low, high = ends[len(ends) // 5], ends[len(ends) * 4 // 5]
    return float((len(ends) * 4 // 5 - len(ends) // 5) / max(high - low, 1e-9))


def best_share(
    load: Workload,
    profile: CostProfile,
    policy: str,
    executors: int,
    slo: Slo,
    *,
    shares: Sequence[float] = SHARES,
    seed: int = 0,
) -> tuple[float, Summary]:
    """The prefill share of a static split with the most goodput (then the shortest mean TTFT), and its
    figures."""
    tried: list[tuple[float, float, float, Summary]] = []
    seen: set[int] = set()
    for share in shares:
        count = roles_for(policy, executors, share).count(Role.PREFILL)
        if count in seen:
            continue
        seen.add(count)
        cluster = simulate(load, profile, policy, executors, seed=seed, prefill_share=share, slo=slo)
        summary = summarize(cluster, slo)
        tried.append((summary.goodput, -summary.ttft_mean, share, summary))
    best = max(tried, key=lambda entry: entry[:2])
    return best[2], best[3]
