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
