"""`WarmPool`: started, model-agnostic executors of one accelerator profile that wait for a model.

It is the one template of its profile's pods: image, device, resources, where they may run. A ModelServing
claims pods out of pools of its profile, and the operator fills the pool up behind it.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from controlplane.api.resources.base import (
    AGE,
    NAME_PATTERN,
    READY,
    REASON,
    Column,
    Part,
    Quantity,
    Resource,
    Status,
    as_set,
    keyed,
    opaque,
    rules,
)

MAX_POOL = 10_000
GRACE_SECONDS = 180  # above the largest default drain (120 s) and the executor's own end


class Resources(Part):
    """Resources of the executor's container, as in a pod."""

    requests: dict[str, Quantity] = Field(
        default_factory=dict, max_length=16, description="What the scheduler sets aside."
    )
    limits: dict[str, Quantity] = Field(
        default_factory=dict, max_length=16, description="What the kernel enforces; accelerators go here."
    )


class Toleration(Part):
    """As in a pod."""

    key: str | None = Field(default=None, max_length=316, description="Taint key; absent: all.")
    operator: Literal["Exists", "Equal"] = Field(default="Equal", description="How value is compared.")
    value: str | None = Field(default=None, max_length=63, description="Taint value.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        default=None, description="Taint effect; absent: all."
    )
    toleration_seconds: int | None = Field(
        default=None, ge=0, description="How long NoExecute is tolerated; absent: for ever."
    )


class EnvVar(Part):
    """A variable of the executor's environment."""

    name: str = Field(
        min_length=1, max_length=256, pattern=r"^[-._a-zA-Z][-._a-zA-Z0-9]*$", description="Its name."
    )
    value: str | None = Field(default=None, max_length=32_768, description="Its value.")
    value_from: dict[str, Any] | None = Field(
        default=None, description="A reference, as in a pod.", json_schema_extra=opaque()
    )


class CacheVolume(Part):
    """Where fetched models lie in a pod."""

    claim_name: str | None = Field(
        default=None,
        max_length=253,
        description="A PersistentVolumeClaim that all pods of the pool share; absent: an emptyDir each.",
    )
    size_limit: Quantity | None = Field(default=None, description="Bound of the emptyDir.")
    medium: Literal["", "Memory"] = Field(default="", description="`Memory`: the emptyDir is a tmpfs.")


class WeightsVolume(Part):
    """Memory of a pod in which weights lie, in the form that its device computes with. A container that is
    started again finds them there, and other pods can be fed from it instead of fetching the model."""

    size_limit: Quantity | None = Field(
        default=None,
        description="Bound of the memory, which counts as the executor's; `0`: none, weights are the"
        " process's alone. Absent: none on accelerators, the executor's memory limit on `cpu`.",
    )
    reserve: Quantity = Field(
        default="0",
        description="Of it, taken and zeroed while the pod is warm, so that weights of this size arrive"
        " without waiting for memory.",
    )
    ahead: bool = Field(
        default=True,
        description="Whether warm pods hold weights of the models that are likely to be wanted next (used"
        " lately, due by a schedule, named by a ModelCache or by `models`), so that starts read no storage.",
    )


class WarmPoolSpec(Part):
    """What is wanted."""

    accelerator: str = Field(
        description="Accelerator profile that the pods offer.",
        pattern=NAME_PATTERN,
        max_length=40,
        json_schema_extra=rules(("self == oldSelf", "accelerator cannot be changed: make another pool")),
    )
    engine: Literal["flowserve", "vllm"] = Field(
        default="flowserve",
        description="What the executors run models with; `image` must hold it. ModelServings take pods of "
        "their own engine.",
        json_schema_extra=rules(("self == oldSelf", "engine cannot be changed: make another pool")),
    )
    size: int = Field(
        default=1, ge=0, le=MAX_POOL, description="Warm pods to keep; those that were claimed do not count."
    )
    max_pods: int = Field(
        default=MAX_POOL,
        ge=1,
        le=MAX_POOL,
        description="Pods of the pool at most, those that were claimed included.",
    )
    image: str = Field(min_length=1, max_length=512, description="Image of the executor.")
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = Field(
        default="IfNotPresent", description="As in a pod."
    )
    image_pull_secrets: list[str] = Field(
        default_factory=list,
        max_length=16,
        description="Secrets that the image is pulled with.",
        json_schema_extra=as_set(),
    )
    device: str = Field(
        default="cpu",
        description="Device of the executor: `cpu`, `cuda[:N]` or `npu[:N]`.",
        pattern=r"^(cpu|(cuda|npu)(:[0-9]{1,3})?)$",
        max_length=16,
    )
    tensor_parallel: int = Field(
        default=1, ge=1, le=64, description="Ranks that share each model, a device each."
    )
    threads: int = Field(
        default=0,
        ge=0,
        le=1024,
        description="Compute threads; 0: all cores of the node, or of the pod's cpuset where it has one.",
    )
    resources: Resources = Field(default=Resources(), description="Of the executor's container.")
    args: list[str] = Field(
        default_factory=list, max_length=64, description="Further options of the executor's command line."
    )
    env: list[EnvVar] = Field(
        default_factory=list,
        max_length=64,
        description="Further environment.",
        json_schema_extra=keyed("name"),
    )
    node_selector: dict[str, str] = Field(
        default_factory=dict, max_length=32, description="Labels of the nodes that pods may run on."
    )
    tolerations: list[Toleration] = Field(
        default_factory=list, max_length=32, description="Taints that the pods tolerate."
    )
    affinity: dict[str, Any] | None = Field(
        default=None, description="As in a pod.", json_schema_extra=opaque()
    )
    runtime_class_name: str | None = Field(default=None, max_length=253, description="As in a pod.")
    priority_class_name: str | None = Field(default=None, max_length=253, description="As in a pod.")
    service_account_name: str | None = Field(
        default=None,
        max_length=253,
        description="As in a pod; executors need no rights, and get no token.",
    )
    termination_grace_period_seconds: int = Field(
        default=GRACE_SECONDS, ge=1, le=7200, description="Until a pod that was told to end is killed."
    )
    cache: CacheVolume = Field(
        default=CacheVolume(),
        description="Where fetched models lie.",
        json_schema_extra=rules(
            (
                "!has(self.claimName) || !has(self.sizeLimit)",
                "cache takes a claimName or the sizeLimit of an emptyDir, not both",
            )
        ),
    )
    weights: WeightsVolume = Field(default=WeightsVolume(), description="Where loaded weights lie.")
    models: list[str] = Field(
        default_factory=list,
        max_length=64,
        description="Model URIs that every pod of the pool fetches ahead, as by a ModelCache.",
        json_schema_extra=as_set(),
    )


class WarmPoolStatus(Status):
    """What was observed."""

    replicas: int = Field(default=0, ge=0, description="Pods that are not claimed.")
    ready: int = Field(default=0, ge=0, description="Warm pods, free to be claimed.")
    starting: int = Field(default=0, ge=0, description="Pods on their way.")
    claimed: int = Field(default=0, ge=0, description="Pods of the pool that ModelServings hold.")
    selector: str = Field(default="", max_length=512, description="Label selector of the free pods.")


class WarmPool(Resource):
    """Warm executors of one profile."""

    kind: Literal["WarmPool"] = "WarmPool"
    spec: WarmPoolSpec = Field(
        description="What is wanted.",
        json_schema_extra=rules(("self.size <= self.maxPods", "size must not exceed maxPods")),
    )
    status: WarmPoolStatus = Field(
        default_factory=WarmPoolStatus, description="What was observed; the operator writes it."
    )

    plural: ClassVar[str] = "warmpools"
    short_names: ClassVar[tuple[str, ...]] = ("wp",)
    about: ClassVar[str] = "Started executors of one accelerator profile that wait for a model."
    columns: ClassVar[tuple[Column, ...]] = (
        READY,
        REASON,
        Column(
            name="Accelerator", type="string", path=".spec.accelerator", description="Accelerator profile."
        ),
        Column(name="Size", type="integer", path=".spec.size", description="Warm pods to keep."),
        Column(name="Warm", type="integer", path=".status.ready", description="Free to be claimed."),
        Column(name="Starting", type="integer", path=".status.starting", description="On their way."),
        Column(name="Claimed", type="integer", path=".status.claimed", description="Held by ModelServings."),
        AGE,
    )
    scale: ClassVar[tuple[str, str, str] | None] = (".spec.size", ".status.replicas", ".status.selector")
    name_max: ClassVar[int] = 40
