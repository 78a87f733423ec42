"""The decision: who is fit, which mode, who of them.

1. Filter. Right revision, not excluded, ready, not draining, link healthy, step loop alive, room for the
   task and its KV. Every refusal has a reason (`Why`).
2. Mode. Prefill and decode are split when the uncached tokens reach the policy's threshold and a prefill
   and another, decode executor are fit; where colocated executors are fit too, the less queued side wins.
   Else unified: on colocated executors, then decode ones, then prefill ones: any role can run any kind.
3. Pick by policy; ties by seeded jitter.

The decode executor is chosen late, when the prefill hands over (`decide_decode`): the view is fresher by
a whole prefill, and no decode blocks sit reserved meanwhile. The price is that the pull starts only then.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence

from controlplane.scheduling.types import (
    ClusterView,
    Decision,
    ExecutorView,
    Kind,
    Link,
    Mode,
    Policy,
    PolicyName,
    RequestView,
    Role,
    Score,
    Unplaceable,
    Why,
)

_WHYS = tuple(Why)
_MASK = (1 << 64) - 1


def refusal(executor: ExecutorView, request: RequestView, policy: Policy) -> Why | None:
    """Why this executor cannot take the request now; None if it can."""
    if executor.revision != request.revision:
        return Why.NONE
    if executor.te_id in request.excluded:
        return Why.EXCLUDED
    if not executor.ready or executor.draining:
        return Why.NOT_READY
    if executor.link in (Link.SUSPECT, Link.DOWN) or executor.step_age_seconds > policy.max_step_age_seconds:
        return Why.UNREACHABLE
    # Room for what is there and one more token; growth beyond it is the engine's to preempt for.
    blocks = math.ceil((request.tokens + 1) / executor.block_tokens)
    if blocks > executor.kv_blocks_total or 0 < executor.max_model_len <= request.tokens:
        return Why.TOO_LARGE
    cached_blocks = request.cached.get(executor.te_id, 0) // executor.block_tokens
    if executor.tasks >= executor.max_tasks or blocks - cached_blocks > executor.kv_blocks_free:
        return Why.FULL
    return None


def decide(view: ClusterView, request: RequestView, policy: Policy) -> Decision | Unplaceable:
    """Places a task that has no KV anywhere but what is cached."""
    fit, why = _filter(view, request, policy)
    if not fit:
        return Unplaceable(why, _explain(why, request))
    by_role = {role: [executor for executor in fit if executor.role is role] for role in Role}
    prefill, decode, colocated = by_role[Role.PREFILL], by_role[Role.DECODE], by_role[Role.COLOCATED]
    unified = colocated or decode or prefill
    uncached = request.tokens - max(_cached(executor, request) for executor in unified)
    if not (prefill and decode):
        lacking = "prefill" if not prefill else "decode"
        reason = f"no fit {lacking} executor" if prefill or decode else "only colocated executors are fit"
        return _pick(unified, request, policy, kind=Kind.UNIFIED, mode=Mode.UNIFIED, reason=reason)
    if uncached < policy.min_uncached_tokens:
        reason = f"{uncached} uncached tokens, split from {policy.min_uncached_tokens} on"
        return _pick(unified, request, policy, kind=Kind.UNIFIED, mode=Mode.UNIFIED, reason=reason)
    if colocated:
        # The load guard where the paper's disaggregated side overloads first (DeepServe Fig. 7).
        split = min(_prefill_seconds(executor, request, policy) for executor in prefill)
        whole = min(_prefill_seconds(executor, request, policy) for executor in colocated)
        if whole < split:
            reason = f"colocated executors answer in {whole:.3f} s, prefill ones in {split:.3f} s"
            return _pick(colocated, request, policy, kind=Kind.UNIFIED, mode=Mode.UNIFIED, reason=reason)
    reason = f"{uncached} uncached tokens, prefill and decode executors are fit"
    return _pick(prefill, request, policy, kind=Kind.PREFILL, mode=Mode.DISAGGREGATED, reason=reason)


def decide_decode(
    view: ClusterView, request: RequestView, policy: Policy, source: str
) -> Decision | Unplaceable:
    """Places the decode half of a task whose prefill `source` has handed over.

    Decode executors first, then colocated, then prefill ones. If only the source itself is fit, the
    answer is a unified task there: its prefix is cached, nothing needs to be moved.
    """
    fit, why = _filter(view, request, policy)
    others = [executor for executor in fit if executor.te_id != source]
    for role in (Role.DECODE, Role.COLOCATED, Role.PREFILL):
        candidates = [executor for executor in others if executor.role is role]
        if candidates:
            reason = f"{role} executor with headroom"
            return _pick(
                candidates, request, policy, kind=Kind.DECODE, mode=Mode.DISAGGREGATED, reason=reason
            )
    if fit:
        return _pick(
            fit, request, policy, kind=Kind.UNIFIED, mode=Mode.UNIFIED, reason="only the source itself is fit"
        )
    return Unplaceable(why, _explain(why, request))


# -- filter --------------------------------------------------------------------------------------


def _filter(view: ClusterView, request: RequestView, policy: Policy) -> tuple[list[ExecutorView], Why]:
    """The fit executors (those that failed the task before only if there are no others), or why none is."""
    fit: list[ExecutorView] = []
    nearest = Why.NONE
    for executor in view.executors:
        why = refusal(executor, request, policy)
        if why is None:
            fit.append(executor)
        elif _WHYS.index(why) > _WHYS.index(nearest):
            nearest = why
    others = [executor for executor in fit if executor.te_id not in request.avoided]
    return others or fit, nearest


def _explain(why: Why, request: RequestView) -> str:
    text = {
        Why.NONE: "no executor holds {0}",
        Why.EXCLUDED: "every executor of {0} has refused this request",
        Why.NOT_READY: "no executor of {0} is ready",
        Why.UNREACHABLE: "no executor of {0} answers",
        Why.TOO_LARGE: "{1} tokens fit no executor of {0}",
        Why.FULL: "every executor of {0} is full",
    }
    return text[why].format(request.revision, request.tokens)


# -- estimates -----------------------------------------------------------------------------------


def _cached(executor: ExecutorView, request: RequestView) -> int:
    return min(request.cached.get(executor.te_id, 0), request.tokens)


def _prefill_seconds(executor: ExecutorView, request: RequestView, policy: Policy) -> float:
    """Until the prompt is through: all queued prompt tokens and its own uncached ones, at its rate."""
    rate = executor.prefill_tokens_per_second or policy.default_prefill_rate
    own = request.tokens - _cached(executor, request)
    return (executor.queued_prefill_tokens + own) / rate


def _decode_seconds(executor: ExecutorView, policy: Policy) -> float:
    """Until a new sequence's first token: queued prompts go first, then one step.

    A step grows with the sequences in it; one mean step for each is the upper bound, and ranks right.
    """
    rate = executor.prefill_tokens_per_second or policy.default_prefill_rate
    step = executor.decode_step_seconds or policy.default_step_seconds
    return executor.queued_prefill_tokens / rate + step * (executor.tasks + 1)


def _seconds(executor: ExecutorView, request: RequestView, policy: Policy, kind: Kind) -> float:
    if kind is Kind.PREFILL:
        return _prefill_seconds(executor, request, policy)
    if kind is Kind.DECODE:
        # Little headroom means preemption soon: the wait doubles as the pool fills up.
        free = executor.kv_blocks_free / max(1, executor.kv_blocks_total)
        return _decode_seconds(executor, policy) * (2.0 - free)
    own = request.tokens - _cached(executor, request)
    rate = executor.prefill_tokens_per_second or policy.default_prefill_rate
    return _decode_seconds(executor, policy) + own / rate


# -- pick ----------------------------------------------------------------------------------------


def _pick(
    candidates: Sequence[ExecutorView],
    request: RequestView,
    policy: Policy,
    *,
    kind: Kind,
    mode: Mode,
    reason: str,
) -> Decision:
    scores = {executor.te_id: _score(executor, request, policy, kind) for executor in candidates}
    preferred = scores.get(request.preferred) if request.preferred is not None else None
    if preferred is not None:
        chosen, how = preferred.te_id, "its siblings' prefix is there"
    elif len(candidates) == 1:
        chosen, how = candidates[0].te_id, "the only one"
    elif policy.name is PolicyName.ROUND_ROBIN:
        names = sorted(scores)
        chosen, how = names[request.counter % len(names)], f"turn {request.counter}"
    elif policy.name is PolicyName.PREFIX_AFFINITY and kind is not Kind.DECODE:
        # A decode task brings its KV along: only load counts for it.
        bound = (
            policy.affinity_load_factor * (sum(score.tasks for score in scores.values()) / len(scores)) + 1
        )
        within = [score for score in scores.values() if score.tasks <= bound]
        chosen = _least(within, request, lambda score: (-score.cached_tokens, score.seconds))
        how = f"longest cached prefix among those with at most {bound:.1f} tasks"
    else:
        chosen = _least(list(scores.values()), request, lambda score: (score.seconds,))
        how = "least estimated wait"
    executor = next(executor for executor in candidates if executor.te_id == chosen)
    return Decision(
        te_id=chosen,
        incarnation=executor.incarnation,
        kind=kind,
        mode=mode,
        cached_tokens=scores[chosen].cached_tokens,
        reasons=(reason, how),
        scores=tuple(scores.values()),
    )


def _score(executor: ExecutorView, request: RequestView, policy: Policy, kind: Kind) -> Score:
    return Score(
        te_id=executor.te_id,
        seconds=_seconds(executor, request, policy, kind),
        tasks=executor.tasks,
        cached_tokens=_cached(executor, request),
        headroom_blocks=executor.kv_blocks_free,
    )


def _least(scores: Sequence[Score], request: RequestView, key: Callable[[Score], tuple[float, ...]]) -> str:
    return min(scores, key=lambda score: (*key(score), jitter(request.seed, score.te_id))).te_id


def jitter(seed: int, te_id: str) -> int:
    """A place in an order that differs from seed to seed (splitmix64's finalizer)."""
    value = (seed + zlib.crc32(te_id.encode()) * 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
