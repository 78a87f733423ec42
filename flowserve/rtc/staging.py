"""Compaction ahead of a transfer: scattered runs copied into one where that takes less time than calls.

Called by `flowserve.rtc.cache` alone. FlowKV's gain needs contiguous blocks, and a table that shares a
prefix lies in at least two runs. A call per run costs what the transport costs; a copy within the pool
costs what was measured here. `kvtransfer.runs.gather` weighs one against the other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from flowserve.rtc import metrics
from kvtransfer.pool import BlockStore
from kvtransfer.runs import Run, blocks_of, gather, runs_of

STAGE_SHARE = 0.125
"""Part of the pool that one staging run may take (ours): it is held until the transfer's end."""

FIRST_COPY_RATE = 4e9
"""Bytes per second of a copy within the pool until one was measured (ours): half of one core's memcpy."""

COPY_LEARNING = 0.2
"""Weight of the last copy in the measured rate (ours)."""


class Stager:
    """Takes staging runs out of a cache; the caller frees them."""

    def __init__(
        self, store: BlockStore, take: Callable[[int], list[int]], free: Callable[[Sequence[int]], None]
    ) -> None:
        """`take` hands out so many blocks with a reference each, `free` drops it."""
        self._store = store
        self._take = take
        self._free = free
        self.block_seconds = store.layout.block_bytes / FIRST_COPY_RATE

    def stage(
        self, blocks: Sequence[int], call_seconds: float, available: int
    ) -> tuple[list[int], list[int]]:
        """See `RTC.stage`; at most half of the `available` blocks are taken."""
        runs = runs_of(blocks)
        announced: list[int] = []
        staged: list[int] = []
        at = 0
        for size in gather(runs, call_seconds, self.block_seconds):
            part = runs[at : at + size]
            at += size
            count = sum(run.count for run in part)
            most = min(STAGE_SHARE * self._store.num_blocks, available / 2 - len(staged))
            copies = self._copy(part, count) if size > 1 and count <= most else None
            announced += blocks_of(part) if copies is None else copies
            staged += copies or []
        return announced, staged

    def _copy(self, runs: Sequence[Run], count: int) -> list[int] | None:
        copies = self._take(count)
        if len(runs_of(copies)) > 1:  # the pool has no room for it in one piece
            self._free(copies)
            return None
        started = time.perf_counter()
        at = copies[0]
        for run in runs:
            source = self._store.view(run.start, run.count)
            self._store.store(at, self._store.load(run.start, run.count) if source is None else source)
            at += run.count
        seconds = (time.perf_counter() - started) / count
        self.block_seconds += COPY_LEARNING * (seconds - self.block_seconds)
        metrics.STAGED_BLOCKS.inc(count)
        return copies
