"""The border between the gateway and the serving job executor: a request in, choice deltas out.

The gateway validates, tokenizes and detokenizes; the job executor makes jobs and tasks of the
request, places them and replays them. Only token ids cross this border.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Sampling:
    """Resolved sampling parameters (proto message SamplingParams); `seed` is always set."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
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
class ServingRequest:
    """One validated completion request for one prompt; `n` choices become n tasks sharing a prefix.

    A /v1/completions call with a list of prompts makes one ServingRequest a prompt.
    """

    request_id: str
    tenant: str
    model_id: str  # as the client named it
    model_revision: str  # resolved
    kind: str  # "chat" | "completion"
    prompt: tuple[int, ...]
    sampling: Sampling
    max_output_tokens: int
    n: int = 1
    stream: bool = False
    adapter_id: str = ""
    cache_salt: bytes = b""
    priority: int = 0
    timeout_seconds: float = 600.0  # whole request; passed down, never restarted
    traceparent: str = ""
    parent_span: str = ""  # of the client
    key_id: str = ""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    token: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class ChoiceDelta:
    """New tokens of one choice, in order, without gaps or repeats whatever was replayed below.

    `finish` is "stop" | "length" | "error" | "cancelled" on the choice's last delta, else None.
    """

    index: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    finish: str | None = None
    error: ServingError | None = None
    cached_tokens: int | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None


@dataclass(slots=True, eq=False)
class ServingError(Exception):
    """Why a job ended. `status` is the HTTP status the gateway answers (or puts in-band)."""

    status: int  # 400 | 404 | 429 | 499 | 500 | 503 | 504
    code: str  # machine-readable: "queue_full", "no_executor", "deadline_exceeded", …
    message: str
    retry_after: float | None = None  # seconds
    param: str | None = None
    drop_reason: str | None = None  # "rejected-…": it never ran or waited; "evicted-…": it waited in vain

    def __str__(self) -> str:
        why = f" ({self.drop_reason})" if self.drop_reason else ""
        return f"{self.status} {self.code}{why}: {self.message}"


def dropped(error: ServingError, reason: str) -> ServingError:
    """The error with the reason that the API tells."""
    error.drop_reason = reason
    return error


class ServingJob(Protocol):
    """A running job. Always end it: take everything, exhaust `deltas()` or call `cancel`. One consumer;
    buffering is bounded by max_output_tokens * n."""

    @property
    def job_id(self) -> str: ...

    def listen(self, wake: Callable[[], None]) -> None:
        """`wake` is called on the event loop whenever there is something to take (now, if there is). It must
        not block or raise. Several calls may stand for one delta, and one for several."""
        ...

    def take(self) -> list[ChoiceDelta]:
        """What is ready of all choices: one merged delta a choice at most."""
        ...

    @property
    def ended(self) -> bool:
        """Every choice has finished, and all deltas were taken."""
        ...

    def deltas(self) -> AsyncIterator[ChoiceDelta]:
        """The same for a consumer that only iterates; leaving the iteration cancels the job."""
        ...

    def finish_choice(self, index: int) -> None:
        """The gateway found a stop string: this choice is complete ("stop"); its task is aborted."""
        ...

    def cancel(self, reason: str) -> None:
        """The client is gone or gave up. Idempotent; does not block; tasks are aborted on all TEs."""
        ...


class ServingExecutor(Protocol):
    """What the gateway needs of the job executor."""

    def submit(self, request: ServingRequest) -> ServingJob:
        """Admits the request and starts placing it. Raises ServingError (429 when the bounded queue is
        full, 503 when the gateway drains). Placement problems arrive through `deltas()`."""
        ...

    def can_serve(self, model_revision: str) -> bool:
        """A ready executor holds this revision now."""
        ...

    @property
    def accepting(self) -> bool:
        """It can serve or hold new requests."""
        ...
