"""Who changes his role instead of leaving: a role is a preference of a running executor, so a surplus on one
side and a lack on another cost one call, no drain, no claim and no load."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from controlplane.api.resources.modelserving import Role
from controlplane.operator.plan.values import Assign, Pod, PushRole, TeState


def change_roles(good: Sequence[Pod], want: Mapping[Role, int]) -> tuple[list[Assign], dict[str, Role]]:
    """Changes, and the role of each pod (by uid) after them. Who serves comes first, idle before busy."""
    have = Counter(pod.role for pod in good)
    after = {pod.uid: pod.role or Role.COLOCATED for pod in good}
    changes: list[Assign] = []
    lacking = [role for role in Role for _ in range(max(0, want.get(role, 0) - have[role]))]
    for role in lacking:
        spare = [
            pod
            for pod in good
            if pod.role is not role and after[pod.uid] is pod.role and have[pod.role] > want.get(pod.role, 0)
        ]
        if not spare:
            break
        chosen = min(spare, key=lambda pod: (not pod.serves, pod.te.tasks if pod.te else 0, pod.key))
        have[chosen.role] -= 1
        have[role] += 1
        after[chosen.uid] = role
        changes.append(Assign(chosen, role, next_epoch(chosen)))
    return changes, after


def next_epoch(pod: Pod) -> int:
    """Above every epoch that labels or the executor know."""
    return max(pod.epoch, pod.te.epoch if pod.te else 0) + 1


def push_role(pod: Pod) -> Assign | PushRole | None:
    """What is missing until the executor has the role of its labels."""
    te = pod.te
    if te is None or te.state is TeState.UNREACHABLE or pod.role is None:
        return None
    if (te.role, te.epoch) == (pod.role, pod.epoch):
        return None
    if te.epoch >= pod.epoch:  # set behind our back, or by a leader whose labels were lost
        return Assign(pod, pod.role, te.epoch + 1)
    return PushRole(pod, pod.role, pod.epoch)
