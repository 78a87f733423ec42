"""RoleScalers: who decides the replicas of a role, and what is said of them.

The managed fields of `spec.replicas` tell who wrote it last. Anyone but the operator's own writers is an
override (`kubectl scale`, an HPA, an edited manifest): it holds until its time is over or it is given back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from controlplane.api.resources.modelserving import ModelServing, Role
from controlplane.api.resources.names import (
    ANNOTATION_RESUME,
    LABEL_ROLE,
    LABEL_SERVING,
    OWNER_ACTIVATOR,
    OWNER_AUTOSCALER,
    OWNER_OPERATOR,
    ConditionType,
    Reason,
)
from controlplane.api.resources.warmpool import WarmPool
from controlplane.kube.client import Conflict
from controlplane.kube.resources import ROLE_SCALERS, Json, Key, key_of, uid_of
from controlplane.operator.plan.status import Said
from controlplane.operator.plan.values import Plan
from controlplane.operator.pods import format_time, parse_time
from controlplane.operator.statuses import conditions_of, write_status

if TYPE_CHECKING:
    from controlplane.operator.cluster import Cluster

SOMEBODY = "scale"
CONFLICT_TRIES = 4
OURS = {OWNER_OPERATOR, OWNER_ACTIVATOR, OWNER_AUTOSCALER}


@dataclass(slots=True)
class ScalingState:
    """What the scaling loop last saw of a ModelServing."""

    signals: bool = True
    at_limit: bool = False
    waking: bool = False
    recommended: dict[Role, int] = field(default_factory=dict)
    wake: Json | None = None  # status.lastWake
    last_activity: float | None = None  # seconds since the epoch, by our clock

    def status(self, before: Json) -> Json:
        """Its part of the ModelServing's status. Activity alone never causes a write: it would be one per
        request; it is written with what else changes."""
        said: Json = {}
        wake = self.wake or before.get("lastWake")
        if wake is not None:
            said["lastWake"] = wake
        return said


def replicas_of(scaler: Json) -> int:
    return int((scaler.get("spec") or {}).get("replicas") or 0)


def role_of(scaler: Json) -> Role | None:
    role = (scaler.get("spec") or {}).get("role")
    return Role(role) if role in set(Role) else None


def owner_uid(scaler: Json) -> str:
    references = scaler["metadata"].get("ownerReferences") or [{}]
    return str(references[0].get("uid") or "")


def read_pool(obj: Json) -> WarmPool:
    """Raises pydantic.ValidationError."""
    return WarmPool.model_validate(obj)


def replicas_owner(scaler: Json) -> str:
    """The field manager that wrote spec.replicas last; "" if none is known.

    Zero set through /scale is owned by nobody: a Scale leaves a zero out, and with it the owner. None of ours
    writes there, so it was somebody else. An apply that changed nothing has no time: one of ours took the
    count over as somebody else had left it.
    """
    entries = scaler["metadata"].get("managedFields") or ()
    owners = [
        (str(entry.get("time") or ""), str(entry.get("manager") or ""))
        for entry in entries
        if "f:replicas" in ((entry.get("fieldsV1") or {}).get("f:spec") or {})
        and entry.get("subresource") != "status"
    ]
    if not owners:
        return SOMEBODY if entries else ""
    taken_over = [manager for time, manager in owners if not time and manager in OURS]
    return taken_over[0] if taken_over else max(owners)[1]


def override_of(scaler: Json, hold_seconds: float, now: float) -> Json | None:
    """`status.override` as it shall be: who else than ours wrote the replicas, and until when that holds. It
    stands until one of ours writes them: without it the same count would be taken for a new override."""
    owner = replicas_owner(scaler)
    if not owner or owner in OURS or ANNOTATION_RESUME in (scaler["metadata"].get("annotations") or {}):
        return None
    known = (scaler.get("status") or {}).get("override") or {}
    replicas = replicas_of(scaler)
    same = known.get("by") == owner and known.get("replicas") == replicas
    since = parse_time(known.get("since")) if same else None
    since = since if since is not None else now
    said: Json = {"by": owner[:128], "replicas": replicas, "since": format_time(since)}
    if hold_seconds:
        said["until"] = format_time(since + hold_seconds)
    return said


def seconds_left(override: Json, now: float) -> float:
    """How long it holds, to its whole second; not above 0: it is over."""
    until = parse_time(override.get("until"))
    return math.inf if until is None else until - now


def overrides(
    cluster: Cluster, key: Key, serving: ModelServing, now: float | None = None
) -> dict[Role, Json]:
    """Overrides in force, by role."""
    found: dict[Role, Json] = {}
    for role, _ in serving.spec.roles.items():
        scaler = cluster.scaler(key, role)
        if scaler is not None:
            hold = float(serving.spec.scaling.override_hold_seconds)
            now = cluster.wall() if now is None else now
            said = override_of(scaler, hold, now)
            if said is not None and seconds_left(said, now) > 0:
                found[role] = said
    return found


async def say(
    cluster: Cluster,
    key: Key,
    serving: ModelServing,
    *,
    plan: Plan,
    now: float,
) -> None:
    """Writes the status of each RoleScaler that changed."""
    state = cluster.scaling.get(key)
    for role, bounds in serving.spec.roles.items():
        scaler = cluster.scaler(key, role)
        if scaler is None or scaler["metadata"].get("deletionTimestamp"):
            continue
        ready, starting, draining = plan.counts.get(role, (0, 0, 0))
        wanted = max(bounds.min, min(replicas_of(scaler), bounds.max))
        if ready >= wanted:
            said = Said(ConditionType.READY, True, Reason.ALL_READY, f"{ready} of {wanted} serve.")
        else:
            said = Said(ConditionType.READY, False, Reason.PODS_NOT_READY, f"{ready} of {wanted} serve.")
        generation = int(scaler["metadata"].get("generation") or 0)
        status: Json = {
            "observedGeneration": generation,
            "conditions": conditions_of([said], scaler.get("status") or {}, generation, now),
            "replicas": ready + starting + draining,
            "readyReplicas": ready,
            "selector": f"{LABEL_SERVING}={key[1]},{LABEL_ROLE}={role.value}",
        }
        if state is not None and role in state.recommended:
            status["recommended"] = state.recommended[role]
        override = override_of(scaler, float(serving.spec.scaling.override_hold_seconds), now)
        if override is not None:
            status["override"] = override
        elif (scaler.get("status") or {}).get("override"):
            # An applied status without the field gives it up; `None` makes the difference seen.
            gone = {**(scaler.get("status") or {})}
            gone.pop("override")
            scaler = {**scaler, "status": {**gone, "observedGeneration": -1}}
        await write_status(cluster.api, cluster.scalers, ROLE_SCALERS, scaler, status)


async def set_replicas(
    cluster: Cluster, scaler: Json, replicas: int, manager: str, *, clear_resume: bool = False
) -> None:
    """Applies spec.replicas under `manager`, if nobody else wrote them since they were read; statuses are
    written all the time, so a conflict alone says nothing. Raises Conflict."""
    meta, read = scaler["metadata"], scaler
    for left in reversed(range(CONFLICT_TRIES)):
        body = {
            "metadata": {
                "namespace": meta.get("namespace", ""),
                "name": meta["name"],
                "uid": uid_of(scaler),
                "resourceVersion": read["metadata"]["resourceVersion"],
            },
            "spec": {"replicas": replicas},
        }
        try:
            written = await cluster.api.apply(ROLE_SCALERS, body, manager=manager, force=True)
            break
        except Conflict:
            fresh = await cluster.refresh(ROLE_SCALERS, cluster.scalers, key_of(scaler), uid_of(scaler))
            seen = (replicas_of(scaler), replicas_owner(scaler))
            if not left or fresh is None or (replicas_of(fresh), replicas_owner(fresh)) != seen:
                raise
            read = fresh
    cluster.scalers.assume(written)
    if clear_resume and ANNOTATION_RESUME in (written["metadata"].get("annotations") or {}):
        patch = {"metadata": {"annotations": {ANNOTATION_RESUME: None}}}
        changed = await cluster.api.patch(
            ROLE_SCALERS, meta.get("namespace", ""), meta["name"], patch, manager=manager
        )
        cluster.scalers.assume(changed)
