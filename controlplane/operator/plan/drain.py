"""Who leaves, and when a leaving executor's pod may be deleted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from controlplane.api.resources.modelserving import Role
from controlplane.api.resources.names import PodState, Reason
from controlplane.operator.plan.values import Action, Delete, DrainTe, Mark, Pod, TeState, Timing


def surplus(good: Sequence[Pod], after: Mapping[str, Role], want: Mapping[Role, int]) -> list[Pod]:
    """Good pods above the wanted counts: who does not serve yet first, then who has the fewest tasks."""
    leaving: list[Pod] = []
    for role in Role:
        mine = [pod for pod in good if after[pod.uid] is role]
        mine.sort(
            key=lambda pod: (
                pod.serves,
                pod.te is None or pod.te.state is not TeState.UNREACHABLE,
                pod.te.tasks if pod.te else 0,
                -pod.claimed_at,
                pod.key,
            )
        )
        leaving += mine[: max(0, len(mine) - want.get(role, 0))]
    return leaving


def replaced(
    good: Sequence[Pod], outdated: Sequence[Pod], after: Mapping[str, Role], want: Mapping[Role, int]
) -> list[Pod]:
    """Outdated pods that may leave: without them as many serve as are wanted, or they serve nobody."""
    leaving: list[Pod] = []
    for role in Role:
        old = [pod for pod in outdated if (pod.role or Role.COLOCATED) is role]
        idle = [pod for pod in old if not pod.serves]
        serving = [pod for pod in old if pod.serves]
        serving.sort(key=lambda pod: (pod.te.tasks if pod.te else 0, pod.key))
        ready = sum(pod.serves and after[pod.uid] is role for pod in good)
        spare = ready + len(serving) - want.get(role, 0)
        leaving += idle + serving[: max(0, spare)]
    return leaving


def affordable(going: Sequence[Pod], spare: int) -> list[Pod]:
    """Those that serve nobody, and of the others as many as are above the wanted count of all roles together:
    a role may be met by executors that are still on their way."""
    serving = [pod for pod in going if pod.serves]
    return [pod for pod in going if not pod.serves] + serving[: max(0, spare)]


def begin(pod: Pod) -> Mark:
    return Mark(pod, PodState.DRAINING, Reason.DRAINING)


def drain(pod: Pod, drain_seconds: float, now: float, timing: Timing) -> list[Action]:
    """The next step of a pod that is marked as draining."""
    if pod.deleting:
        return []
    since = pod.drain_since if pod.drain_since is not None else now
    te = pod.te
    if pod.ended or (te is not None and te.state is TeState.FAILED):
        return [Delete(pod, Reason.REPLACED)]
    if now - since >= drain_seconds:
        busy = te is not None and te.tasks + te.transfers > 0
        return [Delete(pod, Reason.DRAIN_TIMED_OUT if busy else Reason.SCALED_DOWN)]
    if te is None:
        return [DrainTe(pod)]
    if te.state is TeState.UNREACHABLE:
        silent = now - (te.silent_since if te.silent_since is not None else now)
        if silent > timing.drain_silent_seconds and now - since > timing.drain_silent_seconds:
            return [Delete(pod, Reason.SCALED_DOWN)]
        return []
    if te.state is TeState.DRAINING and te.tasks == 0 and te.transfers == 0:
        return [Delete(pod, Reason.SCALED_DOWN)]
    return [DrainTe(pod)]
