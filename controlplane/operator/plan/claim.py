"""Which warm pods become whose."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

from controlplane.api.resources.modelserving import Role
from controlplane.api.resources.names import PodState
from controlplane.operator.plan.values import Claim, Key, Pod


@dataclass(frozen=True, slots=True)
class Want:
    """What one ModelServing lacks, for the sharing of warm pods."""

    key: Key
    priority: int
    missing: int
    since: float


def rank(want: Want) -> tuple[int, float, Key]:
    """Who comes first."""
    return (-want.priority, want.since, want.key)


def claimable(pods: Sequence[Pod]) -> list[Pod]:
    """Warm pods that are ready, oldest first: they have proved themselves longest."""
    free = [p for p in pods if p.state is PodState.WARM and p.ready and not p.deleting and not p.ended]
    return sorted(free, key=lambda pod: (pod.created, pod.key))


def fastest(free: Sequence[Pod], uri: str, *places: Container[tuple[str, str]]) -> list[Pod]:
    """`free` with those first that have what lies at `uri` already: pairs of (pod's uid, URI) in the first of
    `places`, then in the next. Otherwise in their order."""

    def place(pod: Pod) -> int:
        return next((number for number, place in enumerate(places) if (pod.uid, uri) in place), len(places))

    return sorted(free, key=place)


def share(free: int, mine: Want, others: Sequence[Want]) -> int:
    """How many of `free` warm pods one ModelServing may take: a higher priority comes first, then who has
    waited longer."""
    before = sum(other.missing for other in others if other.key != mine.key and rank(other) < rank(mine))
    return max(0, min(mine.missing, free - before))


def claims(lacking: Mapping[Role, int], free: Sequence[Pod]) -> list[Claim]:
    """One pod each, the roles in turn: neither prefill nor decode waits until the other has all."""
    left = {role: count for role, count in lacking.items() if count > 0}
    chosen: list[Claim] = []
    for pod in free:
        if not left:
            break
        taken = {role: sum(claim.role is role for claim in chosen) for role in left}
        role = min(left, key=lambda r: (taken[r], list(Role).index(r)))
        left[role] -= 1
        if not left[role]:
            del left[role]
        chosen.append(Claim(pod, role, 1))
    return chosen
