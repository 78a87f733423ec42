"""Values of the placement policy. Times in seconds, lengths in tokens or blocks, nothing mutable."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from controlplane.scheduling.heatmap import HeatMap


class Role(enum.StrEnum):
    """What an executor prefers to run; any executor runs anything when it must."""

    COLOCATED = "colocated"
    PREFILL = "prefill"
    DECODE = "decode"


class Mode(enum.StrEnum):
    UNIFIED = "unified"  # one task on one executor
    DISAGGREGATED = "disaggregated"  # a prefill task now, its decode task placed after handover


class PolicyName(enum.StrEnum):
    ROUND_ROBIN = "round_robin"
    LEAST_LOADED = "least_loaded"
    PREFIX_AFFINITY = "prefix_affinity"
    COMBINED = "combined"


class Drop(enum.StrEnum):
    """Why an executor was not a candidate."""

    NOT_READY = "not_ready"
    REVISION = "other_revision"
    DRAINING = "draining"
    LINK = "link_not_up"
    HUNG = "step_loop_hung"
    EXCLUDED = "excluded"
    TOO_LARGE = "too_large"  # it could not hold the sequence even when empty
    HELD_BACK = "held_back"  # its queue or its steps are long: what comes next may matter more
    TASKS_FULL = "tasks_full"
    KV_FULL = "kv_full"

    @property
    def passes(self) -> bool:
        """Waiting for running work is enough to make the executor fit."""
        return self in (Drop.TASKS_FULL, Drop.KV_FULL, Drop.HELD_BACK)


class Reason(enum.StrEnum):
    """Why nothing could be chosen."""

    NO_EXECUTOR = "no_executor"  # none serves the revision now
    BUSY = "busy"  # some do, and none has headroom
    TOO_LARGE = "too_large"  # some do, and none could ever hold it


@dataclass(frozen=True, slots=True)
class ExecutorView:
    """One executor now: its last load report plus what was submitted to it since."""

    te_id: str
    incarnation: str
    role: Role
    model_revision: str
    ready: bool = True
    draining: bool = False
    link_up: bool = True
    step_age_seconds: float = 0.0
    tasks: int = 0  # waiting and running, unreported ones included
    max_tasks: int = 256
    queued_tokens: int = 0  # uncached prompt tokens still to compute
    prefill_tokens_per_second: float = 0.0  # 0 = nothing seen yet
    decode_step_seconds: float = 0.0  # 0 = nothing seen yet
    kv_blocks_total: int = 0
    kv_blocks_free: int = 0
    block_tokens: int = 16
    max_model_len: int = 0  # 0 = unknown


@dataclass(frozen=True, slots=True)
class ClusterView:
    executors: tuple[ExecutorView, ...]


@dataclass(frozen=True, slots=True)
class RequestView:
    """What placement needs to know of one task."""

    model_revision: str
    tokens: int  # prompt and output so far: what must be in the KV cache
    output_left: int = 1  # tokens still to sample at most
    unified_only: bool = False
    cached_tokens: Mapping[str, int] = field(default_factory=dict)  # te_id -> leading tokens in its cache
    excluded: frozenset[str] = frozenset()  # avoided while another executor serves the revision
    never: frozenset[str] = frozenset()  # cannot run it
    prefer: str | None = None  # where siblings run: taken while within the load bound
    predicted_output: int | None = None  # tokens still to sample, as expected; None = nobody knows
    affinity: int | None = None  # 64 bits of the prompt's beginning: where it goes while nobody caches it


@dataclass(frozen=True, slots=True)
class Draw:
    """What changes from call to call: a turn for round robin, a seed for ties."""

    turn: int = 0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Policy:
    name: PolicyName = PolicyName.COMBINED
    min_uncached_tokens: int = 0
    """Prompts with fewer uncached tokens run unified. 0: disaggregate whenever both roles are fit
    (ours; the threshold that pays depends on the link between the roles)."""
    max_step_age_seconds: float = 10.0
    """An engine's step aims below 0.5 s; twenty of them without a turn is a hung loop (ours)."""
    affinity_slack_seconds: float = 1.0
    affinity_slack_ratio: float = 1.5
    """A cached prefix is followed while the executor's queue is at most ratio x shortest + slack (ours)."""
    default_prefill_rate: float = 2000.0
    """Tokens per second assumed before an executor reported one (ours: it only ranks empty executors)."""
    default_step_seconds: float = 0.05
    task_share: float = 0.1
    """What a running task adds to the queue in front of a prompt, in steps. The rate that an executor tells
    is measured with decodes in the batch, so their time is in it already; what is left balances their number
    (ours, by the twin on Azure's trace: at 1, prompts queued where decodes were few)."""
    decode_growth_tokens: int = 64
    """Room beyond the present length asked of a decode executor (ours: four blocks before preemption)."""
    early_decode: bool = True
    """A decode executor may be chosen when the prefill starts, so that the transfer runs beside it."""
    early_free_share: float = 0.25
    """Part of its pool that must stay free then: blocks held for a whole prefill must be spare (ours)."""
    early_horizon_seconds: float = 5.0
    """Where there is a choice of decode executors, prefills that take longer wait with it (ours: about the
    time in which a decode executor's load turns over)."""
    heat_map: HeatMap | None = None
    """Where splitting pays, as `deepflow calibrate` found; None: wherever both roles are fit."""
    guard_seconds: float = 2.0
    guard_ratio: float = 2.0
    """A split gives way when its first token is estimated beyond ratio x that of running whole + seconds:
    prefill executors overload first, which is where DeepServe's combined policy lost (ours)."""
    tie_share: float = 0.1
    """Executors whose cost is within this share of the prompt's own prefill time of the best are as good:
    among them the prompt's affinity decides (ours: the next request with that beginning saves more)."""
    hold_seconds: float = 0.0
    """Executors with more than so many seconds of prompts to compute get no further one: where it waits
    instead, order can still change. 0: they take all they have room for."""
    hold_step_seconds: float = 0.0
    """While the steps of all executors that prefer decoding take longer, nothing is started: one more would
    slow all of them. 0: no bound."""
    sample: int = 0
    """Look at so many executors drawn at random and at those that cache the prompt; 0: at all. Spreads many
    gateways that see the same stale load; a full pass is cheap enough at 10,000."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What one candidate's score is the sum of. Seconds, except the cached tokens."""

    queue: float  # work ahead of the task
    prefill: float  # its uncached tokens; 0 for a decode
    pressure: float  # decode: step time over the share of KV left; 0 for a prefill
    cached_tokens: int

    @property
    def total(self) -> float:
        return self.queue + self.prefill + self.pressure


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a task goes, and why: for job records, metrics, `deepflow explain` and the twin.

    `terms` and `dropped` tell at most `MAX_TOLD` executors each: in large groups the one chosen and those
    that are best in one term.
    """

    mode: Mode
    te_id: str
    incarnation: str
    cached_tokens: int
    reason: str
    terms: Mapping[str, Terms]  # candidates, the chosen one among them
    dropped: Mapping[str, Drop]
    candidates: int = 0
    heat: float | None = None  # the heat map's opinion: above 0 split

    @property
    def scores(self) -> dict[str, float]:
        """Estimated seconds until the task would run."""
        return {te_id: terms.total for te_id, terms in self.terms.items()}


MAX_TOLD = 16
"""Executors that a decision tells of (ours: what a person reads)."""


@dataclass(frozen=True, slots=True)
class Unplaceable:
    reason: Reason
    dropped: Mapping[str, Drop]
