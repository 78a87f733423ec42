"""Filter, choose the mode, score, pick: one pass over an immutable view.

`decide` places a new (or replayed) task, `decide_decode` the decode task of a finished prefill. The
choice between unified and disaggregated follows DeepServe's observation that only uncached prompt
tokens cost prefill time; decode executors are chosen late because load has moved on by then.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

from controlplane.scheduling.types import (
    ClusterView,
    Decision,
    Draw,
    Drop,
    ExecutorView,
    Mode,
    Policy,
    PolicyName,
    Reason,
    RequestView,
    Role,
    Unplaceable,
)

_Score = Callable[[ExecutorView], float]


def decide(
    view: ClusterView, request: RequestView, policy: Policy, draw: Draw | None = None
) -> Decision | Unplaceable:
    """Where the task runs first. Never raises; the same arguments give the same answer."""
    draw = draw or Draw()
    fit, dropped = _filter(view, request, policy, decode=False)
    if not fit:
        return Unplaceable(_why(dropped), dropped)

    def score(executor: ExecutorView) -> float:
        return prefill_seconds(executor, request, policy)

    prefills = [executor for executor in fit if executor.role is Role.PREFILL]
    if prefills and not request.unified_only:
        decodes, _ = _filter(view, request, policy, decode=True)
        chosen = _pick(prefills, request, policy, draw, score)
        others = [executor for executor in decodes if executor.role is Role.DECODE]
        if others and request.tokens - _cached(chosen, request) >= policy.min_uncached_tokens:
            return _decision(Mode.DISAGGREGATED, chosen, prefills, request, score, dropped, "both roles fit")
        reason = "short uncached prompt" if others else "no decode executor is fit"
    else:
        reason = "unified asked for" if request.unified_only else "no prefill executor is fit"
    candidates = _unified_candidates(fit, short=reason == "short uncached prompt")
    chosen = _pick(candidates, request, policy, draw, score)
    return _decision(Mode.UNIFIED, chosen, candidates, request, score, dropped, reason)


def decide_decode(
    view: ClusterView, request: RequestView, policy: Policy, draw: Draw | None = None
) -> Decision | Unplaceable:
    """Where the KV of a finished prefill goes. Put the prefill's executor into `request.never`.

    Decode and colocated executors are candidates; prefill ones only if there is no other.
    """
    draw = draw or Draw()
    fit, dropped = _filter(view, request, policy, decode=True)
    if not fit:
        return Unplaceable(_why(dropped), dropped)

    def score(executor: ExecutorView) -> float:
        return decode_pressure(executor, request, policy)

    candidates = (
        [executor for executor in fit if executor.role is Role.DECODE]
        or [executor for executor in fit if executor.role is Role.COLOCATED]
        or fit
    )
    preferred = [executor for executor in candidates if executor.te_id == request.prefer]
    if policy.name is PolicyName.ROUND_ROBIN and not preferred:
        chosen = _turn(candidates, draw)
    else:
        least = min(map(score, candidates))
        bound = least * policy.affinity_slack_ratio + policy.affinity_slack_seconds
        near = [executor for executor in preferred if score(executor) <= bound] or candidates
        chosen = min(near, key=lambda executor: (score(executor), _jitter(executor, draw)))
    return _decision(Mode.DISAGGREGATED, chosen, candidates, request, score, dropped, "least pressure")


def prefill_seconds(executor: ExecutorView, request: RequestView, policy: Policy) -> float:
    """Estimated seconds until the first token: the queue, then the uncached prompt."""
    uncached = max(0, request.tokens - _cached(executor, request))
    rate = executor.prefill_tokens_per_second or policy.default_prefill_rate
    return queue_seconds(executor, policy) + uncached / rate


def queue_seconds(executor: ExecutorView, policy: Policy) -> float:
    """Estimated seconds of work ahead of a new task. Every live task takes a share of the steps meanwhile."""
    rate = executor.prefill_tokens_per_second or policy.default_prefill_rate
    step = executor.decode_step_seconds or policy.default_step_seconds
    return executor.queued_tokens / rate + executor.tasks * step


def decode_pressure(executor: ExecutorView, request: RequestView, policy: Policy) -> float:
    """Grows with the tasks that share a step, and without limit as KV runs out."""
    step = executor.decode_step_seconds or policy.default_step_seconds
    free = executor.kv_blocks_free - _blocks(executor, request.tokens)
    share = max(free, 1) / max(executor.kv_blocks_total, 1)
    return step * (executor.tasks + 1) / min(share, 1.0)


def dropped_for(
    executor: ExecutorView, request: RequestView, policy: Policy, *, decode: bool = False
) -> Drop | None:
    """Why the executor cannot take the task now; None if it can."""
    need = request.tokens + (min(request.output_left, policy.decode_growth_tokens) if decode else 1)
    if not executor.ready:
        return Drop.NOT_READY
    if executor.model_revision != request.model_revision:
        return Drop.REVISION
    if executor.draining:
        return Drop.DRAINING
    if not executor.link_up:
        return Drop.LINK
    if executor.step_age_seconds > policy.max_step_age_seconds:
        return Drop.HUNG
    if executor.te_id in request.never:
        return Drop.EXCLUDED
    if executor.kv_blocks_total and _blocks(executor, request.tokens) > executor.kv_blocks_total:
        return Drop.TOO_LARGE
    if executor.max_model_len and request.tokens > executor.max_model_len:
        return Drop.TOO_LARGE
    if executor.tasks >= executor.max_tasks:
        return Drop.TASKS_FULL
    # An executor without tasks takes whatever its pool can hold, or nothing would ever start there.
    if executor.tasks and executor.kv_blocks_total and _blocks(executor, need) > executor.kv_blocks_free:
        return Drop.KV_FULL
    return None


def _filter(
    view: ClusterView, request: RequestView, policy: Policy, *, decode: bool
) -> tuple[list[ExecutorView], dict[str, Drop]]:
    fit: list[ExecutorView] = []
    avoided: list[ExecutorView] = []
    dropped: dict[str, Drop] = {}
    for executor in view.executors:
        why = dropped_for(executor, request, policy, decode=decode)
        if why is not None:
            dropped[executor.te_id] = why
        elif executor.te_id in request.excluded:
            avoided.append(executor)
        else:
            fit.append(executor)
    if fit:
        dropped.update((executor.te_id, Drop.EXCLUDED) for executor in avoided)
        return fit, dropped
    return avoided, dropped


def _why(dropped: dict[str, Drop]) -> Reason:
    reasons = set(dropped.values())
    if any(reason.passes for reason in reasons):
        return Reason.BUSY
    return Reason.TOO_LARGE if Drop.TOO_LARGE in reasons else Reason.NO_EXECUTOR


def _unified_candidates(fit: list[ExecutorView], *, short: bool) -> list[ExecutorView]:
    """Colocated executors first. A short prompt beside a P/D pair goes where decoding happens anyway."""
    colocated = [executor for executor in fit if executor.role is Role.COLOCATED]
    if colocated:
        return colocated
    if short:
        return [executor for executor in fit if executor.role is Role.DECODE] or fit
    return fit


def _pick(
    candidates: Sequence[ExecutorView], request: RequestView, policy: Policy, draw: Draw, score: _Score
) -> ExecutorView:
    queues = {executor.te_id: queue_seconds(executor, policy) for executor in candidates}
    bound = min(queues.values()) * policy.affinity_slack_ratio + policy.affinity_slack_seconds
    for executor in candidates:
        if executor.te_id == request.prefer and queues[executor.te_id] <= bound:
            return executor
    if policy.name is PolicyName.ROUND_ROBIN:
        return _turn(candidates, draw)
    if policy.name is PolicyName.PREFIX_AFFINITY:
        near = [executor for executor in candidates if queues[executor.te_id] <= bound]
        longest = max(_cached(executor, request) for executor in near)
        candidates = [executor for executor in near if _cached(executor, request) == longest]
    return min(candidates, key=lambda executor: (score(executor), _jitter(executor, draw)))


def _turn(candidates: Sequence[ExecutorView], draw: Draw) -> ExecutorView:
    ordered = sorted(candidates, key=lambda executor: executor.te_id)
    return ordered[draw.turn % len(ordered)]


def _decision(  # noqa: PLR0917  # one call's parts, in the order of the record
    mode: Mode,
    chosen: ExecutorView,
    candidates: Sequence[ExecutorView],
    request: RequestView,
    score: _Score,
    dropped: dict[str, Drop],
    reason: str,
) -> Decision:
    scores = {executor.te_id: score(executor) for executor in candidates}
    return Decision(mode, chosen.te_id, chosen.incarnation, _cached(chosen, request), reason, scores, dropped)


def _cached(executor: ExecutorView, request: RequestView) -> int:
    return min(request.cached_tokens.get(executor.te_id, 0), request.tokens)


def _blocks(executor: ExecutorView, tokens: int) -> int:
    return -(-tokens // max(executor.block_tokens, 1))


def _jitter(executor: ExecutorView, draw: Draw) -> int:
    return zlib.crc32(f"{draw.seed}/{executor.te_id}".encode())
