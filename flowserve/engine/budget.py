"""How many prefill tokens fit into one step: a cost model that learns, and the budget of one pass.

A step's time is modelled as `fixed + linear * tokens + attention * pairs`, where `pairs` counts
(query, key) pairs: a chunk far into a long prompt costs more than its first one. The three
coefficients are fitted to what steps really took, old steps fading out, so the model follows the
machine's load. Pure: seconds come in as numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FADE = 0.95
"""Weight of a step relative to the next one: about 20 steps are remembered (ours)."""

FIRST_CHUNK = 64
"""Prefill tokens of a step before anything was measured (ours): below 0.5 s for a model that does 130
tokens a second."""

GROWTH = 2.0
"""A step has at most so many times the tokens of the largest one seen: fits are not trusted far
outside of what they were made from (ours)."""

OVERRUN_FADE = 0.8
"""EWMA of actual over predicted time: about 5 steps, quicker than the fit, for a machine that has just
become slower (ours)."""

_SCALE = np.array([1.0, 1e2, 1e5])  # makes the coefficients comparable, for the fit's conditioning
_RIDGE = 1e-3


@dataclass(frozen=True, slots=True)
class StepShape:
    """What a step's cost depends on."""

    tokens: int
    pairs: int

    @classmethod
    def of(cls, slices: Iterable[tuple[int, int]]) -> StepShape:
        """From (start, count) of each slice."""
        tokens = pairs = 0
        for start, count in slices:
            tokens += count
            pairs += pairs_of(start, count)
        return cls(tokens, pairs)


def pairs_of(start: int, count: int) -> int:
    """(query, key) pairs of `count` tokens from position `start` on."""
    return count * start + count * (count + 1) // 2


class CostModel:
    """Seconds of a step from its shape, by faded least squares with coefficients of at least zero."""

    def __init__(self) -> None:
        self._normal: npt.NDArray[np.float64] = np.zeros((3, 3))
        self._moment: npt.NDArray[np.float64] = np.zeros(3)
        self._coefficients: tuple[float, float, float] = (0.0, 0.0, 0.0)
        self._largest = 0
        self._overrun = 1.0
        self.steps = 0

    @property
    def coefficients(self) -> tuple[float, float, float]:
        """(fixed seconds, seconds per token, seconds per pair)."""
        return self._coefficients

    def observe(self, shape: StepShape, seconds: float) -> None:
        if shape.tokens < 1 or seconds <= 0:
            return
        if self.steps:
            ratio = min(4.0, max(0.25, seconds / max(1e-6, self._fit(shape))))
            self._overrun = OVERRUN_FADE * self._overrun + (1 - OVERRUN_FADE) * ratio
        self.steps += 1
        self._largest = max(self._largest, shape.tokens)
        row = np.array([1.0, shape.tokens, shape.pairs]) / _SCALE
        self._normal = FADE * self._normal + np.outer(row, row)
        self._moment = FADE * self._moment + row * seconds
        self._coefficients = self._solve()

    def seconds(self, shape: StepShape) -> float:
        """Expected time of a step, raised while steps take longer than the fit says."""
        return self._fit(shape) * max(1.0, self._overrun)

    def tokens_within(self, seconds: float, base: StepShape, start: int) -> int:
        """Most tokens of a sequence at position `start` that can join `base` within `seconds`."""
        limit = max(FIRST_CHUNK, int(self._largest * GROWTH)) - base.tokens
        if not self.steps:
            return max(0, limit)
        fixed, linear, attention = self._coefficients
        left = seconds / max(1.0, self._overrun) - (fixed + linear * base.tokens + attention * base.pairs)
        if left <= 0:
            return 0
        # attention/2 * n**2 + (linear + attention * (start + 1/2)) * n <= left
        slope = linear + attention * (start + 0.5)
        if slope <= 0:
            return max(0, limit)
        root = (slope * slope + 2 * attention * left) ** 0.5
        return max(0, min(limit, int(2 * left / (slope + root))))

    def prefill_seconds(self, start: int, count: int, step_seconds: float) -> float | None:
        """Expected time of computing `count` tokens from position `start` on, in steps of `step_seconds`.

        None before anything was measured.
        """
        if not self.steps:
            return None
        fixed, linear, attention = self._coefficients
        work = linear * count + attention * pairs_of(start, count)
        steps = max(1.0, work / max(step_seconds - fixed, step_seconds / 2))
        return (fixed * steps + work) * max(1.0, self._overrun)

    def _fit(self, shape: StepShape) -> float:
        fixed, linear, attention = self._coefficients
        return fixed + linear * shape.tokens + attention * shape.pairs

    def _solve(self) -> tuple[float, float, float]:
        """Least squares over the terms; a term that comes out negative is left out and the rest refitted."""
        active = [0, 1, 2]
        while active:
            at = np.ix_(active, active)
            found = np.linalg.solve(self._normal[at] + _RIDGE * np.eye(len(active)), self._moment[active])
            if (found >= 0).all():
                values = [0.0, 0.0, 0.0]
                for index, value in zip(active, found, strict=True):
                    values[index] = float(value / _SCALE[index])
                return values[0], values[1], values[2]
            active.pop(int(np.argmin(found)))
        return self._coefficients


class StepBudget:
    """What is left of one step while a scheduling pass fills it."""

    def __init__(self, model: CostModel, max_tokens: int, seconds: float, min_chunk: int) -> None:
        """`min_chunk`: tokens the first prefill of a step gets even if decodes alone fill the time."""
        self._model = model
        self._max_tokens = max_tokens
        self._seconds = seconds
        self._min_chunk = min_chunk
        self._tokens = 0
        self._pairs = 0
        self._prefills = 0

    @property
    def tokens(self) -> int:
        return self._tokens

    @property
    def full(self) -> bool:
        return self._tokens >= self._max_tokens

    def chunk(self, start: int, remaining: int) -> int:
        """Tokens a prefill at position `start` may run in this step; 0 = none."""
        room = min(remaining, self._max_tokens - self._tokens)
        timed = self._model.tokens_within(self._seconds, StepShape(self._tokens, self._pairs), start)
        if self._prefills == 0:
            timed = max(timed, self._min_chunk)
        return max(0, min(room, timed))

    def take(self, start: int, count: int) -> None:
        self._tokens += count
        self._pairs += pairs_of(start, count)
        if count > 1:
            self._prefills += 1
