"""Copies out of the sender's pool, mapped read-only: one pass over the bytes, in one call.

The generations are compared before and after (with a fence between), so that bytes of a block that
was reused meanwhile are never taken for the announced ones.
"""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from kvtransfer.errors import TransferError, TransferErrorCode
from kvtransfer.images import ImageStore
from kvtransfer.layout import KVLayout
from kvtransfer.native import Pieces, Stop, copy_pieces
from kvtransfer.pool import HostPool
from kvtransfer.transports.base import Job, landing, run_quarantined

INLINE_COPY_BYTES = 1 << 20
"""Copies up to this size run on the loop: about 0.1 ms, as long as waking a worker thread takes."""
STAGED_BYTES = 4 << 20
"""Bytes that are staged at a time for a device's store (ours)."""


class ShmTransport:
    name = "shm"

    def __init__(self, source: HostPool | ImageStore, workers: ThreadPoolExecutor) -> None:
        self._source: HostPool | ImageStore | None = source
        self._workers = workers

    @property
    def retired(self) -> bool:
        """The sender gave its memory up, or this end was closed."""
        return self._source is None or self._source.retired

    async def copy(self, job: Job) -> None:
        blocks, source = job.blocks(), self._source
        if not blocks:
            return
        if source is None:
            raise TransferError(TransferErrorCode.STALE_POOL, "the sender's memory was let go")
        if max(blocks) >= source.num_blocks:
            raise TransferError(TransferErrorCode.INTERNAL, "a block outside the sender's pool was announced")
        expected = [job.generations[block] for block in blocks]
        stop = Stop()

        def run() -> None:
            _verify(source, blocks, expected, "before")
            _copy(source, job, blocks, stop)
            _verify(source, blocks, expected, "while")

        if job.destination.view(0, 0) is not None and job.size <= INLINE_COPY_BYTES:
            run()
            return
        await run_quarantined(self._workers, run, stop.set)

    async def close(self) -> None:
        """The mapping is freed with the last copy that runs, whoever still knows this transport: a peer may
        stand in a cycle that no collector looks at (frozen, after a load)."""
        self._source = None


def _verify(source: HostPool | ImageStore, blocks: list[int], expected: list[int], when: str) -> None:
    if not source.generations_equal(blocks, expected):
        raise TransferError(
            TransferErrorCode.GENERATION_MOVED, f"the sender reused blocks {when} they were copied"
        )


def _copy(source: HostPool | ImageStore, job: Job, blocks: list[int], stop: Stop) -> None:
    store, size = job.destination, job.block_bytes
    sliced = job.heads[1] > 0
    target = store.view(0, store.num_blocks)
    if target is not None:
        # From a flat row of numbers: an array of tuples takes five times as long.
        moves = np.fromiter(itertools.chain.from_iterable(job.moves), np.int64).reshape(-1, 3)
        pieces = head_pieces(moves, source.layout, job.heads) if sliced else moves * size
        copy_pieces(target, source.pages, pieces, stop)
        return
    step = max(1, STAGED_BYTES // size)
    done = 0
    for (staging,) in landing(store, job.moves, step):
        some = blocks[done : done + step]
        moves = np.array([(block, at, 1) for at, block in enumerate(some)], np.int64)
        pieces = head_pieces(moves, source.layout, job.heads) if sliced else moves * size
        copy_pieces(staging, source.pages, pieces, stop)
        done += len(some)
        if stop.is_set():
            return


def head_pieces(moves: Pieces, source: KVLayout, heads: tuple[int, int]) -> Pieces:
    """The pieces that bring heads `(first, count)` of whole source blocks into blocks of those heads alone.

    `moves` holds rows of (source block, target block, count). A head slice is contiguous for each layer
    and each of K and V.
    """
    first, count = heads
    per_head = source.head_bytes
    groups = source.layers * 2
    counts = moves[:, 2]
    at = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # block within its move
    src = np.repeat(moves[:, 0], counts) + at
    dst = np.repeat(moves[:, 1], counts) + at
    group = np.arange(groups)
    from_offsets = src[:, None] * source.block_bytes + (group * source.kv_heads + first) * per_head
    to_offsets = (dst[:, None] * groups + group) * count * per_head
    sizes = np.full_like(from_offsets, count * per_head)
    return np.stack((from_offsets.ravel(), to_offsets.ravel(), sizes.ravel()), axis=1)
