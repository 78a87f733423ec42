"""Who is dead and goes at once, and who is to be replaced by somebody better first."""

from __future__ import annotations

from collections.abc import Sequence

from controlplane.operator.plan.values import Pod, Serving, TeState, Timing


def is_dead(pod: Pod, now: float, timing: Timing) -> bool:
    """Certainly serves nobody: ended, failed, hung, or silent while its kubelet does not call it ready."""
    if pod.ended:
        return True
    te = pod.te
    if te is None:
        return False
    if te.state is TeState.FAILED or te.hung:
        return True
    if te.state is not TeState.UNREACHABLE or pod.ready:
        return False
    silent = now - (te.silent_since if te.silent_since is not None else now)
    return silent > timing.silent_seconds and now - pod.claimed_at > timing.start_seconds


def is_outdated(
    pod: Pod, serving: Serving, template_hashes: frozenset[str], now: float, timing: Timing
) -> bool:
    """Claimed for another source or options, made from an older template, drained behind our back, or silent
    to us while its kubelet calls it ready: it may still serve, so another must be ready before it goes."""
    if pod.load_hash != serving.load_hash:
        return True
    if pod.template_hash and template_hashes and pod.template_hash not in template_hashes:
        return True
    te = pod.te
    if te is None:
        return False
    if te.state is TeState.DRAINING:
        return True
    return (
        te.state is TeState.UNREACHABLE
        and te.silent_since is not None
        and now - te.silent_since > timing.silent_seconds
        and now - pod.claimed_at > timing.start_seconds
    )


def split(
    pods: Sequence[Pod], serving: Serving, template_hashes: frozenset[str], now: float, timing: Timing
) -> tuple[list[Pod], list[Pod], list[Pod]]:
    """(dead, outdated, good) of those that are neither draining nor being deleted."""
    dead: list[Pod] = []
    outdated: list[Pod] = []
    good: list[Pod] = []
    for pod in pods:
        if is_dead(pod, now, timing):
            dead.append(pod)
        elif is_outdated(pod, serving, template_hashes, now, timing):
            outdated.append(pod)
        else:
            good.append(pod)
    return dead, outdated, good
