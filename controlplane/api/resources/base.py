"""What all kinds share: metadata, conditions, quantities, and how a type says what its schema holds.

A field's bounds and description are pydantic's; what OpenAPI cannot say (CEL rules, list maps) is put
beside them with `rules` and `keyed`. Field names are snake_case here and camelCase on the wire.
"""

from __future__ import annotations

import re
from datetime import datetime
from decimal import Decimal
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from controlplane.api.resources.names import API_VERSION

# Kubernetes names (RFC 1123 labels). Owned objects add a role's name, so ModelServings stop at 40.
NAME_PATTERN = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
MODEL_ID_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._:-]*$"  # as `deepflow up --model URI=ID` takes them
QUANTITY_PATTERN = r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"
_SUFFIXES: dict[str, Decimal] = {
    "": Decimal(1), "m": Decimal("0.001"),
    "k": Decimal(10**3), "M": Decimal(10**6), "G": Decimal(10**9), "T": Decimal(10**12),
    "Ki": Decimal(2**10), "Mi": Decimal(2**20), "Gi": Decimal(2**30), "Ti": Decimal(2**40),
}  # fmt: skip

Json = dict[str, Any]


def rules(*pairs: tuple[str, str]) -> Json:
    """Schema extra of an object: CEL expressions, each with the message that a refused user reads."""
    return {"x-kubernetes-validations": [{"rule": rule, "message": message} for rule, message in pairs]}


def keyed(*keys: str) -> Json:
    """Schema extra of a list that is a map by `keys`, so that writers own entries and not the whole."""
    return {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": list(keys)}


def as_set() -> Json:
    """Schema extra of a list without doubles."""
    return {"x-kubernetes-list-type": "set"}


def opaque() -> Json:
    """Schema extra of an object that another API defines and that is passed on as it is."""
    return {"type": "object", "x-kubernetes-preserve-unknown-fields": True}


def parse_quantity(value: str | int) -> int:
    """Bytes (or units) of a Kubernetes quantity, rounded down. Raises ValueError."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([A-Za-z]*)", str(value))
    if match is None or match[2] not in _SUFFIXES:
        raise ValueError(f"{value!r} is no quantity: write 512Mi, 2Gi or a number")
    return int(Decimal(match[1]) * _SUFFIXES[match[2]])


Quantity = Annotated[
    str | int,
    Field(
        json_schema_extra={"x-kubernetes-int-or-string": True, "pattern": QUANTITY_PATTERN, "maxLength": 32}
    ),
]


class Part(BaseModel):
    """A part of a resource. Unknown fields are dropped, as the API server does: an older operator may
    meet a newer definition."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="ignore")

    def wire(self) -> Json:
        """JSON as the API server takes it: camelCase, times as RFC 3339, unset fields left out."""
        return self.model_dump(by_alias=True, exclude_none=True, mode="json")


class OwnerReference(Part):
    api_version: str = ""
    kind: str = ""
    name: str = ""
    uid: str = ""
    controller: bool | None = None
    block_owner_deletion: bool | None = None


class ObjectMeta(Part):
    """The metadata that we read. Not part of the definitions: the API server has its own schema for it."""

    name: str = ""
    namespace: str = ""
    uid: str = ""
    resource_version: str = ""
    generation: int = 0
    labels: dict[str, str] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)
    finalizers: list[str] = Field(default_factory=list)
    owner_references: list[OwnerReference] = Field(default_factory=list)
    creation_timestamp: datetime | None = None
    deletion_timestamp: datetime | None = None
    managed_fields: list[Json] = Field(default_factory=list)


class Condition(Part):
    """One observed aspect of the object, as in the Kubernetes API conventions."""

    type: str = Field(description="Aspect, in CamelCase.", max_length=64)
    status: Literal["True", "False", "Unknown"] = Field(description="Whether it holds.")
    reason: str = Field(
        description="Machine-readable cause of the last change, in CamelCase.", min_length=1, max_length=128
    )
    message: str = Field(default="", description="The same for people.", max_length=4096)
    last_transition_time: datetime = Field(description="When the status last changed.")
    observed_generation: int | None = Field(
        default=None, ge=0, description="Generation of the spec that this was said of."
    )


class Status(Part):
    """What every status has."""

    observed_generation: int | None = Field(
        default=None, ge=0, description="Generation of the spec that this status answers."
    )
    conditions: list[Condition] = Field(
        default_factory=list,
        max_length=16,
        description="Observed aspects; `Ready` sums them up.",
        json_schema_extra=keyed("type"),
    )

    def condition(self, name: str) -> Condition | None:
        return next((c for c in self.conditions if c.type == name), None)


class Column(BaseModel):
    """A column of `kubectl get`; priority 1 shows with `-o wide` only."""

    model_config = ConfigDict(frozen=True)

    name: str
    type: Literal["string", "integer", "date"]
    path: str
    description: str
    priority: int = 0


AGE = Column(
    name="Age", type="date", path=".metadata.creationTimestamp", description="Time since it was created."
)
READY = Column(
    name="Ready",
    type="string",
    path='.status.conditions[?(@.type=="Ready")].status',
    description="Whether it does what its spec asks for.",
)
REASON = Column(
    name="Reason",
    type="string",
    path='.status.conditions[?(@.type=="Ready")].reason',
    description="Why it is, or is not.",
)


class Resource(Part):
    """A kind. Class variables say what its definition holds beside the schema."""

    api_version: str = API_VERSION
    kind: str
    metadata: ObjectMeta = Field(default_factory=ObjectMeta)

    plural: ClassVar[str]
    short_names: ClassVar[tuple[str, ...]]
    about: ClassVar[str]  # one or two sentences of the definition's description
    columns: ClassVar[tuple[Column, ...]]
    # Paths of the scale subresource: spec replicas, status replicas, label selector.
    scale: ClassVar[tuple[str, str, str] | None] = None
    name_max: ClassVar[int] = 63

    @property
    def key(self) -> tuple[str, str]:
        """Namespace and name."""
        return self.metadata.namespace, self.metadata.name
