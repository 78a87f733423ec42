"""The `Read` call: the sender streams the runs' bytes, and checks generations around each piece.

Works between any two hosts that can speak gRPC at all.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import grpc.aio
from deepflow.v1 import kvtransfer_pb2 as pb

from kvtransfer.channel import READ_CHUNK_BYTES
from kvtransfer.errors import TransferError, TransferErrorCode, error_of
from kvtransfer.frames import checksum_holds, decode_frame
from kvtransfer.native import keep_freed_memory
from kvtransfer.pool import copy_bytes
from kvtransfer.transports.base import Job, landing, run_quarantined

ReadCall = grpc.aio.UnaryStreamMultiCallable[pb.ReadRequest, bytes]


class GrpcTransport:
    name = "grpc"

    def __init__(
        self, read: ReadCall, peer: str, metadata: tuple[tuple[str, str], ...], workers: ThreadPoolExecutor
    ) -> None:
        """`peer` names the other end in messages."""
        self._read = read
        self._peer = peer
        self._metadata = metadata
        self._workers = workers
        keep_freed_memory()

    async def copy(self, job: Job) -> None:
        if not job.moves:
            return
        sink = _Sink(job, self._workers)
        call = self._read(job.read_request(), metadata=self._metadata, timeout=job.timeout())
        try:
            async for buffer in call:
                frame = decode_frame(buffer)
                if job.checksum and not checksum_holds(frame):
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

    async def close(self) -> None:
        """The channel is the peer's."""


class _Sink:
    """Spreads a byte stream over the destinations of a job, in their order."""

    def __init__(self, job: Job, workers: ThreadPoolExecutor) -> None:
        self._workers = workers
        self._staged = job.destination.view(0, 0) is None
        blocks = sum(move.count for move in job.moves)
        # Device memory is filled by whole blocks through a staging buffer of about one message.
        step = max(1, READ_CHUNK_BYTES // job.block_bytes) if self._staged else blocks
        self._frames = landing(job.destination, job.moves, step)
        self._buffers: list[memoryview] = []
        self.left = job.size

    async def write(self, data: memoryview) -> None:
        """Raises ValueError for more bytes than the moves hold."""
        if len(data) > self.left:
            raise ValueError("more bytes came than were asked for")
        self.left -= len(data)
        while data:
            if not self._buffers:
                self._buffers = next(self._frames)[::-1]
            room = self._buffers[-1][: len(data)]
            copy_bytes(room, data[: len(room)])
            self._buffers[-1] = self._buffers[-1][len(room) :]
            data = data[len(room) :]
            if not self._buffers[-1]:
                self._buffers.pop()
                if self._staged and not self._buffers:
                    await run_quarantined(self._workers, self._advance)

    def _advance(self) -> None:
        """Resumes the frames: what was staged is stored."""
        self._buffers = next(self._frames, [])[::-1]
