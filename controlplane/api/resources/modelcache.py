"""`ModelCache`: models that are brought to executors' pods ahead of the load, with progress per node.

Files lie in the cache volume of each pod of the pools named, so a claimed pod loads at once what was kept.
`status.nodes` sums the pods of a node up: a model is ready there when all of them have it.
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
    Resource,
    Status,
    as_set,
    keyed,
    rules,
)


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


class ModelCacheSpec(Part):
    """What is wanted."""

    models: list[CachedModel] = Field(
        min_length=1, max_length=64, description="Models to keep.", json_schema_extra=keyed("uri")
    )
    pools: list[str] = Field(
        default_factory=list,
        max_length=64,
        description="WarmPools whose pods keep them; none: all of the namespace.",
        json_schema_extra=as_set(),
    )


class ModelProgress(Part):
    """A model on a node."""

    uri: str = Field(max_length=1024, description="The model.")
    state: CacheState = Field(
        default=CacheState.PENDING, description="How far it is, in the pod that is behind the others."
    )
    bytes_done: int = Field(default=0, ge=0, description="Bytes in that pod.")
    bytes_total: int | None = Field(default=None, ge=0, description="Bytes in all, once known.")
    message: str = Field(default="", max_length=1024, description="What went wrong.")


class NodeProgress(Part):
    """Models on one node."""

    name: str = Field(max_length=253, description="The node.")
    pods: int = Field(default=0, ge=0, description="Pods on it that keep the models.")
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
    wanted_nodes: int = Field(default=0, ge=0, description="Nodes with pods that shall have them.")


class ModelCache(Resource):
    """Models kept on nodes."""

    kind: Literal["ModelCache"] = "ModelCache"
    spec: ModelCacheSpec = Field(description="What is wanted.")
    status: ModelCacheStatus = Field(
        default_factory=ModelCacheStatus, description="What was observed; the operator writes it."
    )

    plural: ClassVar[str] = "modelcaches"
    short_names: ClassVar[tuple[str, ...]] = ("mcache",)
    about: ClassVar[str] = "Models that are kept in executors' pods, so that they load at once."
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
            description="Nodes with pods that shall have them.",
        ),
        AGE,
    )
