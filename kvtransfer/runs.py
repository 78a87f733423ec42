"""Block lists as contiguous runs, and the fewest copies between two of them.

FlowKV's bidirectional segment alignment: a copy may span blocks that are contiguous in the
sender's *and* in the receiver's pool. Pure functions; used by the sender (what it announces) and
by the receiver (what it copies).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Run:
    """`count` blocks from `start`, contiguous in one pool."""

    start: int
    count: int


class Move(NamedTuple):
    """One copy of `count` blocks: from `src` on in the sender's pool to `dst` on in the receiver's.

    A tuple: a request of thousands of scattered blocks makes as many, while its prefill computes.
    """

    src: int
    dst: int
    count: int  # type: ignore[assignment]  # a field here; nobody counts equal items of a move


def runs_of(blocks: Iterable[int]) -> list[Run]:
    """Runs that spell `blocks` in their order."""
    runs: list[Run] = []
    start = count = 0
    for block in blocks:
        if count and block == start + count:
            count += 1
            continue
        if count:
            runs.append(Run(start, count))
        start, count = block, 1
    if count:
        runs.append(Run(start, count))
    return runs


def blocks_of(runs: Iterable[Run]) -> list[int]:
    """The block list that `runs` spell: inverse of `runs_of`."""
    return [block for run in runs for block in range(run.start, run.start + run.count)]


def spelled(starts: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> list[int]:
    """`blocks_of` for runs in columns: a tenth of its time for thousands of runs."""
    before = np.cumsum(counts) - counts
    blocks: list[int] = (np.repeat(starts - before, counts) + np.arange(counts.sum())).tolist()
    return blocks


def align(src_blocks: Sequence[int], dst_blocks: Sequence[int]) -> list[Move]:
    """The fewest moves that copy `src_blocks[i]` to `dst_blocks[i]` for all i, in order of source.

    Pairs on one diagonal (equal `dst - src`) with successive sources share a move, wherever they
    stand in the lists; no smaller set exists, since a move never leaves its diagonal.
    Raises ValueError for lists of different lengths or a destination named twice.
    """
    if len(src_blocks) != len(dst_blocks):
        raise ValueError(f"{len(src_blocks)} source blocks for {len(dst_blocks)} destinations")
    if len(set(dst_blocks)) != len(dst_blocks):
        raise ValueError("a destination block is named twice")
    if not len(src_blocks):
        return []
    src, dst = np.asarray(src_blocks, np.int64), np.asarray(dst_blocks, np.int64)
    order = np.lexsort((src, dst - src))  # by diagonal, then by source
    src, dst = src[order], dst[order]
    goes_on = (src[1:] == src[:-1] + 1) & (dst[1:] == dst[:-1] + 1)
    first = np.flatnonzero(np.concatenate(([True], ~goes_on)))
    moves = np.stack((src[first], dst[first], np.diff(first, append=len(src))), axis=1)
    return list(map(Move._make, moves[np.argsort(moves[:, 0], kind="stable")].tolist()))


GATHER_RUNS = 64
"""Runs that `gather` brings together at most (ours): bounds its time to about 1 ms for 1,000 runs."""


def gather(runs: Sequence[Run], call_seconds: float, block_seconds: float) -> list[int]:
    """How many successive runs to bring together each time, so that a transfer of them takes least time.

    Each part of the answer is one call afterwards, which takes `call_seconds`; a part of more than one
    run has to be copied into a staging run first, at `block_seconds` a block. `[1, 1, …]` = as they are.
    Parts of at most `GATHER_RUNS` runs are looked at, so this is O(runs).
    """
    best = [0.0]  # seconds for the first i runs
    parts = [0]  # runs in the last part of that plan
    for end in range(1, len(runs) + 1):
        seconds, part = best[end - 1] + call_seconds, 1
        blocks = runs[end - 1].count
        for size in range(2, min(end, GATHER_RUNS) + 1):
            blocks += runs[end - size].count
            other = best[end - size] + call_seconds + blocks * block_seconds
            if other < seconds:
                seconds, part = other, size
        best.append(seconds)
        parts.append(part)
    plan: list[int] = []
    end = len(runs)
    while end:
        plan.append(parts[end])
        end -= parts[end]
    return plan[::-1]
