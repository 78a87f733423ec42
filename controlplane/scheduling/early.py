"""Early or late: whether a prefill that starts gets its decode executor now, or when it hands over.

Early, the decode executor copies each chunk while the next is computed, and what is left after the last
one is that one chunk; but its blocks are held for the whole prefill, and the choice is as old as the
prefill is long. So: early where the blocks are to spare and the view will not have moved, late otherwise.
FlowKV hides its transfers by pipelining in the same way; the conditions are ours.
"""

from __future__ import annotations

from dataclasses import dataclass

from controlplane.scheduling.columns import Columns
from controlplane.scheduling.decide import decide_decode
from controlplane.scheduling.types import (
    ClusterView,
    Decision,
    Draw,
    ExecutorView,
    Policy,
    RequestView,
    Role,
    Unplaceable,
)


@dataclass(frozen=True, slots=True)
class Late:
    """Not now: the decode executor is chosen when the prefill hands over."""

    reason: str


def decide_early(
    view: ClusterView | Columns,
    request: RequestView,
    policy: Policy,
    draw: Draw | None = None,
    *,
    prefill_te: str,
    handovers_waiting: int = 0,
) -> Decision | Late:
    """For a prefill that starts on `prefill_te`, which is not a candidate. `request` is the decode's.

    Never raises; the same arguments give the same answer. `handovers_waiting`: finished prefills that
    found no decode executor yet; what room comes is theirs.
    """
    if not policy.early_decode:
        return Late("off")
    if handovers_waiting:
        return Late("handovers wait for decode executors")
    table = view if isinstance(view, Columns) else Columns.of(view.executors, policy)
    decision = decide_decode(table, request, policy, draw)
    if isinstance(decision, Unplaceable):
        return Late(f"no decode executor: {decision.reason}")
    chosen = table.executor(decision.te_id)
    assert chosen is not None  # it was decided for
    if chosen.role is not Role.DECODE:
        return Late("no executor prefers decoding")
    if _free_share_after(chosen, request) < policy.early_free_share:
        return Late("the decode executor's KV is short")
    others = len(decision.scores) > 1
    if others and _prefill_left(table.executor(prefill_te), request, policy) > policy.early_horizon_seconds:
        return Late("the load moves sooner than the prefill ends")
    return decision


def _free_share_after(executor: ExecutorView, request: RequestView) -> float:
    """Part of the pool that stays free beside this request, its next token included."""
    if not executor.kv_blocks_total:
        return 1.0
    needed = -(-(request.tokens + 1) // max(executor.block_tokens, 1))
    return (executor.kv_blocks_free - needed) / executor.kv_blocks_total


def _prefill_left(executor: ExecutorView | None, request: RequestView, policy: Policy) -> float:
    """Seconds until the hand-over, if the prefill has the executor to itself."""
    if executor is None:
        return 0.0
    uncached = max(0, request.tokens - request.cached_tokens.get(executor.te_id, 0))
    return uncached / (executor.prefill_tokens_per_second or policy.default_prefill_rate)
