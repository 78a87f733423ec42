"""The sending half of the `Read` call; its receiving half is `grpc_read`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence

from deepflow.v1 import kvtransfer_pb2 as pb

from kvtransfer import metrics
from kvtransfer.channel import READ_CHUNK_BYTES
from kvtransfer.frames import encode_frame
from kvtransfer.native import keep_freed_memory
from kvtransfer.sender import Sender
from kvtransfer.transports.base import frames_of
from kvtransfer.transports.source import ReadPlan


async def read_frames(sender: Sender, request: pb.ReadRequest) -> AsyncGenerator[bytes, None]:
    """The serialized messages of a Read. A message goes out only if no block of it moved while it was copied.

    Small runs share a message. Raises TransferError.
    """
    keep_freed_memory()
    plan = ReadPlan.make(sender, request)
    on_host = plan.store.view(0, 0) is not None
    for frame in frames_of(plan.runs(), max(1, READ_CHUNK_BYTES // plan.block_bytes)):
        buffers = plan.buffers(frame) if on_host else await asyncio.to_thread(plan.buffers, frame)
        for piece in cut(buffers, READ_CHUNK_BYTES):
            message = encode_frame(piece, request.checksum)
            plan.verify(frame)
            yield message
            metrics.READ_BYTES.inc(sum(map(len, piece)))


def cut(buffers: Sequence[memoryview], size: int) -> Iterator[list[memoryview]]:
    """The buffers' bytes in order, in groups of `size` bytes; the last may hold fewer."""
    piece: list[memoryview] = []
    room = size
    for buffer in buffers:
        at = 0
        while at < len(buffer):
            part = buffer[at : at + room]
            piece.append(part)
            at += len(part)
            room -= len(part)
            if not room:
                yield piece
                piece, room = [], size
    if piece:
        yield piece
