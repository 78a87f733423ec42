"""Block lists as contiguous runs, and the fewest copies between two of them.

FlowKV's bidirectional segment alignment: a copy may span blocks that are contiguous in the
sender's *and* in the receiver's pool. Pure functions; used by the sender (what it announces) and
by the receiver (what it copies).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Run:
    """`count` blocks from `start`, contiguous in one pool."""

    start: int
    count: int


@dataclass(frozen=True, slots=True)
class Move:
    """One copy of `count` blocks: from `src` on in the sender's pool to `dst` on in the receiver's."""

    src: int
    dst: int
    count: int


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
    moves: list[Move] = []
    pairs = sorted(zip(src_blocks, dst_blocks, strict=True), key=lambda pair: (pair[1] - pair[0], pair[0]))
    first_src = first_dst = count = 0
    for src, dst in pairs:
        if count and src == first_src + count and dst == first_dst + count:
            count += 1
            continue
        if count:
            moves.append(Move(first_src, first_dst, count))
        first_src, first_dst, count = src, dst, 1
    if count:
        moves.append(Move(first_src, first_dst, count))
    return sorted(moves, key=lambda move: move.src)
