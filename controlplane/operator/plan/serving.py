"""One ModelServing: its executors from claim to deletion."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from controlplane.api.resources.modelserving import Role
from controlplane.api.resources.names import PodState, Reason
from controlplane.operator.plan import drain, replace, roles, sleep
from controlplane.operator.plan.claim import claims
from controlplane.operator.plan.start import start
from controlplane.operator.plan.values import Action, Delete, Plan, Pod, Serving, Timing

STARTING_AGAIN_SECONDS = 5.0
"""While something is on its way, look again without being told."""
SLEEPING_AGAIN_SECONDS = 10.0
"""While executors sleep: others may come to lack theirs."""


def plan_serving(
    serving: Serving,
    pods: Sequence[Pod],
    free: Sequence[Pod],
    now: float,
    *,
    may_claim: int,
    template_hashes: frozenset[str] = frozenset(),
    timing: Timing | None = None,
) -> Plan:
    """`pods`: all that carry the ModelServing's name. `free`: warm pods that are not spoken for, of which at
    most `may_claim` are taken. `template_hashes`: current ones of the profile's pools; empty: unknown."""
    timing = timing or Timing()
    want = dict.fromkeys(Role, 0) if serving.deleting else {role: serving.want.get(role, 0) for role in Role}
    mine = [pod for pod in pods if pod.serving_uid == serving.uid]
    strangers = [pod for pod in pods if pod.serving_uid != serving.uid]  # of a namesake that was deleted
    active = [pod for pod in mine if not pod.deleting and pod.state is not PodState.DRAINING]
    dead, outdated, kept = replace.split(active, serving, template_hashes, now, timing)
    sleepers = [pod for pod in kept if pod.state is PodState.ASLEEP]
    good = [pod for pod in kept if pod.state is not PodState.ASLEEP]
    actions: list[Action] = [Delete(pod, Reason.REPLACED) for pod in dead]

    changes, after = roles.change_roles(good, want)
    actions += changes
    have = Counter(after.values())
    old = Counter((pod.role or Role.COLOCATED) for pod in outdated)
    # Outdated executors keep their places until they may go: counts exceed the wanted by the surge only.
    lacking = {
        role: max(0, min(want[role] - have[role], want[role] + timing.surge - have[role] - old[role]))
        for role in Role
    }
    woken = sleep.wakes(lacking, sleepers)
    actions += woken
    lacking = {role: count - sum(wake.role is role for wake in woken) for role, count in lacking.items()}
    made = claims(lacking, free[: max(0, may_claim)])
    actions += made
    roused = {wake.pod.uid for wake in woken}
    due, given_back = sleep.keep(serving, [pod for pod in sleepers if pod.uid not in roused], now)
    actions += due

    surplus = drain.surplus(good, after, want)
    going = [*drain.replaced(good, outdated, after, want), *surplus]
    spare = sum(pod.serves for pod in (*good, *outdated)) - sum(want.values())
    leaving = {pod.uid: pod for pod in drain.affordable(going, spare)}
    changed = {change.pod.uid for change in changes}
    for pod in good:
        if pod.uid not in leaving and pod.uid not in changed:
            actions += start(pod)
    for pod in (
        *leaving.values(),
        *(p for p in strangers if p.state is not PodState.DRAINING and not p.deleting),
    ):
        if pod.ended:
            actions.append(Delete(pod, Reason.GARBAGE_COLLECTED))
        elif pod in surplus and sleep.may_sleep(serving, pod):
            actions.append(sleep.begin(pod))
        else:
            actions.append(drain.begin(pod))
    draining = [pod for pod in pods if pod.state is PodState.DRAINING]
    for pod in draining:
        actions += drain.drain(pod, serving.drain_seconds, now, timing)

    counts = {
        role: (
            sum(pod.serves and after.get(pod.uid, pod.role) is role for pod in (*good, *outdated)),
            sum(not pod.serves and after[pod.uid] is role for pod in good),
            sum(pod.role is role for pod in draining),
        )
        for role in Role
    }
    missing = sum(lacking.values()) - len(made)
    moving = bool(actions or draining or outdated or missing or (serving.deleting and pods)) or any(
        not pod.serves or pod.silent for pod in good
    )
    again = STARTING_AGAIN_SECONDS if moving else None
    if sleepers and not moving:
        again = min(SLEEPING_AGAIN_SECONDS, given_back or SLEEPING_AGAIN_SECONDS)
    return Plan(
        actions=tuple(actions[: timing.max_actions]),
        missing=missing,
        again_after=again,
        outdated=len(outdated),
        counts=counts,
        asleep={role: sum(pod.role is role for pod in sleepers) for role in Role},
    )
