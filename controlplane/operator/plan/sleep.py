"""Who sleeps instead of leaving, who is woken instead of a claim, and when a sleeper's pod is given back.

An executor that is not needed any more gives the memory of its KV back and keeps its pod for a while, with
the model's weights in host memory: waking costs tens of milliseconds, where a claim takes a load at least.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from controlplane.api.resources.modelserving import Role
from controlplane.api.resources.names import PodState, Reason
from controlplane.operator.plan import drain
from controlplane.operator.plan.roles import next_epoch
from controlplane.operator.plan.values import Action, Mark, Pod, Serving, SleepTe, TeState, WakePod


def begin(pod: Pod) -> Mark:
    return Mark(pod, PodState.ASLEEP, Reason.FELL_ASLEEP)


def may_sleep(serving: Serving, pod: Pod) -> bool:
    """Whether a surplus executor sleeps: one that serves nobody yet has nothing to keep."""
    return serving.sleep_seconds > 0 and not serving.deleting and not serving.crowded and pod.serves


def wakes(lacking: Mapping[Role, int], sleepers: Sequence[Pod]) -> list[WakePod]:
    """One sleeper for each lacking executor, of the same role where there is one, the last to sleep first."""
    left = sorted(
        (pod for pod in sleepers if _can_wake(pod)), key=lambda pod: (-(pod.asleep_since or 0.0), pod.key)
    )
    chosen: list[WakePod] = []
    for role, count in lacking.items():
        for _ in range(count):
            pod = next((pod for pod in left if pod.role is role), left[0] if left else None)
            if pod is not None:
                left.remove(pod)
                chosen.append(WakePod(pod, role, next_epoch(pod)))
    return chosen


def keep(serving: Serving, sleepers: Sequence[Pod], now: float) -> tuple[list[Action], float | None]:
    """What is due for sleepers that nobody wakes, and in how many seconds the next is given back."""
    actions: list[Action] = []
    ends: list[float] = []
    for pod in sleepers:
        left = (pod.asleep_since if pod.asleep_since is not None else now) + serving.sleep_seconds - now
        if left <= 0 or serving.deleting or serving.crowded:
            actions.append(drain.begin(pod))
            continue
        ends.append(left)
        if pod.te is not None and pod.te.state is TeState.READY:
            actions.append(SleepTe(pod))
    return actions, min(ends, default=None)


def _can_wake(pod: Pod) -> bool:
    return pod.te is not None and pod.te.state in (TeState.SLEEPING, TeState.READY, TeState.WARM)
