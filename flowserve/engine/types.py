"""Values that cross the engine's border: tasks in, step events out.

The TE-shell translates these from and to `protos/deepflow/v1/worker.proto`; the engine never sees
a protobuf message or a socket. Tokens are ids only: text stays in the gateway.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol


class TaskKind(enum.Enum):
    """What an executor does for a task (house plan: words)."""

    UNIFIED = "unified"
    PREFILL = "prefill"
    DECODE = "decode"


class Role(enum.Enum):
    """A TE's live preference. Any role can run any kind: replays and fallbacks rely on it."""

    COLOCATED = "colocated"
    PREFILL = "prefill"
    DECODE = "decode"


class FinishReason(enum.Enum):
    STOP = "stop"
    LENGTH = "length"
    HANDOVER = "handover"
    ABORTED = "aborted"
    ERROR = "error"


class ErrorCode(enum.Enum):
    """Mirrors deepflow.v1.ErrorCode."""

    INVALID_ARGUMENT = "invalid_argument"
    QUEUE_FULL = "queue_full"
    DRAINING = "draining"
    MODEL_NOT_LOADED = "model_not_loaded"
    KV_TRANSFER_FAILED = "kv_transfer_failed"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    OUT_OF_KV = "out_of_kv"
    INTERNAL = "internal"


@dataclass(frozen=True, slots=True)
class TaskError:
    code: ErrorCode
    message: str
    retryable: bool = False


class TaskRejected(Exception):
    """`Engine.submit` did not accept the task; nothing of it is held."""

    def __init__(self, error: TaskError) -> None:
        super().__init__(f"{error.code.value}: {error.message}")
        self.error = error


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Resolved sampling parameters (see the proto message of the same name)."""

    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 = off
    min_p: float = 0.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0


@dataclass(frozen=True, slots=True)
class KVSource:
    """Where the KV of a prompt can be pulled from."""

    transfer_id: str
    te_id: str
    incarnation: str
    address: str


@dataclass(frozen=True, slots=True)
class PrefixSource:
    """An executor said to hold the KV of a prompt's first `tokens` tokens."""

    te_id: str
    incarnation: str
    address: str
    tokens: int


@dataclass(frozen=True, slots=True)
class EngineTask:
    """One unit of work. `prompt` and `output` are token ids; `output` was delivered by earlier attempts.

    `max_output_tokens` counts over all attempts. `deadline` is on the engine's clock (seconds), None = none.
    `owner` names the gateway incarnation: `Engine.abort_owner` ends all of its tasks.
    A DECODE task has at least one output token (the one its prefill sampled) and pulls KV for exactly
    `len(prompt) + len(output) - 1` tokens. An `early` one is placed while its prefill computes: it pulls
    `len(prompt) + len(output)` tokens, and the prefill's token and processor state come with their last.
    """

    task_id: str
    attempt: int
    kind: TaskKind
    prompt: Sequence[int]
    sampling: SamplingParams
    max_output_tokens: int
    output: Sequence[int] = ()
    owner: str = ""
    adapter_id: str = ""
    cache_salt: bytes = b""
    priority: int = 0
    deadline: float | None = None
    kv_source: KVSource | None = None
    processor_state: bytes = b""
    traceparent: str = ""
    tell_start: bool = False  # prefill: a delta with the handover's transfer when it starts
    early: bool = False
    prefix_source: PrefixSource | None = None

    @property
    def key(self) -> tuple[str, int]:
        return (self.task_id, self.attempt)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural-log probability, in the model's raw distribution, of a token and of the most likely ones."""

    token: int
    logprob: float
    rank: int  # 1 = most likely
    top: tuple[tuple[int, float], ...] = ()  # most likely first


@dataclass(frozen=True, slots=True)
class Handover:
    """A prefill's KV on offer to a decode executor."""

    transfer_id: str
    length: int  # tokens whose KV is on offer; 0 = the prefill has only started
    lease_seconds: float
    processor_state: bytes = b""


@dataclass(frozen=True, slots=True)
class TaskTimings:
    queued_seconds: float = 0.0
    transfer_seconds: float = 0.0
    compute_seconds: float = 0.0
    preemptions: int = 0


@dataclass(slots=True)
class TaskDelta:
    """What one engine step did for one task. `finish` set = the last delta of this attempt."""

    task_id: str
    attempt: int
    owner: str
    start_index: int = 0  # index in the output of tokens[0], counted over all attempts
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    finish: FinishReason | None = None
    error: TaskError | None = None
    handover: Handover | None = None
    cached_tokens: int | None = None  # once, with the first delta
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    timings: TaskTimings | None = None


@dataclass(slots=True)
class KVEvents:
    """Exact changes to the reusable prefix blocks, in order; `sequence` numbers the first change."""

    sequence: int = 0
    stored: list[bytes] = field(default_factory=list)
    removed: list[bytes] = field(default_factory=list)
    cleared: bool = False


@dataclass(slots=True)
class LoadReport:
    """Load at one instant (see the proto message of the same name for units)."""

    step: int = 0
    waiting: int = 0
    running: int = 0
    queued_prefill_tokens: int = 0
    kv_blocks_total: int = 0
    kv_blocks_free: int = 0
    kv_blocks_cached: int = 0
    prefill_tokens_per_second: float = 0.0
    decode_step_seconds: float = 0.0
    transfers_out: int = 0
    transfers_in: int = 0
    role: Role = Role.COLOCATED
    role_epoch: int = 0
    draining: bool = False
    age_seconds: float = 0.0


@dataclass(slots=True)
class StepEvent:
    """All that one engine step changed. Handed to the shell on the engine's thread; must not block it."""

    deltas: list[TaskDelta]
    kv_events: KVEvents | None = None


@dataclass(frozen=True, slots=True)
class PullRequest:
    """A decode task whose blocks are reserved: fill them from `source`.

    `blocks` are this pool's block ids for tokens `[0, length)` in order; the first `skip_blocks` of
    them already hold the right KV (found in cache) and must not be written.
    """

    task_id: str
    attempt: int
    source: KVSource
    blocks: tuple[int, ...]
    length: int  # tokens to have in place
    skip_blocks: int
    deadline: float | None


class KVHandover(Protocol):
    """What the engine asks of the KV-transfer side. Called on the engine's thread; must not block.

    Answers come back through `Engine.pull_done` and `Engine.release_transfer`, each exactly once per
    `start_pull` and per `offer`.
    """

    def offer(self, transfer_id: str, task: EngineTask) -> float:
        """A prefill task starts: open a transfer. Returns the lease in seconds."""
        ...

    def announce(self, transfer_id: str, first_block: int, blocks: Sequence[int], tokens: int) -> None:
        """Blocks from index `first_block` of the transfer on now hold KV; `tokens` are readable in all."""
        ...

    def complete(self, transfer_id: str, tokens: int, payload: bytes) -> None:
        """Every announced block is final; the lease clock starts now. `payload` is for `Engine.pull_done`."""
        ...

    def withdraw(self, transfer_id: str, reason: str) -> None:
        """The prefill failed or was aborted: peers get a typed failure. `release_transfer` still follows."""
        ...

    def start_pull(self, request: PullRequest) -> None: ...

    def cancel_pull(self, task_id: str, attempt: int) -> None:
        """Stop writing. `Engine.pull_done` still follows once nothing can write any more (quarantine)."""
        ...


class PrefixExchange(Protocol):
    """What the engine asks of the side that moves prefixes between caches. Must not block."""

    def lend(self, transfer_id: str, blocks: Sequence[int], tokens: int) -> None:
        """Puts cached blocks on offer, complete. `Engine.release_transfer` follows, once. Raises for one
        that cannot be: then nothing follows."""
        ...

    def withdraw(self, transfer_id: str, reason: str) -> None:
        """Ends what was lent; `release_transfer` still follows."""
        ...

    def fetch_seconds(self, source: PrefixSource, blocks: int) -> float:
        """Expected time of fetching so many blocks; infinite where none can be fetched now."""
        ...

    def fetch_declined(self, source: PrefixSource) -> None:
        """They are computed instead, because of `fetch_seconds`."""
        ...

    def start_fetch(
        self,
        source: PrefixSource,
        identities: Sequence[bytes],
        blocks: Sequence[int],
        seconds: float,
        done: Callable[[int], None],
    ) -> Callable[[], None]:
        """Fills `blocks` from a peer's cache within `seconds`; returns what stops it.

        `done` is called once, on any thread, when nothing writes any more: with the number of blocks in
        place, from the first on; 0 = failed.
        """
        ...
