"""One task inside the engine: its tokens, its blocks, how far its KV reaches."""

from __future__ import annotations

import enum
from collections.abc import Sequence as Seq
from typing import Protocol

from flowserve.engine.types import EngineTask, TaskKind, TokenLogprobs


class State(enum.Enum):
    WAITING = "waiting"  # holds nothing
    POPULATING = "populating"  # blocks held, pages of another tier on their way
    PULLING = "pulling"  # blocks held, a peer's KV on its way
    RUNNING = "running"  # blocks held, may be scheduled
    ENDED = "ended"


class SequenceProcessor(Protocol):
    """A logit processor bound to one sequence (grammars come under this later).

    The executor uses it through `SampleSpec.processor`; the engine only moves it along.
    """

    def advance(self, token: int) -> None:
        """`token` was sampled and is part of the output now."""
        ...

    def state(self) -> bytes:
        """Enough to make the same processor on another executor."""
        ...


class Sequence:
    """A task from submit to its terminal event. Owned by the engine's thread.

    Invariants: KV of `tokens[:computed]` is in `blocks`; `computed < len(tokens)` while the sequence
    can still sample; `blocks` holds one reference each; the first `committed` full blocks were
    offered to the prefix index.
    """

    __slots__ = (
        "announced",
        "arrival",
        "blocks",
        "cached_tokens",
        "committed",
        "computed",
        "fetched",
        "first_scheduled",
        "identities",
        "key",
        "kind",
        "last_progress",
        "number",
        "output",
        "preemptions",
        "prefix_wait_since",
        "processor",
        "prompt",
        "prompt_logprobs",
        "reported",
        "state",
        "task",
        "ticket",
        "tokens",
        "transfer_id",
        "transfer_seconds",
        "wants_prompt_logprobs",
    )

    def __init__(
        self, task: EngineTask, number: int, arrival: float, processor: SequenceProcessor | None = None
    ) -> None:
        self.task = task
        self.key = task.key
        self.kind = task.kind
        self.number = number  # of submission: breaks ties
        self.arrival = arrival
        self.processor = processor
        self.prompt: list[int] = list(task.prompt)
        self.output: list[int] = list(task.output)
        self.tokens: list[int] = self.prompt + self.output
        self.state = State.WAITING
        self.blocks: list[int] = []
        self.computed = 0
        self.identities: list[bytes] = []
        self.committed = 0
        self.announced = 0
        self.transfer_id: str | None = None
        self.ticket: int | None = None
        self.fetched = False  # another executor's cache was asked, or was not worth it
        self.wants_prompt_logprobs = task.sampling.prompt_logprobs is not None
        self.prompt_logprobs: list[TokenLogprobs | None] = []
        self.cached_tokens: int | None = None  # set at admission, once
        self.reported = False  # the first delta, with cached_tokens, was made
        self.first_scheduled: float | None = None
        self.transfer_seconds = 0.0
        self.last_progress = arrival
        self.prefix_wait_since: float | None = None
        self.preemptions = 0

    @property
    def remaining(self) -> int:
        """Tokens without KV. 1 = a decode step; more = prefill or recompute."""
        return len(self.tokens) - self.computed

    @property
    def wants_tokens(self) -> bool:
        """False for a task that only wants the prompt scored."""
        return len(self.output) < self.task.max_output_tokens

    @property
    def pulls(self) -> bool:
        """Whether its KV is to come from a peer: a decode task that was not preempted."""
        return self.kind is TaskKind.DECODE and self.preemptions == 0

    @property
    def pull_length(self) -> int:
        """Tokens whose KV a decode task pulls: all but the last output token, which an early one has not."""
        return len(self.task.prompt) + len(self.task.output) - (not self.task.early)

    @property
    def next_index(self) -> int:
        """Index in the output of the next token, over all attempts."""
        return len(self.output)

    def logprobs_pending(self) -> bool:
        """Prompt log-probabilities are asked for and not delivered yet."""
        return self.wants_prompt_logprobs and not self.reported

    def reset(self) -> list[int]:
        """Back to waiting with nothing held; returns the blocks for the caller to free."""
        blocks, self.blocks = self.blocks, []
        self.state = State.WAITING
        self.computed = self.committed = self.announced = 0
        self.prompt_logprobs = []
        self.prefix_wait_since = None
        self.ticket = None
        return blocks

    def extend_identities(self, more: Seq[bytes]) -> None:
        self.identities.extend(more)

    def __repr__(self) -> str:
        return (
            f"<Sequence {self.key} {self.kind.value} {self.state.value} "
            f"{self.computed}/{len(self.tokens)} blocks={len(self.blocks)}>"
        )
