"""One WarmPool: warm pods are made, kept, renewed after a change of the template, and taken away."""

from __future__ import annotations

from collections.abc import Sequence

from controlplane.api.resources.names import PodState, Reason
from controlplane.operator.plan.values import Action, Create, Delete, Plan, Pod, Pool, TeState

MAX_CREATED = 64
"""New pods of one turn: a pool of thousands fills in steps that others can get between."""
MAX_RESTARTS = 5
"""A warm executor that died so often will not live (ours)."""
HOLD_SECONDS = 10.0
"""After a pod failed: others of the same template would too."""


def plan_pool(pool: Pool, pods: Sequence[Pod], now: float) -> Plan:
    """`pods`: all that carry the pool's name, claimed ones too."""
    warm = [pod for pod in pods if pod.state is PodState.WARM and not pod.deleting]
    claimed = sum(pod.state is not PodState.WARM and not pod.deleting for pod in pods)
    leaving = sum(pod.deleting for pod in pods)
    if pool.deleting:
        return Plan(
            tuple(Delete(pod, Reason.GARBAGE_COLLECTED, unchanged=True) for pod in warm[:MAX_CREATED])
        )
    actions: list[Action] = []
    alive: list[Pod] = []
    for pod in warm:
        failed = pod.te is not None and pod.te.state is TeState.FAILED
        if pod.ended or failed or pod.restarts > MAX_RESTARTS:
            actions.append(Delete(pod, Reason.POD_FAILED, unchanged=True))
        else:
            alive.append(pod)
    room = max(0, pool.max_pods - claimed - leaving)
    want = min(pool.size + pool.missing, room)
    current = [pod for pod in alive if pod.template_hash == pool.template_hash]
    old = [pod for pod in alive if pod.template_hash != pool.template_hash]
    ready = sum(pod.ready for pod in current)
    # New ones first, one above the count if need be; an old one goes once enough are ready without it.
    create = min(want - len(current), want + bool(old) - len(alive), room - len(alive), MAX_CREATED)
    old.sort(key=lambda pod: (pod.ready, pod.created, pod.key))
    spare = ready + sum(pod.ready for pod in old) - want
    go = [pod for pod in old if not pod.ready]
    go += [pod for pod in old if pod.ready][: max(0, spare)]
    if old and not go and create <= 0 and len(current) < want:
        go = old[:1]  # no room for a new one beside it: one at a time
    actions += [Delete(pod, Reason.REPLACED, unchanged=True) for pod in go[:MAX_CREATED]]
    extra = len(current) - want
    if extra > 0:
        current.sort(key=lambda pod: (pod.ready, -pod.created, pod.key))
        actions += [
            Delete(pod, Reason.SCALED_DOWN, unchanged=True) for pod in current[: min(extra, MAX_CREATED)]
        ]
    again: float | None = None
    if create > 0:
        if now < pool.hold_until:
            again = pool.hold_until - now
        else:
            actions.append(Create(create))
    return Plan(tuple(actions), missing=max(0, pool.size + pool.missing - want), again_after=again)
