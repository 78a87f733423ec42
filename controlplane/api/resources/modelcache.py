"""`ModelCache`: models that are kept on nodes, ahead of the pods that load them, with progress per node.

Each node's agent writes its own entry of `status.nodes`; the list is a map by name, so agents never
write over each other.
"""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar, Literal

from pydantic import Field

from controlplane.api.resources.base import (
    AGE,
    READY,
    REASON,
    Column,
    Part,
    Quantity,
    Resource,
    Status,
    keyed,
    rules,
)
from controlplane.api.resources.warmpool import Toleration


class CacheState(StrEnum):
    """How far a model is on a node."""

    PENDING = "Pending"
    FETCHING = "Fetching"
    READY = "Ready"
    FAILED = "Failed"


class CachedModel(Part):
    """A model to keep."""

    uri: str = Field(
        description="As in ModelServing.",
        min_length=8,
        max_length=1024,
        json_schema_extra=rules(
            (
                "self.startsWith('hf://') || self.startsWith('pypi://') || self.startsWith('file:///')",
                "uri must start with hf://, pypi:// or file:///",
            ),
        ),
    )
    medium: Literal["Disk", "Memory"] = Field(
        default="Disk", description="`Memory`: its pages are kept in the node's memory too."
    )


class ModelCacheSpec(Part):
    """What is wanted."""

    models: list[CachedModel] = Field(
        min_length=1, max_length=64, description="Models to keep.", json_schema_extra=keyed("uri")
    )
    node_selector: dict[str, str] = Field(
        default_factory=dict, max_length=32, description="Labels of the nodes that keep them; none: all."
    )
    tolerations: list[Toleration] = Field(
        default_factory=list, max_length=32, description="Taints of nodes that keep them."
    )
    max_bytes: Quantity | None = Field(
        default=None, description="Bound on each node; models beyond it fail with the reason."
    )


class ModelProgress(Part):
    """A model on a node."""

    uri: str = Field(max_length=1024, description="The model.")
    state: CacheState = Field(default=CacheState.PENDING, description="How far it is.")
    bytes_done: int = Field(default=0, ge=0, description="Bytes on the node.")
    bytes_total: int | None = Field(default=None, ge=0, description="Bytes in all, once known.")
    message: str = Field(default="", max_length=1024, description="What went wrong.")


class NodeProgress(Part):
    """Models on one node."""

    name: str = Field(max_length=253, description="The node.")
    models: list[ModelProgress] = Field(
        default_factory=list,
        max_length=64,
        description="Its models.",
        json_schema_extra=keyed("uri"),
    )


class ModelCacheStatus(Status):
    """What was observed."""

    nodes: list[NodeProgress] = Field(
        default_factory=list, max_length=5000, description="Progress by node.",
        json_schema_extra=keyed("name"),
    )  # fmt: skip
    ready_nodes: int = Field(default=0, ge=0, description="Nodes that have all models.")
    wanted_nodes: int = Field(default=0, ge=0, description="Nodes that shall have them.")


class ModelCache(Resource):
    """Models kept on nodes."""

    kind: Literal["ModelCache"] = "ModelCache"
    spec: ModelCacheSpec = Field(description="What is wanted.")
    status: ModelCacheStatus = Field(
        default_factory=ModelCacheStatus, description="What was observed; node agents write it."
    )

    plural: ClassVar[str] = "modelcaches"
    short_names: ClassVar[tuple[str, ...]] = ("mcache",)
    about: ClassVar[str] = "Models that are kept on nodes' disks or in their memory."
    columns: ClassVar[tuple[Column, ...]] = (
        READY,
        REASON,
        Column(
            name="Nodes", type="integer", path=".status.readyNodes", description="Nodes that have all models."
        ),
        Column(
            name="Wanted",
            type="integer",
            path=".status.wantedNodes",
            description="Nodes that shall have them.",
        ),
        AGE,
    )
