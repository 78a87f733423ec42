"""What every transport is given, what it promises, and the quarantine that keeps the promise."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from deepflow.v1 import kvtransfer_pb2 as pb

from kvtransfer.native import Stop, copy_pieces
from kvtransfer.pool import BlockStore
from kvtransfer.runs import Move

IOV_BLOCKS = 512
"""Pieces of one vectored call: half of Linux's IOV_MAX, so that a frame's status fits beside."""


@dataclass(frozen=True, slots=True)
class Job:
    """Blocks of one transfer, and where they go."""

    transfer_id: str
    receiver: str  # te_id/incarnation of this end
    moves: Sequence[Move]
    generations: Mapping[int, int]  # the announced ones, by source block
    destination: BlockStore
    checksum: bool
    timeout: Callable[[], float]
    """Seconds that a copy may take from now on."""
    heads: tuple[int, int] = (0, 0)
    """(first, count) of the sender's KV heads that are wanted; count 0 is all of them."""

    @property
    def block_bytes(self) -> int:
        return self.destination.layout.block_bytes

    @property
    def size(self) -> int:
        """Bytes that are copied."""
        return sum(move.count for move in self.moves) * self.block_bytes

    def blocks(self) -> list[int]:
        """Source blocks in the order of the moves."""
        return [block for move in self.moves for block in range(move.src, move.src + move.count)]

    def read_request(self) -> pb.ReadRequest:
        first, count = self.heads
        return pb.ReadRequest(
            transfer_id=self.transfer_id,
            receiver=self.receiver,
            runs=[pb.BlockRun(start=move.src, count=move.count) for move in self.moves],
            generations=[self.generations[block] for block in self.blocks()],
            checksum=self.checksum,
            first_head=first,
            heads=count,
        )


class Transport(Protocol):
    """Copies out of one peer's pool."""

    @property
    def name(self) -> str: ...

    async def copy(self, job: Job) -> None:
        """Brings `job.moves` into its destination.

        Raises TransferError; once it returned, raised or was cancelled nothing writes there any more.
        No block that was reused while it was copied passes unnoticed.
        """
        ...

    async def close(self) -> None:
        """Gives connections back. Copies that still run end as they would have."""
        ...


def landing(destination: BlockStore, moves: Sequence[Move], frame_blocks: int) -> Iterator[list[memoryview]]:
    """Buffers to be filled with the blocks of `moves` in order, `frame_blocks` blocks at a time.

    Host memory is filled in place. For a device's store one staging buffer is yielded, and stored when
    the iterator is resumed: its user runs it where blocking is allowed.
    """
    staged = destination.view(0, 0) is None
    size = destination.layout.block_bytes
    for frame in frames_of(((move.dst, move.count) for move in moves), frame_blocks):
        if not staged:
            views = [destination.view(start, count) for start, count in frame]
            yield [view for view in views if view is not None]
            continue
        staging = memoryview(bytearray(sum(count for _, count in frame) * size))
        yield [staging]
        offset = 0
        for start, count in frame:
            destination.store(start, staging[offset : offset + count * size])
            offset += count * size


def frames_of(runs: Iterator[tuple[int, int]], frame_blocks: int) -> Iterator[list[tuple[int, int]]]:
    """Cuts runs of (start, count) into groups of `frame_blocks` blocks; the last may hold fewer."""
    frame: list[tuple[int, int]] = []
    room = frame_blocks
    for start, count in runs:
        done = 0
        while done < count:
            step = min(count - done, room)
            frame.append((start + done, step))
            done += step
            room -= step
            if not room:
                yield frame
                frame, room = [], frame_blocks
    if frame:
        yield frame


def place(store: BlockStore, blocks: Sequence[int], data: memoryview) -> None:
    """Puts whole blocks that lie one after the other in `data` where they belong. Blocks the thread."""
    size = store.layout.block_bytes
    target = store.view(0, store.num_blocks)
    if target is None:
        for at, block in enumerate(blocks):
            store.store(block, data[at * size : (at + 1) * size])
        return
    rows = np.array([(at, block, 1) for at, block in enumerate(blocks)], np.int64) * size
    copy_pieces(target, data, rows, Stop())


async def run_quarantined(
    workers: ThreadPoolExecutor, work: Callable[[], None], stop: Callable[[], None] | None = None
) -> None:
    """Runs `work` on a worker thread. If cancelled, calls `stop` and still waits for the thread: when
    this returns or raises, `work` is over."""
    future = asyncio.get_running_loop().run_in_executor(workers, work)
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait((future,))
        except asyncio.CancelledError as error:
            cancelled = error
            if stop is not None:
                stop()
    if cancelled is not None:
        future.exception()  # seen: the cancellation wins
        raise cancelled
    future.result()
