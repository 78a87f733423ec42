"""What is said of a ModelServing and a WarmPool: conditions with their reasons. Only what was seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from controlplane.api.resources.modelserving import Role, ScalingMode
from controlplane.api.resources.names import ConditionType, PodState, Reason
from controlplane.operator.plan.values import Plan, Pod, Pool

Json = dict[str, object]


@dataclass(frozen=True, slots=True)
class Said:
    """One condition, without its time."""

    type: ConditionType
    status: bool
    reason: Reason
    message: str


@dataclass(frozen=True, slots=True)
class Facts:
    """What a ModelServing's status is made of."""

    want: Mapping[Role, int]
    plan: Plan
    pods: Sequence[Pod]
    pool_pods: Sequence[Pod]  # of its profile
    refusal: tuple[Reason, str] | None = None  # why the spec cannot be served
    load_error: str = ""
    paused: bool = False
    deleting: bool = False
    waking: bool = False
    mode: ScalingMode = ScalingMode.AUTO
    overridden: tuple[str, ...] = ()  # roles whose replicas somebody else set
    signals: bool = True
    at_limit: bool = False


def conditions(facts: Facts) -> list[Said]:
    """All conditions, `Ready` first."""
    rest = [_accepted(facts), _capacity(facts), _roles(facts), _scaling(facts)]
    return [_ready(facts, rest), *rest]


def _accepted(facts: Facts) -> Said:
    if facts.refusal is not None:
        return Said(ConditionType.ACCEPTED, False, *facts.refusal)
    return Said(ConditionType.ACCEPTED, True, Reason.VALID, "The spec can be served.")


def _capacity(facts: Facts) -> Said:
    missing = facts.plan.missing
    if not missing:
        return Said(ConditionType.CAPACITY, True, Reason.SUFFICIENT, "Every wanted executor has a pod.")
    problem, text = pool_problem(facts.pool_pods)
    if problem is not None:
        return Said(ConditionType.CAPACITY, False, problem, f"{_executors(missing)} missing: {text}")
    return Said(
        ConditionType.CAPACITY,
        False,
        Reason.POOL_EMPTY,
        f"{_executors(missing)} missing: the pool is filling.",
    )


def _roles(facts: Facts) -> Said:
    lacking = [
        f"{serving} of {facts.want.get(role, 0)} {role.value}"
        for role, (serving, _, _) in facts.plan.counts.items()
        if serving < facts.want.get(role, 0)
    ]
    if facts.load_error:
        return Said(ConditionType.ROLES_READY, False, Reason.LOAD_FAILED, facts.load_error)
    if not lacking:
        return Said(ConditionType.ROLES_READY, True, Reason.ALL_READY, "Every role has its executors.")
    starting = sum(count for _, count, _ in facts.plan.counts.values())
    reason = Reason.LOADING if starting else Reason.PODS_NOT_READY
    return Said(ConditionType.ROLES_READY, False, reason, "Serving: " + ", ".join(lacking) + ".")


def _scaling(facts: Facts) -> Said:
    if facts.mode is ScalingMode.MANUAL:
        return Said(ConditionType.SCALING_ACTIVE, False, Reason.MANUAL, "Replicas are set by others.")
    if facts.overridden:
        return Said(
            ConditionType.SCALING_ACTIVE,
            False,
            Reason.OVERRIDDEN,
            f"Replicas of {', '.join(facts.overridden)} were set by somebody else.",
        )
    if facts.mode is ScalingMode.ADVISORY:
        return Said(ConditionType.SCALING_ACTIVE, False, Reason.ADVISORY, "Decisions are said, not done.")
    if not facts.signals:
        return Said(ConditionType.SCALING_ACTIVE, False, Reason.NO_SIGNALS, "No executor reports its load.")
    if facts.at_limit:
        return Said(ConditionType.SCALING_ACTIVE, True, Reason.AT_LIMIT, "More is wanted than max allows.")
    return Said(ConditionType.SCALING_ACTIVE, True, Reason.ACTIVE, "Replicas follow the load.")


def _ready(facts: Facts, rest: Sequence[Said]) -> Said:
    """True: a request is answered now, or held and answered after a wake."""

    def said(status: bool, reason: Reason, message: str) -> Said:
        return Said(ConditionType.READY, status, reason, message)

    serving = {role: counts[0] for role, counts in facts.plan.counts.items()}
    wanted = sum(facts.want.values())
    works = can_serve(serving)
    if facts.deleting:
        return said(False, Reason.DELETING, "Executors finish their tasks.")
    refused = next((one for one in rest if one.type is ConditionType.ACCEPTED and not one.status), None)
    if refused is not None and not works:
        return said(False, refused.reason, refused.message)
    if facts.paused:
        return said(works, Reason.PAUSED, "The operator changes nothing.")
    if not wanted:
        if sum(serving.values()):
            return said(True, Reason.DRAINING, "Executors finish their tasks before it is at zero.")
        return said(True, Reason.SCALED_TO_ZERO, "At zero: a request is held and wakes it.")
    short = sum(max(0, facts.want.get(role, 0) - count) for role, count in serving.items())
    bad = [one for one in rest if not one.status and one.type is not ConditionType.SCALING_ACTIVE]
    if works and short:
        why = f" {bad[0].message}" if bad else ""
        return said(True, Reason.DEGRADED, f"{_executors(short)} of {wanted} missing.{why}")
    if works:
        count = sum(serving.values())
        return said(True, Reason.SERVING, f"{_executors(count)} {'serves' if count == 1 else 'serve'}.")
    if bad and bad[0].reason not in (Reason.LOADING, Reason.PODS_NOT_READY, Reason.POOL_EMPTY):
        return said(False, bad[0].reason, bad[0].message)
    return said(False, Reason.WAKING if facts.waking else Reason.STARTING, bad[0].message if bad else "")


def can_serve(serving: Mapping[Role, int]) -> bool:
    """Roles are preferences: any executor that serves can serve whole requests."""
    return sum(serving.values()) > 0


def summary(want: Mapping[Role, int], plan: Plan) -> str:
    """Ready over wanted by role, as in `P1/1 D2/2`."""
    letters = {Role.COLOCATED: "C", Role.PREFILL: "P", Role.DECODE: "D"}
    parts = [
        f"{letters[role]}{plan.counts[role][0] if role in plan.counts else 0}/{want.get(role, 0)}"
        for role in Role
        if role in want
    ]
    return " ".join(parts)


def pool_problem(pods: Sequence[Pod]) -> tuple[Reason | None, str]:
    """What keeps pods from becoming warm: the commonest problem first."""
    problems = [pod for pod in pods if pod.problem is not None and not pod.deleting]
    if not problems:
        return None, ""
    kinds = sorted({pod.problem for pod in problems if pod.problem}, key=lambda reason: reason.value)
    most = max(kinds, key=lambda reason: sum(pod.problem is reason for pod in problems))
    return most, next(pod.problem_text for pod in problems if pod.problem is most)[:500]


def pool_condition(pool: Pool, pods: Sequence[Pod], failed: str = "") -> Said:
    """A pool's `Ready`."""
    free = [pod for pod in pods if pod.state is PodState.WARM and not pod.deleting]
    ready = sum(pod.ready for pod in free)
    if failed and ready < pool.size:
        return Said(ConditionType.READY, False, Reason.POD_FAILED, failed)
    problem, text = pool_problem(free)
    if problem is not None and ready < pool.size:
        return Said(ConditionType.READY, False, problem, text)
    if ready < pool.size:
        return Said(ConditionType.READY, False, Reason.POOL_EMPTY, f"{ready} of {pool.size} are warm.")
    return Said(ConditionType.READY, True, Reason.SUFFICIENT, f"{ready} are warm.")


def _executors(count: int) -> str:
    return "1 executor" if count == 1 else f"{count} executors"
