"""A choice's output over all its attempts: which tokens are new. Pure.

Deltas carry the index of their first token, counted over attempts, and may repeat, overlap or come from
an attempt that is no longer current. Whatever arrives, the output grows by each index exactly once.
"""

from __future__ import annotations

from typing import NamedTuple


class Gap(Exception):
    """A delta starts beyond the output's end: tokens before it were lost on the way."""


class Fresh(NamedTuple):
    """What of a delta is new: tokens[skip:]; `tokens` holds those already."""

    skip: int
    tokens: list[int]


class Progress:
    """`output` holds every token delivered so far, in order."""

    __slots__ = ("attempt", "output")

    def __init__(self) -> None:
        self.attempt = 0  # 0 = none is current
        self.output: list[int] = []

    def accept(self, attempt: int, start_index: int, tokens: list[int]) -> Fresh | None:
        """Takes the new tokens in. None: not the current attempt. Raises Gap, and takes nothing then."""
        if attempt != self.attempt or attempt == 0:
            return None
        known = len(self.output)
        if start_index > known:  # also without tokens: a finish must not cut off what was lost
            raise Gap(f"output has {known} tokens, the delta starts at {start_index}")
        skip = min(max(known - start_index, 0), len(tokens))
        fresh = tokens[skip:]
        self.output.extend(fresh)
        return Fresh(skip, fresh)
