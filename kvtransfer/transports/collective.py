"""Reads through a device's collectives library, by torch.distributed: the receiving half.

Chosen by configuration alone (`--kv-transport collective` at both ends), for devices whose fabric only their
own library knows: NCCL between cuda pools, HCCL between npu pools (FlowKV's cross-machine pipeline), gloo
between any two. The two ends make a group of their own over the `Meet` call. A `Read` then names the group:
its answers carry no bytes but say which frame is being sent, and which were sent out of blocks that nobody
reused. Frames land in staging buffers and go into the pool after that word: bytes of a reused block, or of a
library that does not end, never reach it. The other half is `collective_serve`.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc.aio
from deepflow.v1 import kvtransfer_pb2 as pb

from kvtransfer.errors import TransferError, TransferErrorCode, TransportUnavailable, error_of
from kvtransfer.pool import BlockStore
from kvtransfer.transports.base import Job, frames_of, place, run_quarantined
from kvtransfer.transports.grpc_read import ReadCall

if TYPE_CHECKING:  # loads torch: only where this transport is asked for
    import torch

    from kvtransfer.transports.pair import Pair

NAME = "collective"
FRAME_BYTES = 8 << 20
"""Bytes of one send: large against its 0.1 ms of answers, two of them small beside a pool (ours)."""


@dataclass(frozen=True, slots=True)
class FarEnd:
    """The sender that is read from, and what it is told of this end."""

    peer: str  # names it in messages
    backends: str  # the offered ones, best first, with commas between
    meet: Callable[[pb.MeetRequest], Awaitable[pb.MeetResponse]]
    read: ReadCall
    metadata: tuple[tuple[str, str], ...]
    receiver: str
    host: str  # this executor's address
    pool: BlockStore  # the receiver's


def frame_blocks(block_bytes: int) -> int:
    """Blocks of one frame; both ends know it without a word."""
    return max(1, FRAME_BYTES // block_bytes)


class _End:
    """A pair with the thread that its blocking calls run on, and the two buffers that frames land in."""

    def __init__(self, group: str, pair: Pair, thread: ThreadPoolExecutor) -> None:
        self.group = group
        self._pair = pair
        self._thread = thread
        self._staging: list[torch.Tensor] = []

    def receive(self, number: int, size: int, seconds: float) -> asyncio.Future[torch.Tensor]:
        """Frame `number`, of `size` bytes; valid until two frames later. Raises OSError."""

        def work() -> torch.Tensor:
            import torch

            if not self._staging or len(self._staging[0]) < size:
                self._staging = [
                    torch.empty(max(size, FRAME_BYTES), dtype=torch.uint8, device=self._pair.device)
                    for _ in range(2)
                ]
            data = self._staging[number % 2][:size]
            self._pair.receive(data, seconds)
            return data

        return asyncio.get_running_loop().run_in_executor(self._thread, work)

    def close(self) -> None:
        """A call that still waits ends by its own bound, into buffers that nobody reads any more."""
        self._pair.close()
        self._thread.shutdown(wait=False)


class CollectiveTransport:
    """One copy at a time for each peer: a pair's frames come in order."""

    name = NAME

    def __init__(self, far: FarEnd, workers: ThreadPoolExecutor, progress: float) -> None:
        """Use `open`."""
        self._far = far
        self._workers = workers
        self._progress = progress
        self._lock = asyncio.Lock()
        self._end: _End | None = None
        self._closed = False

    @classmethod
    async def open(cls, far: FarEnd, workers: ThreadPoolExecutor, progress: float) -> CollectiveTransport:
        """Joins a first pair, and so shows that there can be any. `progress` bounds, in seconds, the wait for
        one frame. Raises TransportUnavailable."""
        transport = cls(far, workers, progress)
        transport._end = await _meet(far)
        return transport

    async def copy(self, job: Job) -> None:
        if not job.moves:
            return
        try:
            async with asyncio.timeout(job.timeout()), self._lock:
                if self._end is not None and await self._copy_on(self._end, job, fresh=False):
                    return
                self._end = await _meet(self._far)
                await self._copy_on(self._end, job, fresh=True)
        except TransportUnavailable as error:
            raise TransferError(TransferErrorCode.PEER_LOST, f"{self._far.peer}: {error}") from error
        except TimeoutError as error:
            raise TransferError(TransferErrorCode.PEER_LOST, f"{self._far.peer}: no end in time") from error
        finally:
            if self._closed and not self._lock.locked():
                self._drop()

    async def close(self) -> None:
        self._closed = True
        if not self._lock.locked():
            self._drop()

    def _drop(self) -> None:
        if self._end is not None:
            self._end.close()
            self._end = None

    async def _copy_on(self, end: _End, job: Job, fresh: bool) -> bool:
        """False: the sender has given the pair up, and nothing was copied.

        The pair is kept only if both ends are known to be at the same place: a copy that was not answered
        to its end leaves a frame somewhere, and the pair is dropped.
        """
        request = job.read_request()
        request.group = end.group
        call = self._far.read(request, metadata=self._far.metadata, timeout=job.timeout())
        copying = _Copying(end, job, self._workers, self._progress)
        in_step = False
        try:
            async for answer in call:
                await copying.hear(pb.ReadChunk.FromString(answer))
            in_step = copying.complete
            if not in_step:
                raise TransferError(TransferErrorCode.PEER_LOST, f"{self._far.peer}: frames are missing")
            return True
        except grpc.aio.AioRpcError as rpc:
            error = error_of(rpc, f"read from {self._far.peer}")
            if error.code is TransferErrorCode.STALE_POOL and not fresh and not copying.begun:
                return False
            # The sender's typed word comes between two frames: the one under way is here, or comes still.
            in_step = error.code is not TransferErrorCode.PEER_LOST and await copying.settled()
            raise error from rpc
        except (OSError, ValueError) as error:
            lost = isinstance(error, OSError)
            raise TransferError(
                TransferErrorCode.PEER_LOST if lost else TransferErrorCode.INTERNAL,
                f"{self._far.peer}: {error}",
            ) from error
        finally:
            call.cancel()
            if not in_step:
                copying.abandon()
                self._drop()


class _Copying:
    """Where one Read is: frames that were received, confirmed and placed."""

    def __init__(self, end: _End, job: Job, workers: ThreadPoolExecutor, progress: float) -> None:
        self._end = end
        self._job = job
        self._workers = workers
        self._progress = progress
        self._frames = list(
            frames_of(((move.dst, move.count) for move in job.moves), frame_blocks(job.block_bytes))
        )
        self._coming: asyncio.Future[torch.Tensor] | None = None
        self._placed = 0
        self.begun = False

    @property
    def complete(self) -> bool:
        return self._placed == len(self._frames)

    async def hear(self, answer: pb.ReadChunk) -> None:
        """The sender sends frame number `answer.sent` now; those before count.

        Raises OSError for a pair that does not work any more, ValueError for what makes no sense,
        TransferError(CHECKSUM).
        """
        self.begun = True
        if answer.sent != self._placed + (self._coming is not None):
            raise ValueError(f"frame {answer.sent} was told after {self._placed}")
        data = None if self._coming is None else await asyncio.shield(self._coming)
        self._coming = None
        if answer.sent < len(self._frames):
            size = sum(count for _, count in self._frames[answer.sent]) * self._job.block_bytes
            self._coming = self._end.receive(answer.sent, size, min(self._progress, self._job.timeout()))
        if data is not None:
            await run_quarantined(self._workers, lambda: self._place(data, answer.crc32))

    def _place(self, data: torch.Tensor, crc: int) -> None:
        from kvtransfer.transports import pair

        if self._job.checksum and pair.crc32(data) != crc:
            raise TransferError(TransferErrorCode.CHECKSUM, "bytes changed on the way")
        store = self._job.destination
        blocks = [at for start, count in self._frames[self._placed] for at in range(start, start + count)]
        pages = pair.device_pages(store)
        if pages is None:
            place(store, blocks, pair.view_of(data))
        else:
            pair.put(pages, blocks, data)
        self._placed += 1

    async def settled(self) -> bool:
        """Waits for the frame that is under way. False: it does not come."""
        if self._coming is None:
            return True
        try:
            await asyncio.shield(self._coming)
        except OSError:
            return False
        self._coming = None
        return True

    def abandon(self) -> None:
        """What still comes is nobody's."""
        if self._coming is not None:
            self._coming.add_done_callback(lambda done: done.cancelled() or done.exception())


async def _meet(far: FarEnd) -> _End:
    """A new pair with the sender. Raises TransportUnavailable."""
    loop = asyncio.get_running_loop()
    group = secrets.token_hex(16)
    thread = ThreadPoolExecutor(1, thread_name_prefix="kv-collective")

    def say(backend: str, **what: Any) -> pb.MeetResponse:
        """On the pair's thread."""
        request = pb.MeetRequest(receiver=far.receiver, group=group, backend=backend, **what)
        try:
            return asyncio.run_coroutine_threadsafe(_call(far.meet, request), loop).result()
        except grpc.aio.AioRpcError as error:
            raise OSError(error.details() or error.code().name) from error

    def make() -> _End:
        try:
            from kvtransfer.transports import pair
        except ImportError as error:
            raise TransportUnavailable("library", f"torch.distributed is not there: {error}") from error
        ours = pair.backends(far.pool)
        both = [name for name in far.backends.split(",") if name in ours]
        if not both:
            raise TransportUnavailable(
                "backend", f"{far.backends or 'no backend'} there, {', '.join(ours) or 'none'} here"
            )
        backend = both[0]

        def put(key: str, value: bytes) -> None:
            say(backend, key=key, value=value, put=True)

        def look(key: str) -> bytes | None:
            answer = say(backend, key=key)
            return answer.value if answer.found else None

        try:
            say(backend)  # the sender joins
            board = pair.MeetingStore(put, look)
            return _End(group, pair.Pair(backend, pair.RECEIVER, board, far.host, far.pool), thread)
        except OSError as error:
            raise TransportUnavailable("group", f"{backend}: {error}") from error

    made = False
    joining = loop.run_in_executor(thread, make)
    try:
        end = await asyncio.shield(joining)
        made = True
        return end
    finally:
        if not made:  # cancelled, or refused: what comes of it later is closed
            joining.add_done_callback(_close_late)
            thread.shutdown(wait=False)


async def _call(
    meet: Callable[[pb.MeetRequest], Awaitable[pb.MeetResponse]], request: pb.MeetRequest
) -> pb.MeetResponse:
    return await meet(request)


def _close_late(joining: asyncio.Future[_End]) -> None:
    if not joining.cancelled() and joining.exception() is None:
        with contextlib.suppress(OSError):
            joining.result().close()
