"""The two ways in which a receiver gets bytes of announced blocks into its own pool.

Both check, after the bytes were copied, that no block was reused meanwhile: over shared memory here,
over gRPC at the sender. Both are cancellable with quarantine: once `copy` returned or raised,
nothing writes to the destination any more.
"""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import grpc.aio
from deepflow.v1 import kvtransfer_pb2 as pb

from kvtransfer.channel import READ_CHUNK_BYTES
from kvtransfer.errors import TransferError, TransferErrorCode, error_of
from kvtransfer.frames import checksum_holds, decode_frame
from kvtransfer.peers import LocalEnd, Peer
from kvtransfer.pool import COPY_SLICE_BYTES, BlockStore, HostPool, copy_bytes
from kvtransfer.runs import Move

INLINE_COPY_BYTES = 1 << 20
"""Copies up to this size run on the loop: about 0.1 ms, as long as waking a worker thread takes."""


class Transport(Protocol):
    """Copies the blocks of one pull."""

    name: str

    async def copy(self, moves: Sequence[Move], generations: dict[int, int]) -> None:
        """Brings `moves` into the pool; `generations` are the announced ones, by source block.

        Raises TransferError; after it, or after cancellation, the destination is not written any more.
        """
        ...


class ShmTransport:
    """Copies straight out of the sender's mapped pool: one memcpy per move."""

    name = "shm"

    def __init__(self, source: HostPool, destination: BlockStore, workers: ThreadPoolExecutor) -> None:
        self._source = source
        self._destination = destination
        self._workers = workers

    async def copy(self, moves: Sequence[Move], generations: dict[int, int]) -> None:
        blocks = [block for move in moves for block in range(move.src, move.src + move.count)]
        expected = [generations[block] for block in blocks]
        if blocks and max(blocks) >= self._source.num_blocks:
            raise TransferError(TransferErrorCode.INTERNAL, "a block outside the sender's pool was announced")
        total = len(blocks) * self._destination.layout.block_bytes
        stop = threading.Event()

        def run() -> None:
            self._verify(blocks, expected, "before")
            for move in moves:
                self._move(move, stop)
            self._verify(blocks, expected, "while")

        on_host = self._destination.view(0, 0) is not None
        if on_host and total <= INLINE_COPY_BYTES:
            run()
            return
        await run_quarantined(self._workers, run, stop)

    def _verify(self, blocks: Sequence[int], expected: Sequence[int], when: str) -> None:
        if not self._source.generations_equal(blocks, expected):
            raise TransferError(
                TransferErrorCode.GENERATION_MOVED, f"the sender reused blocks {when} they were copied"
            )

    def _move(self, move: Move, stop: threading.Event) -> None:
        size = self._destination.layout.block_bytes
        step = max(1, COPY_SLICE_BYTES // size)
        for done in range(0, move.count, step):
            if stop.is_set():
                return
            count = min(step, move.count - done)
            source = self._source.view(move.src + done, count)
            target = self._destination.view(move.dst + done, count)
            if target is None:
                self._destination.store(move.dst + done, source)
            else:
                copy_bytes(target, source)


class GrpcTransport:
    """Reads the runs as a stream of bytes; works between any two hosts."""

    name = "grpc"

    def __init__(
        self,
        peer: Peer,
        local: LocalEnd,
        transfer_id: str,
        destination: BlockStore,
        workers: ThreadPoolExecutor,
        *,
        checksum: bool,
        timeout: Callable[[], float],
    ) -> None:
        """`timeout` says how many seconds one Read may take from now on."""
        self._peer = peer
        self._local = local
        self._transfer_id = transfer_id
        self._destination = destination
        self._workers = workers
        self._checksum = checksum
        self._timeout = timeout

    async def copy(self, moves: Sequence[Move], generations: dict[int, int]) -> None:
        if not moves:
            return
        request = pb.ReadRequest(
            transfer_id=self._transfer_id,
            receiver=self._local.receiver,
            runs=[pb.BlockRun(start=move.src, count=move.count) for move in moves],
            generations=[
                generations[block] for move in moves for block in range(move.src, move.src + move.count)
            ],
            checksum=self._checksum,
        )
        sink = _Sink(self._destination, moves, self._workers)
        call = self._peer.read(request, metadata=self._local.metadata, timeout=self._timeout())
        try:
            async for buffer in call:
                frame = decode_frame(buffer)
                if self._checksum and not checksum_holds(frame):
                    raise TransferError(TransferErrorCode.CHECKSUM, f"{self._peer}: bytes changed on the way")
                await sink.write(frame.data)
        except grpc.aio.AioRpcError as error:
            raise error_of(error, f"read from {self._peer}") from error
        except ValueError as error:
            raise TransferError(TransferErrorCode.INTERNAL, f"read from {self._peer}: {error}") from error
        finally:
            call.cancel()
        if sink.left:
            raise TransferError(TransferErrorCode.PEER_LOST, f"{self._peer}: {sink.left} bytes are missing")


class _Sink:
    """Spreads a byte stream over the destinations of moves, in their order."""

    def __init__(self, store: BlockStore, moves: Sequence[Move], workers: ThreadPoolExecutor) -> None:
        self._store = store
        self._workers = workers
        self._size = store.layout.block_bytes
        # Device memory is filled by whole blocks through a staging buffer of about one frame.
        self._staged = store.view(0, 0) is None
        step = max(1, READ_CHUNK_BYTES // self._size) if self._staged else 0
        self._targets = [
            (move.dst + done, min(step or move.count, move.count - done))
            for move in moves
            for done in range(0, move.count, step or move.count)
        ]
        self._next = 0
        self._filled = 0  # bytes of the target in work
        self._current: memoryview | None = None
        self.left = sum(move.count for move in moves) * self._size

    async def write(self, data: memoryview) -> None:
        """Raises ValueError for more bytes than the moves hold."""
        if len(data) > self.left:
            raise ValueError("more bytes came than were asked for")
        self.left -= len(data)
        while data:
            start, count = self._targets[self._next]
            if self._current is None:
                view = self._store.view(start, count)
                self._current = memoryview(bytearray(count * self._size)) if view is None else view
            room = self._current[self._filled : self._filled + len(data)]
            copy_bytes(room, data[: len(room)])
            data = data[len(room) :]
            self._filled += len(room)
            if self._filled == count * self._size:
                full, self._current = self._current, None
                self._filled = 0
                self._next += 1
                if self._staged:
                    await run_quarantined(self._workers, functools.partial(self._store.store, start, full))


async def run_quarantined(
    workers: ThreadPoolExecutor, work: Callable[[], None], stop: threading.Event | None = None
) -> None:
    """Runs `work` on a worker thread. If cancelled, sets `stop` and still waits for the thread: when
    this returns or raises, `work` is over."""
    future = asyncio.get_running_loop().run_in_executor(workers, work)
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait((future,))
        except asyncio.CancelledError as error:
            cancelled = error
            if stop is not None:
                stop.set()
    if cancelled is not None:
        future.exception()  # seen: the cancellation wins
        raise cancelled
    future.result()
