"""Statuses as they are written: applied under the operator's name, and only when they differ.

A condition's time changes with its status and with nothing else, so a status that says the same is equal to
what is stored, and an idle system writes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from controlplane.api.resources.names import OWNER_OPERATOR
from controlplane.kube.client import KubeApi, NotFound
from controlplane.kube.reflector import Store
from controlplane.kube.resources import Json, ResourceType
from controlplane.operator.plan.status import Said
from controlplane.operator.pods import format_time


def conditions_of(said: Sequence[Said], before: Json, generation: int, now: float) -> list[Json]:
    """Conditions on the wire; those that say the same keep their time."""
    old = {c.get("type"): c for c in before.get("conditions") or []}
    result: list[Json] = []
    for one in said:
        status = "True" if one.status else "False"
        known = old.get(one.type.value)
        same = known is not None and known.get("status") == status
        result.append(
            {
                "type": one.type.value,
                "status": status,
                "reason": one.reason.value,
                "message": one.message[:4096],
                "lastTransitionTime": known["lastTransitionTime"] if known and same else format_time(now),
                "observedGeneration": generation,
            }
        )
    return result


async def write_status(
    api: KubeApi,
    store: Store,
    resource: ResourceType,
    obj: Json,
    status: Mapping[str, object],
    *,
    manager: str = OWNER_OPERATOR,
) -> bool:
    """Applies `status` unless the object says all of it already. False: nothing was written."""
    stored = obj.get("status") or {}
    if all(stored.get(name) == value for name, value in status.items()):
        return False
    meta = {"namespace": obj["metadata"].get("namespace", ""), "name": obj["metadata"]["name"]}
    body = {"metadata": meta, "status": dict(status)}
    try:
        written = await api.apply(resource, body, manager=manager, force=True, subresource="status")
    except NotFound:
        return False
    store.assume(written)
    return True
