"""A task on a simulated executor, and the token and time budget of one of its steps. Used by `executor` and
`pool`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from controlplane.scheduling.types import Role
from controlplane.twin.costs import CostProfile

if TYPE_CHECKING:
    from controlplane.twin.executor import SimExecutor

UNIFIED, PREFILL, DECODE = range(3)
"""Kinds of tasks."""

DECODE_ROLE_SHARE = 0.5  # flowserve.engine.scheduler

Order = tuple[int, float, int]


class Task:
    """A task on a simulated executor. `length` counts prompt and sampled tokens, of which `computed` have
    KV."""

    __slots__ = (
        "arrival",
        "blocks",
        "cached",
        "computed",
        "finish_step",
        "held",
        "join_step",
        "kind",
        "length",
        "number",
        "order",
        "output",
        "priority",
        "prompt",
        "pulling",
        "request",
        "source",
        "units",
        "wait_since",
    )

    def __init__(  # noqa: PLR0917  # a request's columns
        self, request: int, kind: int, prompt: int, output: int, priority: int, units: Sequence[int]
    ) -> None:
        self.request = request
        self.kind = kind
        self.prompt = prompt
        self.output = output
        self.priority = priority
        self.units = units
        self.length = prompt + 1 if kind == DECODE else prompt
        self.computed = 0
        self.blocks = 0  # of its own, beside those of `held`
        self.held: list[int] = []  # prefix units it refers to
        self.cached = 0  # tokens found at first admission
        self.pulling = kind == DECODE
        self.source: tuple[SimExecutor, Task] | None = None
        self.join_step = self.finish_step = 0
        self.arrival = 0.0
        self.number = 0
        self.order: Order = (0, 0.0, 0)
        self.wait_since = math.inf


class Budget:
    """What is left of one step, as `flowserve.engine.budget.StepBudget` counts it."""

    __slots__ = (
        "_least",
        "_limit",
        "_prefills",
        "_profile",
        "_seconds",
        "_slope",
        "_table",
        "pairs",
        "tokens",
    )

    def __init__(  # noqa: PLR0917  # what a step starts from
        self, profile: CostProfile, table: list[float], slope: float, role: Role, batch: int, context: int
    ) -> None:
        self._profile = profile
        self._table = table
        self._slope = slope
        self._seconds = profile.chunk_seconds * (DECODE_ROLE_SHARE if role is Role.DECODE else 1.0)
        self._limit = profile.max_batch_tokens
        self._least = profile.block_tokens
        self._seconds -= batch * profile.sample_seconds + context * profile.context_seconds
        self._prefills = 0
        self.tokens = batch
        self.pairs = 0

    def chunk(self, start: int, remaining: int) -> int:
        """Tokens a prefill at position `start` may run in this step; 0 = none."""
        room = min(remaining, self._limit - self.tokens)
        if room <= 0:
            return 0
        pair = self._profile.pair_seconds
        left = self._seconds - self._table[self.tokens] - pair * self.pairs
        count = 0
        if left > 0:
            slope = self._slope + pair * (start + 0.5)
            count = int(2 * left / (slope + math.sqrt(slope * slope + 2 * pair * left)))
        if self._prefills == 0:
            count = max(count, self._least)
        count = min(room, count)
        if count < remaining:
            aligned = count - (start + count) % self._least
            count = aligned if aligned > 0 else count
        return count

    def take(self, start: int, count: int) -> None:
        self.tokens += count
        self.pairs += count * start + count * (count + 1) // 2
        self._prefills += count > 1
