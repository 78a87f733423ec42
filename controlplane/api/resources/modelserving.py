"""`ModelServing`: one model, served by executors of one accelerator profile, in roles.

The operator claims warm pods for it, loads the model, sets roles and keeps the counts that its RoleScalers
ask for; gateways list it in `/v1/models` whether or not executors run.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import ClassVar, Literal

from pydantic import Field

from controlplane.api.resources.base import (
    AGE,
    MODEL_ID_PATTERN,
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
    rules,
)

MAX_REPLICAS = 1000  # of one role (ours): beyond it the mistake is likelier than the wish
MAX_HISTORY = 20  # entries of scalingHistory (ours): a day of a busy scaler, and a small object
DAY = 86_400


class Role(StrEnum):
    """What an executor prefers to run."""

    COLOCATED = "colocated"
    PREFILL = "prefill"
    DECODE = "decode"


class Engine(StrEnum):
    """What runs the model inside an executor."""

    FLOWSERVE = "flowserve"
    VLLM = "vllm"


class ScalingMode(StrEnum):
    """Who sets the replicas of the roles."""

    AUTO = "Auto"
    ADVISORY = "Advisory"
    MANUAL = "Manual"


class ModelSource(Part):
    """Where the model comes from, and what clients call it."""

    uri: str = Field(
        description="`hf://ORG/NAME[@REVISION][/FILE]`, `pypi://PACKAGE[==VERSION]/PATH` or `file:///PATH`; "
        "may end in `#sha256=HEX`.",
        min_length=8,
        max_length=1024,
        json_schema_extra=rules(
            (
                "self.startsWith('hf://') || self.startsWith('pypi://') || self.startsWith('file:///')",
                "uri must start with hf://, pypi:// or file:///",
            ),
        ),
    )
    id: str | None = Field(
        default=None,
        description="Name in the API; the object's own name where it is left out.",
        pattern=MODEL_ID_PATTERN,
        max_length=128,
    )
    aliases: list[str] = Field(
        default_factory=list,
        description="Further names in the API.",
        max_length=16,
        json_schema_extra=as_set(),
    )


class EngineOptions(Part):
    """How the engine loads the model."""

    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        default="auto", description="Type of weights and KV; `auto` is bfloat16."
    )
    quantization: Literal["none", "int8", "int4"] = Field(
        default="none", description="Weights in blocks of 8 or 4 bits; on `cpu` only."
    )
    kv_cache_bytes: Quantity = Field(
        default="1Gi",
        description="KV pool of each executor, as a quantity. Ranks of an executor share it. `0`: what the "
        "device has room for beside its largest step (not with several ranks).",
    )
    max_model_len: int = Field(
        default=0, ge=0, le=10_000_000, description="Bound of the context in tokens; 0: the model's own."
    )


class RoleSpec(Part):
    """Bounds of one role's executors."""

    min: int = Field(
        default=0,
        ge=0,
        le=MAX_REPLICAS,
        description="Executors that stay, load or not; 0 lets the role go to zero.",
    )
    max: int = Field(default=1, ge=1, le=MAX_REPLICAS, description="Executors at most.")


_ROLE_RULES = rules(("self.min <= self.max", "min must not exceed max"))


class Roles(Part):
    """Executors by role. Either colocated executors, or prefill and decode together, or all three."""

    colocated: RoleSpec | None = Field(
        default=None, description="Executors that serve whole requests.", json_schema_extra=_ROLE_RULES
    )
    prefill: RoleSpec | None = Field(
        default=None, description="Executors that prefer prefills.", json_schema_extra=_ROLE_RULES
    )
    decode: RoleSpec | None = Field(
        default=None, description="Executors that prefer decodes.", json_schema_extra=_ROLE_RULES
    )

    def items(self) -> list[tuple[Role, RoleSpec]]:
        """The roles that are asked for, in the order colocated, prefill, decode."""
        pairs = ((role, getattr(self, role.value)) for role in Role)
        return [(role, spec) for role, spec in pairs if spec is not None]


class Slo(Part):
    """What users should see. The autoscaler adds executors where more requests than allowed miss it."""

    ttft_milliseconds: int | None = Field(
        default=None, ge=1, le=3_600_000, description="Time to the first token."
    )
    tpot_milliseconds: int | None = Field(
        default=None, ge=1, le=600_000, description="Time per further token, averaged over an answer."
    )
    allowed_violations: float = Field(
        default=0.05, ge=0, le=1, description="Share of requests that may miss a target."
    )


class Targets(Part):
    """Signals that the autoscaler holds executors to."""

    queue_seconds: float = Field(
        default=1.0, ge=0.01, le=600, description="Seconds of work that wait per executor of a role."
    )
    kv_utilization: float = Field(
        default=0.85, ge=0.05, le=1, description="Share of a decode (or colocated) executor's KV in use."
    )


class Ratio(Part):
    """Bounds of prefill executors per decode executor, while both are above zero."""

    min: float = Field(default=0.125, ge=0.001, le=1000, description="Prefill per decode at least.")
    max: float = Field(default=8.0, ge=0.001, le=1000, description="Prefill per decode at most.")


class Schedule(Part):
    """Raises minima for a time that comes again, as for office hours."""

    name: str = Field(description="Name in scalingHistory.", pattern=NAME_PATTERN, max_length=40)
    cron: str = Field(
        description="Start, in five fields: minute, hour, day of the month, month, day of the week.",
        pattern=r"^(\S+\s+){4}\S+$",
        max_length=100,
    )
    time_zone: str = Field(default="UTC", description="IANA name of the zone of `cron`.", max_length=64)
    duration_seconds: int = Field(ge=60, le=7 * DAY, description="How long it holds.")
    min_replicas: dict[Role, int] = Field(
        description="Minimum of each role that it raises.",
        min_length=1,
        max_length=3,
        json_schema_extra=rules(
            (
                "self.all(role, role in ['colocated', 'prefill', 'decode'])",
                "minReplicas takes the roles colocated, prefill and decode",
            )
        ),
    )


class Scaling(Part):
    """How the counts of the roles follow the load."""

    mode: ScalingMode = Field(
        default=ScalingMode.AUTO,
        description="`Auto`: the autoscaler sets the replicas; `Advisory`: it only says what it would set; "
        "`Manual`: others do (`kubectl scale rolescaler`, an HPA). Waking from zero works in all three.",
    )
    targets: Targets = Field(default=Targets(), description="Signals and their targets.")
    stable_window_seconds: int = Field(
        default=60, ge=5, le=3600, description="Window of the averages that decide ordinary changes."
    )
    panic_window_seconds: int = Field(
        default=6, ge=1, le=600, description="Window in which a sudden rise is noticed."
    )
    panic_threshold: float = Field(
        default=2.0,
        ge=1.1,
        le=100,
        description="Wanted over current executors, from which on it only scales up.",
    )
    scale_down_delay_seconds: int = Field(
        default=120, ge=0, le=DAY, description="How long fewer executors must suffice before some go."
    )
    scale_to_zero_after_seconds: int = Field(
        default=0,
        ge=0,
        le=30 * DAY,
        description="Seconds without a request after which all roles go to zero; 0: never. "
        "Roles with a `min` above 0 forbid it.",
    )
    sleep_seconds: int = Field(
        default=0,
        ge=0,
        le=30 * DAY,
        description="How long an executor that is not needed any more keeps its pod, asleep: the memory of "
        "its KV is given back, the model's weights stay in host memory, and waking takes milliseconds. Ends "
        "early where another ModelServing lacks executors of the profile. 0: pods are given back at once.",
    )
    max_scale_up_rate: float = Field(
        default=4.0, ge=1.1, le=1000, description="Growth of a role in one decision, as a factor."
    )
    override_hold_seconds: int = Field(
        default=0,
        ge=0,
        le=30 * DAY,
        description="How long replicas set by hand hold; 0: until they are given back with the "
        "annotation deepflow.dev/resume-autoscaling.",
    )
    ratio: Ratio = Field(
        default=Ratio(),
        description="Bounds of prefill per decode executors.",
        json_schema_extra=rules(("self.min <= self.max", "ratio.min must not exceed ratio.max")),
    )
    schedules: list[Schedule] = Field(
        default_factory=list,
        max_length=16,
        description="Times with higher minima.",
        json_schema_extra=keyed("name"),
    )


class Limits(Part):
    """Bounds of what gateways accept for the model while it wakes; each gateway counts for itself."""

    held_requests: int = Field(
        default=256, ge=0, le=100_000, description="Requests held while no executor serves; beyond: 429."
    )
    held_bytes: Quantity = Field(default="64Mi", description="Bytes of their bodies.")
    hold_seconds: int = Field(
        default=300, ge=1, le=3600, description="How long one is held; then 503 with Retry-After."
    )


class ModelServingSpec(Part):
    """What is wanted."""

    model: ModelSource = Field(description="The model.")
    engine: Engine = Field(default=Engine.FLOWSERVE, description="What runs the model.")
    options: EngineOptions = Field(default=EngineOptions(), description="How the engine loads the model.")
    accelerator: str = Field(
        default="cpu",
        description="Accelerator profile of the executors; a WarmPool must offer it.",
        pattern=NAME_PATTERN,
        max_length=40,
    )
    roles: Roles = Field(
        description="Executors by role.",
        json_schema_extra=rules(
            (
                "has(self.colocated) || has(self.prefill) || has(self.decode)",
                "roles must name colocated, or prefill and decode",
            ),
            ("has(self.prefill) == has(self.decode)", "prefill and decode go together"),
            (
                "!has(self.prefill) || !has(self.decode) || "
                "(self.prefill.min == 0) == (self.decode.min == 0)",
                "prefill.min and decode.min are both 0 or both above 0: the roles reach zero together",
            ),
        ),
    )
    slo: Slo | None = Field(
        default=None,
        description="Targets for users.",
        json_schema_extra=rules(
            (
                "has(self.ttftMilliseconds) || has(self.tpotMilliseconds)",
                "slo must have ttftMilliseconds or tpotMilliseconds",
            )
        ),
    )
    scaling: Scaling = Field(
        default=Scaling(),
        description="How counts follow the load.",
        json_schema_extra=rules(
            (
                "self.panicWindowSeconds <= self.stableWindowSeconds",
                "panicWindowSeconds must not exceed stableWindowSeconds",
            ),
        ),
    )
    priority: int = Field(
        default=0,
        ge=-100,
        le=100,
        description="Who gets warm pods first where they are short; higher first. Nothing running is taken.",
    )
    limits: Limits = Field(default=Limits(), description="Bounds of what gateways hold.")
    drain_seconds: int = Field(
        default=120,
        ge=0,
        le=3600,
        description="How long an executor may finish its tasks before its pod is deleted.",
    )


class RoleStatus(Part):
    """Executors of one role as they are."""

    role: Role = Field(description="The role.")
    desired: int = Field(default=0, ge=0, description="Executors that the RoleScaler asks for.")
    ready: int = Field(default=0, ge=0, description="Executors that serve.")
    starting: int = Field(default=0, ge=0, description="Claimed, or loading the model.")
    draining: int = Field(default=0, ge=0, description="Finishing their tasks.")
    asleep: int = Field(default=0, ge=0, description="Not needed now, and quickly woken.")


class ScalingEvent(Part):
    """One change of a role's replicas, or one that advisory mode would have made."""

    time: datetime = Field(description="When.")
    role: Role = Field(description="Of which role.")
    from_: int = Field(alias="from", ge=0, description="Replicas before.")
    to: int = Field(ge=0, description="Replicas after.")
    reason: str = Field(description="Machine-readable cause.", max_length=128)
    message: str = Field(default="", description="The same with its figures.", max_length=1024)
    by: str = Field(default="", description="Who wrote it: autoscaler, activator, or a field manager.",
                    max_length=128)  # fmt: skip
    advisory: bool = Field(default=False, description="True: said, not done.")


class Wake(Part):
    """How the last start from zero went."""

    started_at: datetime = Field(description="When a request asked for it.")
    path: Literal["cold", "warm", "hot", "fork", "wake"] = Field(description="What there was to start from.")
    seconds: float | None = Field(default=None, ge=0, description="Until an executor served.")
    progress: float = Field(default=0, ge=0, le=1, description="Part that is done.")


class ModelServingStatus(Status):
    """What was observed."""

    replicas: str = Field(
        default="", max_length=64, description="Ready over wanted executors by role, as in `P1/1 D2/2`."
    )
    ready_replicas: int = Field(default=0, ge=0, description="Executors that serve, of all roles.")
    roles: list[RoleStatus] = Field(
        default_factory=list, max_length=3, description="By role.", json_schema_extra=keyed("role")
    )
    model_id: str = Field(default="", max_length=128, description="Name in the API.")
    revision: str = Field(
        default="", max_length=256, description="Revision of the model that the executors serve."
    )
    url: str = Field(default="", max_length=512, description="Where clients reach it inside the cluster.")
    last_activity: datetime | None = Field(default=None, description="Time of the last request.")
    last_wake: Wake | None = Field(default=None, description="How the last start from zero went.")
    scaling_history: list[ScalingEvent] = Field(
        default_factory=list,
        max_length=MAX_HISTORY,
        description="The last changes of replicas, newest first.",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )


class ModelServing(Resource):
    """One served model."""

    kind: Literal["ModelServing"] = "ModelServing"
    spec: ModelServingSpec = Field(
        description="What is wanted.",
        json_schema_extra=rules(
            (
                "self.engine != 'vllm' || (!has(self.roles.prefill) && !has(self.roles.decode))",
                "engine vllm serves colocated only",
            ),
            (
                "self.engine != 'vllm' || self.options.quantization == 'none'",
                "quantization is flowserve's: vllm reads the model's own",
            ),
            (
                "self.engine != 'vllm' || self.scaling.sleepSeconds == 0",
                "executors of engine vllm do not sleep: sleepSeconds must be 0",
            ),
            (
                "self.scaling.scaleToZeroAfterSeconds == 0 || "
                "((!has(self.roles.colocated) || self.roles.colocated.min == 0) && "
                "(!has(self.roles.prefill) || self.roles.prefill.min == 0) && "
                "(!has(self.roles.decode) || self.roles.decode.min == 0))",
                "scaleToZeroAfterSeconds needs min 0 in every role",
            ),
        ),
    )
    status: ModelServingStatus = Field(
        default_factory=ModelServingStatus, description="What was observed; the operator writes it."
    )

    plural: ClassVar[str] = "modelservings"
    short_names: ClassVar[tuple[str, ...]] = ("msv",)
    about: ClassVar[str] = (
        "A model, served by executors that are claimed from warm pools. It stays in `/v1/models` at zero."
    )
    columns: ClassVar[tuple[Column, ...]] = (
        READY,
        REASON,
        Column(name="Model", type="string", path=".status.modelId", description="Name in the API."),
        Column(
            name="Replicas", type="string", path=".status.replicas", description="Ready over wanted, by role."
        ),
        Column(
            name="Accelerator",
            type="string",
            path=".spec.accelerator",
            description="Accelerator profile.",
            priority=1,
        ),
        Column(
            name="URL", type="string", path=".status.url", description="Where clients reach it.", priority=1
        ),
        AGE,
    )
    # Owned objects are named NAME-ROLE and pods take a suffix: 63 less both.
    name_max: ClassVar[int] = 40

    @property
    def model_id(self) -> str:
        """The name in the API."""
        return self.spec.model.id or self.metadata.name
