"""The receiving half of the data sockets: bytes go from the socket straight into the pool.

Connections are kept by peer and reused; each carries one copy at a time. The wire is described in
`stream_wire`, the other half is `stream_server`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from kvtransfer.errors import TransferError, TransferErrorCode, TransportUnavailable
from kvtransfer.listener import peer_uid
from kvtransfer.transports import stream_wire as wire
from kvtransfer.transports.base import Job, landing, run_quarantined
from kvtransfer.transports.stream_io import SocketIO, Stopped, checksum

CONNECT_SECONDS = 2.0
"""Bound of connecting and greeting (ours): a path that takes longer is no fast path."""
MAX_IDLE = 4
"""Connections kept for the next copy; more copies at once open more, and close them."""


@dataclass(frozen=True, slots=True)
class StreamEnd:
    """Where a sender's data socket is."""

    name: str  # "unix" | "tcp"
    address: str | tuple[str, int]
    incarnation: str
    token: str

    def __str__(self) -> str:
        return f"{self.name} {self.address}"


class StreamTransport:
    """Use `open`: it makes the first connection, and so shows that there can be any."""

    def __init__(
        self, end: StreamEnd, workers: ThreadPoolExecutor, progress: float, first: socket.socket
    ) -> None:
        self._end = end
        self._workers = workers
        self._progress = progress
        self._idle = [first]
        self._closed = False

    @classmethod
    async def open(cls, end: StreamEnd, workers: ThreadPoolExecutor, progress: float) -> StreamTransport:
        """`progress` bounds, in seconds, the time without a byte. Raises TransportUnavailable."""
        return cls(end, workers, progress, await _connect(end))

    @property
    def name(self) -> str:
        return self._end.name

    async def copy(self, job: Job) -> None:
        if not job.moves:
            return
        try:
            async with asyncio.timeout(job.timeout()):
                while self._idle:
                    # A connection that waited may have been closed by the peer: then try another.
                    if await self._copy_on(self._idle.pop(), job, fresh=False):
                        return
                await self._copy_on(await _connect(self._end), job, fresh=True)
        except TransportUnavailable as error:
            raise TransferError(TransferErrorCode.PEER_LOST, str(error)) from error
        except TimeoutError as error:
            raise TransferError(TransferErrorCode.PEER_LOST, f"{self._end}: no end in time") from error

    async def close(self) -> None:
        self._closed = True
        while self._idle:
            self._idle.pop().close()

    async def _copy_on(self, connection: socket.socket, job: Job, fresh: bool) -> bool:
        """False: the connection was dead before it answered, and nothing was copied."""
        copy = _Copy(connection, job, self._progress)
        try:
            await run_quarantined(self._workers, copy.run, copy.stop)
        except TransferError:
            connection.close()
            raise
        except (OSError, ValueError, Stopped) as error:
            connection.close()
            if not fresh and not copy.answered and isinstance(error, ConnectionError):
                return False
            raise TransferError(
                TransferErrorCode.INTERNAL if isinstance(error, ValueError) else TransferErrorCode.PEER_LOST,
                f"{self._end}: {error or type(error).__name__}",
            ) from error
        except BaseException:
            connection.close()
            raise
        if self._closed or len(self._idle) >= MAX_IDLE:
            connection.close()
        else:
            self._idle.append(connection)
        return True


class _Copy:
    """One request and its answer, on a worker thread."""

    def __init__(self, connection: socket.socket, job: Job, progress: float) -> None:
        self._connection = connection
        self._job = job
        self._stopped = threading.Event()
        self._io = SocketIO(connection, self._stopped, progress)
        self.answered = False

    def stop(self) -> None:
        self._stopped.set()
        with contextlib.suppress(OSError):  # the peer may have closed it already
            self._connection.shutdown(socket.SHUT_RDWR)

    def run(self) -> None:
        with self._io.blocking():
            self._run()

    def _run(self) -> None:
        request = self._job.read_request().SerializeToString()
        self._io.send([memoryview(wire.LENGTH.pack(len(request)) + request)])
        head = bytearray(wire.STATUS.size)
        self._io.receive([memoryview(head)])
        self.answered = True
        self._check(head)
        damaged = False
        blocks = wire.frame_blocks(self._job.block_bytes)
        for buffers in landing(self._job.destination, self._job.moves, blocks):
            self._io.receive([*buffers, memoryview(head)])
            status = self._check(head)
            damaged = damaged or (self._job.checksum and checksum(buffers) != status.crc32)
        if damaged:
            raise TransferError(TransferErrorCode.CHECKSUM, "bytes changed on the way")

    def _check(self, head: bytearray) -> wire.Status:
        """Raises TransferError for anything but OK."""
        status, size = wire.unpack_status(head)
        if status.code is not None:
            message = self._io.receive_bytes(size).decode(errors="replace")
            raise TransferError(status.code, message)
        return status


async def _connect(end: StreamEnd) -> socket.socket:
    """A connection that both ends have shown the token on. Raises TransportUnavailable."""
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            if isinstance(end.address, str):
                connection = await _open_unix(end.address)
            else:
                connection = await _open_tcp(*end.address)
            try:
                await _greet(connection, end)
            except BaseException:
                connection.close()
                raise
    except TransferError as error:
        raise TransportUnavailable("refused", f"{end}: {error}") from error
    except (ValueError, asyncio.IncompleteReadError) as error:
        raise TransportUnavailable("protocol", f"{end}: {error}") from error
    except (OSError, TimeoutError) as error:
        raise TransportUnavailable("socket", f"{end}: {error or 'no answer'}") from error
    return connection


async def _open_unix(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        await asyncio.get_running_loop().sock_connect(connection, path)
        if peer_uid(connection) != os.getuid():
            raise ValueError("the socket belongs to another user")
    except BaseException:
        connection.close()
        raise
    return connection


async def _open_tcp(host: str, port: int) -> socket.socket:
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    connection = socket.socket(found[0][0], socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        wire.tune(connection)  # before the handshake, which fixes the window's scale
        await loop.sock_connect(connection, found[0][4])
    except BaseException:
        connection.close()
        raise
    return connection


async def _greet(connection: socket.socket, end: StreamEnd) -> None:
    loop = asyncio.get_running_loop()
    if connection.family == socket.AF_UNIX:
        wire.tune(connection)
    nonce = wire.check_greeting(await read_exactly(connection, wire.GREETING.size))
    incarnation = end.incarnation.encode()
    proof = wire.mac(end.token, nonce, incarnation)
    await loop.sock_sendall(connection, wire.HELLO.pack(proof, len(incarnation)) + incarnation)
    status, size = wire.unpack_status(await read_exactly(connection, wire.STATUS.size))
    if status.code is not None:
        message = (await read_exactly(connection, size)).decode(errors="replace")
        raise TransferError(status.code, message)


async def read_exactly(connection: socket.socket, count: int) -> bytes:
    """Raises asyncio.IncompleteReadError for an end before, which is an EOFError."""
    loop = asyncio.get_running_loop()
    data = b""
    while len(data) < count:
        piece = await loop.sock_recv(connection, count - len(data))
        if not piece:
            raise asyncio.IncompleteReadError(data, count)
        data += piece
    return data
