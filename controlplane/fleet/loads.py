"""What the autoscaler goes by, out of what executors report, in clusters and on one machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from controlplane.scheduling.roles import RolePolicy, decode_score, prefill_score
from controlplane.scheduling.types import ExecutorView, Role

DEFAULT_QUEUE_SECONDS = RolePolicy().prefill_target_seconds
DEFAULT_STEP_SECONDS = RolePolicy().step_target_seconds
DEFAULT_KV_TARGET = 0.8
"""KV in use that counts as full (ours; default of a ModelServing's `targets`)."""


@dataclass(frozen=True, slots=True)
class Loads:
    """By role; all empty where nobody reports."""

    score: Mapping[Role, float]  # 1 = as much as its share
    tasks: Mapping[Role, int]  # waiting and running
    kv: Mapping[Role, float]  # KV in use, 1 = as much as its target


def loads_of(
    views: Sequence[ExecutorView],
    *,
    queue_seconds: float = DEFAULT_QUEUE_SECONDS,
    step_seconds: float = DEFAULT_STEP_SECONDS,
    kv_target: float = DEFAULT_KV_TARGET,
) -> Loads:
    """`views`: the executors that serve. Targets: queue before a prefill, step of a decode, share of KV."""
    if not views:
        return Loads({}, {}, {})
    rules = RolePolicy(prefill_target_seconds=queue_seconds, step_target_seconds=step_seconds)
    prefill, decode = prefill_score(views, rules), decode_score(views, rules) / kv_target
    tasks: Counter[Role] = Counter()
    for view in views:
        tasks[view.role] += view.tasks
    return Loads(
        {Role.PREFILL: prefill, Role.DECODE: decode, Role.COLOCATED: max(prefill, decode)},
        {role: tasks[role] for role in Role},
        {role: _kv_used(views, role) / kv_target for role in Role},
    )


def _kv_used(views: Sequence[ExecutorView], role: Role) -> float:
    """Mean share of their blocks that executors of a role have in use."""
    used = [1 - v.kv_blocks_free / v.kv_blocks_total for v in views if v.role is role and v.kv_blocks_total]
    return sum(used) / len(used) if used else 0.0
