"""Values of the placement policy. Token counts are tokens, times are seconds."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field


class Role(enum.StrEnum):
    """What an executor prefers to run; any executor can run any kind."""

    COLOCATED = "colocated"
    PREFILL = "prefill"
    DECODE = "decode"


class Link(enum.StrEnum):
    """This process's stream to an executor."""

    IDLE = "idle"  # not opened yet (large groups): usable, its load is not known
    UP = "up"
    SUSPECT = "suspect"  # silent for longer than reports take
    DOWN = "down"


class Mode(enum.StrEnum):
    UNIFIED = "unified"
    DISAGGREGATED = "disaggregated"


class Kind(enum.StrEnum):
    UNIFIED = "unified"
    PREFILL = "prefill"
    DECODE = "decode"


class PolicyName(enum.StrEnum):
    ROUND_ROBIN = "round_robin"
    LEAST_LOADED = "least_loaded"
    PREFIX_AFFINITY = "prefix_affinity"


class Why(enum.StrEnum):
    """Why an executor, or a whole request, could not be placed. The order is from far to near: the
    nearest reason among a group's executors is the group's."""

    NONE = "no_executor"  # nobody holds this revision
    EXCLUDED = "excluded"
    NOT_READY = "not_ready"  # loading, draining, failed
    UNREACHABLE = "unreachable"  # link down or silent, or its step loop hangs
    TOO_LARGE = "too_large"  # the request can never fit its pool or context
    FULL = "full"  # no room now


@dataclass(frozen=True, slots=True)
class ExecutorView:
    """One executor at one instant, what was sent to it since its last report included."""

    te_id: str
    incarnation: str = ""
    revision: str = ""
    role: Role = Role.COLOCATED
    ready: bool = True
    draining: bool = False
    link: Link = Link.UP
    step_age_seconds: float = 0.0
    tasks: int = 0  # waiting and running
    max_tasks: int = 256
    queued_prefill_tokens: int = 0
    kv_blocks_total: int = 0
    kv_blocks_free: int = 0
    block_tokens: int = 16
    prefill_tokens_per_second: float = 0.0  # 0 = not seen yet
    decode_step_seconds: float = 0.0  # 0 = not seen yet
    max_model_len: int = 0  # 0 = not known


@dataclass(frozen=True, slots=True)
class ClusterView:
    executors: tuple[ExecutorView, ...] = ()


@dataclass(frozen=True, slots=True)
class RequestView:
    """One task to place: a choice of a request, or its continuation."""

    revision: str
    tokens: int  # prompt and output so far: what has to be computed or pulled
    cached: Mapping[str, int] = field(default_factory=dict)  # te_id -> leading tokens it has cached
    excluded: frozenset[str] = frozenset()  # never
    avoided: frozenset[str] = frozenset()  # only if nobody else fits: it failed this task before
    preferred: str | None = None  # taken if it fits: a sibling's prefix lies there
    counter: int = 0  # round robin's turn
    seed: int = 0  # breaks ties


@dataclass(frozen=True, slots=True)
class Policy:
    """Numbers are ours unless they say otherwise."""

    name: PolicyName = PolicyName.PREFIX_AFFINITY
    # 0 = split prefill and decode whenever both roles are there. Configurable, because a short prompt
    # gains little from it: raise it to the tokens whose prefill takes as long as a hand-over.
    min_uncached_tokens: int = 0
    # Bounded load of consistent hashing (Mirrokni et al. 2016) recommends 1.25.
    affinity_load_factor: float = 1.25
    # No chunk takes over 0.5 s, so a step loop ten times as old hangs.
    max_step_age_seconds: float = 5.0
    # Used until an executor has reported a rate of its own.
    default_prefill_rate: float = 1000.0
    default_step_seconds: float = 0.05


@dataclass(frozen=True, slots=True)
class Score:
    """One candidate as the policy saw it."""

    te_id: str
    seconds: float  # estimated until the task's first step is through
    tasks: int
    cached_tokens: int
    headroom_blocks: int


@dataclass(frozen=True, slots=True)
class Decision:
    te_id: str
    incarnation: str
    kind: Kind
    mode: Mode
    cached_tokens: int
    reasons: tuple[str, ...]
    scores: tuple[Score, ...]


@dataclass(frozen=True, slots=True)
class Unplaceable:
    why: Why
    detail: str

    @property
    def contended(self) -> bool:
        """Executors exist that could take it, later."""
        return self.why is Why.FULL
