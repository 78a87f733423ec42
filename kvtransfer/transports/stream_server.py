"""The sending half of the data sockets: a pool's blocks are written to the socket where they lie.

Owned by `kvtransfer.service`. Requests are awaited on the loop; the bytes of an answer are written by
worker threads, straight out of the pool, with the generations compared before and after each frame
has left it. A frame that was sent out of a reused block is followed by the error that says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import os
import secrets
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from deepflow.v1 import kvtransfer_pb2 as pb
from google.protobuf.message import DecodeError

from kvtransfer import metrics
from kvtransfer.errors import TransferError, TransferErrorCode
from kvtransfer.listener import Listener, peer_uid
from kvtransfer.sender import Sender
from kvtransfer.transports import stream_wire as wire
from kvtransfer.transports.base import frames_of, run_quarantined
from kvtransfer.transports.source import ReadPlan
from kvtransfer.transports.stream import read_exactly
from kvtransfer.transports.stream_io import SocketIO, Stopped, checksum

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 256
"""Four for each of 64 receivers (kvtransfer.peers.MAX_PEERS)."""
MAX_STREAMS = 8
"""Answers written at once, as MAX_READS of gRPC: more only divide the same bandwidth. Others wait."""
HELLO_SECONDS = 2.0
IDLE_SECONDS = 300.0
"""A connection without a request for so long is closed; its receiver opens another (ours)."""
STALL_SECONDS = 10.0
"""A receiver that takes no byte for so long is given up, as DEFAULT_PEER_TIMEOUT of the other end."""


class StreamServer:
    """Answers on a unix socket, a TCP port, or both. `stop` on the loop that made it."""

    def __init__(self, sender: Sender, token: str) -> None:
        self._sender = sender
        self._token = token
        self._listener = Listener(self._serve, MAX_CONNECTIONS)
        self._workers = ThreadPoolExecutor(MAX_STREAMS, thread_name_prefix="kv-stream")

    def listen_unix(self, path: Path) -> None:
        """Raises OSError."""
        self._listener.listen_unix(path)

    def listen_tcp(self, host: str, port: int) -> int:
        """Returns the port. Raises OSError."""
        return self._listener.listen_tcp(host, port)

    async def stop(self) -> None:
        await self._listener.stop()
        self._workers.shutdown(wait=False)

    async def _serve(self, connection: socket.socket) -> None:
        try:
            async with asyncio.timeout(HELLO_SECONDS):
                if not await self._admit(connection):
                    return
            while True:
                try:
                    async with asyncio.timeout(IDLE_SECONDS):
                        size = wire.LENGTH.unpack(await read_exactly(connection, wire.LENGTH.size))[0]
                except asyncio.IncompleteReadError:
                    return
                if size > wire.MAX_REQUEST_BYTES:
                    raise ValueError(f"a request of {size} bytes, {wire.MAX_REQUEST_BYTES} are the bound")
                async with asyncio.timeout(STALL_SECONDS):
                    request = pb.ReadRequest.FromString(await read_exactly(connection, size))
                answer = _Answer(self._sender, connection, request)
                metrics.ACTIVE_READS.inc()
                try:
                    await run_quarantined(self._workers, answer.run, answer.stop)
                finally:
                    metrics.ACTIVE_READS.dec()
        except TimeoutError:
            logger.info("data socket: a silent receiver was given up")
        except (OSError, ValueError, EOFError, DecodeError, Stopped) as error:
            logger.info("data socket: a connection ended: %s", error or type(error).__name__)

    async def _admit(self, connection: socket.socket) -> bool:
        """Greets; false for a receiver that may not read here, which was told so."""
        loop = asyncio.get_running_loop()
        wire.tune(connection)
        nonce = secrets.token_bytes(wire.NONCE_BYTES)
        greeting = wire.GREETING.pack(wire.MAGIC, wire.STREAM_VERSION, nonce)
        await loop.sock_sendall(connection, greeting)
        proof, size = wire.HELLO.unpack(await read_exactly(connection, wire.HELLO.size))
        if size > wire.MAX_INCARNATION_BYTES:
            raise ValueError(f"an incarnation of {size} bytes")
        incarnation = await read_exactly(connection, size)
        reason = ""
        if not hmac.compare_digest(proof, wire.mac(self._token, nonce, incarnation)):
            reason = "wrong cluster token"
        elif connection.family == socket.AF_UNIX and peer_uid(connection) != os.getuid():
            reason = "another user"
        elif incarnation.decode(errors="replace") != self._sender.incarnation:
            reason = "another incarnation"
        status = wire.Status(TransferErrorCode.INTERNAL, reason) if reason else wire.Status()
        if reason:
            logger.warning("data socket: a receiver was refused: %s", reason)
        await loop.sock_sendall(connection, status.pack())
        return not reason


class _Answer:
    """The answer to one request, on a worker thread."""

    def __init__(self, sender: Sender, connection: socket.socket, request: pb.ReadRequest) -> None:
        self._sender = sender
        self._connection = connection
        self._request = request
        self._stopped = threading.Event()
        self._io = SocketIO(connection, self._stopped, STALL_SECONDS)

    def stop(self) -> None:
        self._stopped.set()
        with contextlib.suppress(OSError):  # the receiver may have closed it already
            self._connection.shutdown(socket.SHUT_RDWR)

    def run(self) -> None:
        """Raises OSError or Stopped for a connection that cannot be used any more."""
        with self._io.blocking():
            self._run()

    def _run(self) -> None:
        try:
            plan = ReadPlan.make(self._sender, self._request)
        except TransferError as error:
            self._say(wire.Status(error.code, error.message))
            return
        # A frame's status waits for the next frame's bytes: one call and one wake-up for both.
        status = wire.Status()
        for frame in frames_of(plan.runs(), wire.frame_blocks(plan.block_bytes)):
            buffers = plan.buffers(frame)
            crc = checksum(buffers) if self._request.checksum else 0
            self._io.send([memoryview(status.pack()), *buffers])
            try:
                plan.verify(frame)
            except TransferError as error:
                self._say(wire.Status(error.code, error.message))
                return
            status = wire.Status(crc32=crc)
            metrics.READ_BYTES.inc(sum(count for _, count in frame) * plan.block_bytes)
        self._say(status)

    def _say(self, status: wire.Status) -> None:
        self._io.send([memoryview(status.pack())])
