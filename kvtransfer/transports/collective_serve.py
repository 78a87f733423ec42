"""The sending half of `collective`: pairs that receivers asked for, and Reads that go through them.

Owned by `kvtransfer.service`, where `--kv-transport collective` asks for it. A pair belongs to the receiver
that met it, and ends with the first Read that does not come to its end: both ends count frames, and two that
disagree would take one block for another.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from deepflow.v1 import kvtransfer_pb2 as pb

from kvtransfer import metrics
from kvtransfer.errors import TransferError, TransferErrorCode
from kvtransfer.pool import BlockStore
from kvtransfer.sender import Sender
from kvtransfer.transports.base import frames_of
from kvtransfer.transports.collective import frame_blocks
from kvtransfer.transports.source import Frame, ReadPlan

if TYPE_CHECKING:  # loads torch: only where this transport is asked for
    import torch

    from kvtransfer.transports.pair import Pair

logger = logging.getLogger(__name__)

MAX_PAIRS = 64
"""As many as a receiver keeps peers (kvtransfer.peers.MAX_PEERS); the one idle for longest is closed."""
STALL_SECONDS = 10.0
"""A receiver that takes no frame for so long is given up, as on the data sockets."""
MAX_KEYS, MAX_VALUE_BYTES = 64, 64 << 10
"""Of one board: a rendezvous of two writes a few keys of a few hundred bytes."""


class _Meeting:
    """One group: its board, and this end of it once it was joined."""

    def __init__(self, receiver: str, backend: str) -> None:
        self.receiver = receiver
        self.backend = backend
        self.board: dict[str, bytes] = {}
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="kv-collective")
        self.pair: asyncio.Future[Pair] | None = None
        self.sending = asyncio.Lock()

    def join(self, host: str, store: BlockStore) -> None:
        def make() -> Pair:
            from kvtransfer.transports import pair

            board = pair.MeetingStore(self.board.__setitem__, self.board.get)
            return pair.Pair(self.backend, pair.SENDER, board, host, store)

        self.pair = asyncio.get_running_loop().run_in_executor(self.thread, make)
        self.pair.add_done_callback(self._joined)

    def _joined(self, pair: asyncio.Future[Pair]) -> None:
        if not pair.cancelled() and (error := pair.exception()) is not None:
            logger.warning("no group with %s: %s", self.receiver, error)

    def close(self) -> None:
        """What is being sent ends by its own bound, out of memory that its thread keeps."""
        pair = self.pair
        if pair is not None and pair.done() and not pair.cancelled() and pair.exception() is None:
            pair.result().close()
        self.thread.shutdown(wait=False)


class Groups:
    """All methods on one loop."""

    def __init__(self, sender: Sender, host: str) -> None:
        self._sender = sender
        self._host = host
        self._meetings: OrderedDict[str, _Meeting] = OrderedDict()

    async def offered(self, store: BlockStore) -> str:
        """Backends for this pool as an offer names them; "" where torch has none."""

        def ask() -> str:
            try:
                from kvtransfer.transports import pair
            except ImportError as error:
                logger.warning("no transport collective: %s", error)
                return ""
            return ",".join(pair.backends(store))

        return await asyncio.to_thread(ask)

    def close(self) -> None:
        while self._meetings:
            self._meetings.popitem()[1].close()

    async def meet(self, request: pb.MeetRequest, store: BlockStore) -> pb.MeetResponse:
        """Joins at the first call for a group; then the board. Raises TransferError."""
        meeting = self._meetings.get(request.group)
        if meeting is None:
            if request.key:
                raise TransferError(TransferErrorCode.STALE_POOL, "that group is not met here")
            if request.backend not in (await self.offered(store)).split(","):
                raise TransferError(TransferErrorCode.INTERNAL, f"{request.backend!r} was not offered")
            self._make_room(request.receiver)
            meeting = self._meetings[request.group] = _Meeting(request.receiver, request.backend)
            meeting.join(self._host, store)
        if meeting.receiver != request.receiver:
            raise TransferError(TransferErrorCode.BUSY, "that group is another receiver's")
        assert meeting.pair is not None
        if meeting.pair.done() and (error := meeting.pair.exception()) is not None:
            self._end(request.group)
            raise TransferError(TransferErrorCode.INTERNAL, f"the sender cannot join: {error}")
        if request.put:
            if len(meeting.board) >= MAX_KEYS or len(request.value) > MAX_VALUE_BYTES:
                raise TransferError(TransferErrorCode.BUSY, "that group's board is full")
            meeting.board[request.key] = request.value
            return pb.MeetResponse(found=True)
        value = meeting.board.get(request.key)
        return pb.MeetResponse(found=value is not None, value=value or b"")

    async def read(self, request: pb.ReadRequest) -> AsyncGenerator[bytes, None]:
        """Sends the runs through the group. Yields a ReadChunk before each frame and after the last one;
        `sent` counts the frames before, whose blocks held. Raises TransferError."""
        meeting = self._meetings.get(request.group)
        # Its attempt may be another one: the receiver's process is who met.
        if meeting is None or _process(meeting.receiver) != _process(request.receiver):
            raise TransferError(TransferErrorCode.STALE_POOL, "that group is not met here any more")
        self._meetings.move_to_end(request.group)
        async with meeting.sending:
            plan = ReadPlan.make(self._sender, request)
            frames = list(frames_of(plan.runs(), frame_blocks(plan.block_bytes)))
            in_step = False
            try:
                crc = 0
                for number, frame in enumerate(frames):
                    yield pb.ReadChunk(sent=number, crc32=crc).SerializeToString()
                    crc = await self._send(meeting, plan, frame)
                    plan.verify(frame)
                    metrics.READ_BYTES.inc(sum(count for _, count in frame) * plan.block_bytes)
                yield pb.ReadChunk(sent=len(frames), crc32=crc).SerializeToString()
                in_step = True
            except TransferError as error:
                in_step = error.code is not TransferErrorCode.PEER_LOST
                raise
            finally:
                if not in_step:
                    self._end(request.group)

    async def _send(self, meeting: _Meeting, plan: ReadPlan, frame: Frame) -> int:
        """Returns the frame's checksum where the request asks for one."""
        assert meeting.pair is not None
        joined = meeting.pair

        def work() -> int:
            from kvtransfer.transports.pair import crc32

            pair = joined.result()
            data = gather(plan, frame).to(pair.device)
            pair.send(data, STALL_SECONDS)
            return crc32(data) if plan.request.checksum else 0

        try:
            await asyncio.shield(joined)
            return await asyncio.get_running_loop().run_in_executor(meeting.thread, work)
        except (OSError, RuntimeError) as error:  # RuntimeError: the pair was closed, and its thread with it
            raise TransferError(TransferErrorCode.PEER_LOST, f"the group broke: {error}") from error

    def _make_room(self, receiver: str) -> None:
        """The receiver's process meets anew because it gave its last pair up. Raises TransferError(BUSY)."""
        same = [g for g, other in self._meetings.items() if _process(other.receiver) == _process(receiver)]
        idle = [g for g, other in self._meetings.items() if not other.sending.locked() and g not in same]
        for group in [*same, *idle[: max(0, len(self._meetings) - len(same) - MAX_PAIRS + 1)]]:
            self._end(group)
        if len(self._meetings) >= MAX_PAIRS:
            raise TransferError(TransferErrorCode.BUSY, f"{MAX_PAIRS} groups send here")

    def _end(self, group: str) -> None:
        meeting = self._meetings.pop(group, None)
        if meeting is not None:
            meeting.close()


def gather(plan: ReadPlan, frame: Frame) -> torch.Tensor:
    """The frame's bytes, where they lie if they are one piece of host memory."""
    from kvtransfer.transports import pair

    pages = pair.device_pages(plan.store)
    if pages is None:
        return pair.from_views(plan.buffers(frame))
    blocks = [block for start, count in frame for block in range(start, start + count)]
    return pair.gathered(pages, blocks, plan.heads)


def _process(receiver: str) -> str:
    """te_id/incarnation of te_id/incarnation/attempt."""
    return receiver.rpartition("/")[0]
