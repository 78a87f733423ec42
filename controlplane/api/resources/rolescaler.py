"""`RoleScaler`: the replicas of one role of a ModelServing, with a `scale` subresource.

A kind has one `/scale`, a served model has several counts; so each role has an object of its own. The
operator makes them. Whoever may scale writes `spec.replicas` under a field owner of its own (autoscaler,
activator, a person with `kubectl scale`, an HPA), and who owns the field is who decided last.
"""

from __future__ import annotations

from datetime import datetime
from typing import ClassVar, Literal

from pydantic import Field

from controlplane.api.resources.base import AGE, NAME_PATTERN, READY, Column, Part, Resource, Status, rules
from controlplane.api.resources.modelserving import MAX_REPLICAS, Role


class RoleScalerSpec(Part):
    """What is wanted."""

    model_serving: str = Field(
        description="Name of the ModelServing, in the same namespace.",
        pattern=NAME_PATTERN,
        max_length=40,
        json_schema_extra=rules(("self == oldSelf", "modelServing cannot be changed")),
    )
    role: Role = Field(
        description="The role.", json_schema_extra=rules(("self == oldSelf", "role cannot be changed"))
    )
    replicas: int = Field(
        default=0,
        ge=0,
        le=MAX_REPLICAS,
        description="Executors wanted; the operator keeps to the bounds of the ModelServing.",
    )


class Override(Part):
    """Replicas that somebody else than the autoscaler has set."""

    by: str = Field(description="Field manager that owns spec.replicas.", max_length=128)
    replicas: int = Field(ge=0, description="What it has set.")
    since: datetime = Field(description="When.")
    until: datetime | None = Field(default=None, description="When it ends by itself; absent: not.")


class RoleScalerStatus(Status):
    """What was observed."""

    replicas: int = Field(default=0, ge=0, description="Executors that exist in the role.")
    ready_replicas: int = Field(default=0, ge=0, description="Executors that serve in the role.")
    recommended: int | None = Field(
        default=None, ge=0, description="What the autoscaler holds right, also in advisory mode."
    )
    selector: str = Field(
        default="", max_length=512, description="Label selector of the role's pods, for /scale."
    )
    override: Override | None = Field(default=None, description="Who decided in the autoscaler's place.")


class RoleScaler(Resource):
    """Replicas of one role."""

    kind: Literal["RoleScaler"] = "RoleScaler"
    spec: RoleScalerSpec = Field(description="What is wanted.")
    status: RoleScalerStatus = Field(
        default_factory=RoleScalerStatus, description="What was observed; the operator writes it."
    )

    plural: ClassVar[str] = "rolescalers"
    short_names: ClassVar[tuple[str, ...]] = ("rsc",)
    about: ClassVar[str] = (
        "Replicas of one role of a ModelServing. The operator makes one per role; `kubectl scale` and HPAs "
        "work on it."
    )
    columns: ClassVar[tuple[Column, ...]] = (
        Column(name="Serving", type="string", path=".spec.modelServing", description="The ModelServing."),
        Column(name="Role", type="string", path=".spec.role", description="The role."),
        Column(name="Wanted", type="integer", path=".spec.replicas", description="Executors wanted."),
        Column(
            name="Serves", type="integer", path=".status.readyReplicas", description="Executors that serve."
        ),
        Column(
            name="Recommended",
            type="integer",
            path=".status.recommended",
            description="What the autoscaler holds right.",
        ),
        Column(
            name="Override",
            type="string",
            path=".status.override.by",
            description="Who decided in the autoscaler's place.",
        ),
        READY.model_copy(update={"priority": 1}),
        AGE,
    )
    scale: ClassVar[tuple[str, str, str] | None] = (".spec.replicas", ".status.replicas", ".status.selector")
