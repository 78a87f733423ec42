"""A stream of messages both ways over one plain connection: what a gRPC stream call is to its two ends.

The Tasks stream carries an event per engine step and a submit per request, and Python's asynchronous gRPC
takes 85 to 100 us of processor time a message on either side (a thread that polls, a wake-up through a
socket, three futures): more than the rest of a token's way. Here a message is a length, a kind and its bytes.
What is said, and in which order, is the same; executors that announce no such address are spoken to over
gRPC. Used by `flowserve.shell` (server) and `controlplane.fleet` (client).

Frames: length of the payload (uint32, little-endian), kind (uint8), payload. The client's first frame is
OPEN, metadata as JSON, with the credentials of every internal call (`auth.py`); then MESSAGEs both ways; the
server's last is END: a status, as gRPC has it, and its text. Either side's closing the connection ends the
call.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import logging
import socket
import struct
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, NoReturn, Protocol, TypeVar, cast

import grpc
from google.protobuf.message import DecodeError

from kvtransfer.auth import refusal
from kvtransfer.channel import KEEPALIVE_MS, MAX_MESSAGE_BYTES
from kvtransfer.tls import Tls, socket_options

OPEN_SECONDS = 10.0
"""A connection that does not say who it is for so long is closed (ours, as for Hello)."""
MAX_OPEN_BYTES = 16 * 1024
"""Of the metadata, which is read before anybody is known."""
MAX_CONNECTIONS = 512
"""Of one server (ours: twice the streams that an executor admits)."""
MAX_WAITING = 256
"""Messages that wait for their reader; beyond, the connection is not read from (ours)."""

_HEAD = struct.Struct("<IB")
_OPEN, _MESSAGE, _END = 1, 2, 3
Metadata = tuple[tuple[str, str], ...]
T = TypeVar("T")
log = logging.getLogger(__name__)


class Message(Protocol):
    def SerializeToString(self) -> bytes: ...


class StreamClosed(asyncio.InvalidStateError):
    """The other end is gone: nothing can be written any more. (gRPC's error in the same place.)"""


class StreamEnded(Exception):
    """The server ended the call with a status that is not OK."""

    def __init__(self, code: str, details: str) -> None:
        super().__init__(f"{code}: {details}")
        self.code = code


class Broken(ValueError):
    """What came is not this protocol."""


class _Aborted(Exception):
    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self.code = code


class _Stream(asyncio.Protocol, Generic[T]):
    """One end. `async for` gives the other's messages; `write` sends one, and waits while too much waits."""

    def __init__(self, parse: Callable[[bytes], T]) -> None:
        self._parse = parse
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._messages: deque[T] = deque()
        self._hear: Callable[[T], None] | None = None
        self._reader: asyncio.Future[None] | None = None
        self._writable: asyncio.Future[None] | None = None  # set while the transport's buffer is full
        self._reading = True
        self._over = False  # nothing more will come
        self._error: Exception | None = None

    # -- what the owner does -----------------------------------------------------------------------

    def __aiter__(self) -> _Stream[T]:
        return self

    async def __anext__(self) -> T:
        """Raises StreamEnded, or ConnectionError for a connection that broke."""
        while not self._messages:
            if self._over:
                if self._error is not None:
                    raise self._error
                raise StopAsyncIteration
            if not self._reading and self._transport is not None:
                self._reading = True
                self._transport.resume_reading()
            self._reader = self._loop.create_future()
            await self._reader
        return self._messages.popleft()

    async def hear(self, take: Callable[[T], None]) -> None:
        """Instead of `async for`: `take` is called with each message where it arrives, with no turn of the
        loop between, until the stream ends. It must not raise, nor wait. Raises as `__anext__` does."""
        self._hear = take
        while self._messages:
            take(self._messages.popleft())
        async for message in self:  # none comes any more: this waits for the end
            take(message)

    def write_now(self, message: Message) -> bool:
        """Sends unless too much waits already, or the connection is closed: then `write` tells more."""
        if self._writable is not None or self._transport is None or self._transport.is_closing():
            return False
        self._send(_MESSAGE, message.SerializeToString())
        return True

    async def write(self, message: Message) -> None:
        """Raises StreamClosed."""
        self._send(_MESSAGE, message.SerializeToString())
        while self._writable is not None:
            await asyncio.shield(self._writable)
        if self._transport is None:
            raise StreamClosed("the connection was closed")

    def cancel(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # -- what the connection does --------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        _notice_dead_hosts(transport.get_extra_info("socket"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
        self._writable = None
        self._finish(exc)

    def pause_writing(self) -> None:
        self._writable = self._loop.create_future()

    def resume_writing(self) -> None:
        if self._writable is not None:
            self._writable.set_result(None)
            self._writable = None

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        try:
            self._cut()
        except (ValueError, TypeError, LookupError, DecodeError) as error:  # the owner hears why it ended
            self._finish(ConnectionError(f"not understood: {error}"))
            self.cancel()
            return
        if len(self._messages) >= MAX_WAITING and self._reading and self._transport is not None:
            self._reading = False
            self._transport.pause_reading()

    # -- inside ----------------------------------------------------------------------------------------

    def _cut(self) -> None:
        buffer, position, have = self._buffer, 0, len(self._buffer)
        while have - position >= _HEAD.size:
            size, kind = _HEAD.unpack_from(buffer, position)
            if size > self._most(kind):
                raise Broken(f"a frame of {size} bytes")
            end = position + _HEAD.size + size
            if end > have:
                break
            payload = bytes(buffer[position + _HEAD.size : end])
            position = end
            if kind == _MESSAGE:
                if self._hear is None:
                    self._messages.append(self._parse(payload))
                else:
                    self._hear(self._parse(payload))
            else:
                self._control(kind, payload)
        if position:
            del buffer[:position]
            if self._messages:
                self._wake()

    def _most(self, kind: int) -> int:
        """Bytes of a frame of this kind, now."""
        return MAX_MESSAGE_BYTES if kind == _MESSAGE else MAX_OPEN_BYTES

    def _control(self, kind: int, payload: bytes) -> None:
        raise Broken(f"a frame of kind {kind}")

    def _send(self, kind: int, payload: bytes) -> None:
        if self._transport is None or self._transport.is_closing():
            raise StreamClosed("the connection was closed")
        self._transport.write(_HEAD.pack(len(payload), kind) + payload)

    def _finish(self, error: Exception | None) -> None:
        if not self._over:
            self._over, self._error = True, error
            self._wake()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


class StreamCall(_Stream[T]):
    """The client's end; made by `open_stream`."""

    def __init__(self, parse: Callable[[bytes], T]) -> None:
        super().__init__(parse)
        self._details = ""

    async def details(self) -> str:
        """What the server said at the end; "" if it said nothing."""
        return self._details

    def _control(self, kind: int, payload: bytes) -> None:
        if kind != _END:
            super()._control(kind, payload)
        said = json.loads(payload)
        code, self._details = str(said["code"]), str(said["details"])
        self._finish(None if code == "OK" else StreamEnded(code, self._details))

    def open(self, metadata: Metadata) -> None:
        self._send(_OPEN, json.dumps(metadata).encode())


async def open_stream(
    address: str, metadata: Metadata, parse: Callable[[bytes], T], *, seconds: float, tls: Tls | None = None
) -> StreamCall[T]:
    """`parse` makes a message of its bytes. Raises OSError (TimeoutError after `seconds`, ssl.SSLError)."""
    host, _, port = address.rpartition(":")
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(seconds):
        _, call = await loop.create_connection(
            lambda: StreamCall(parse), host.strip("[]"), int(port), **socket_options(tls)
        )
    call.open(metadata)
    return call


class _ServedStream(_Stream[T]):
    """The server's end: the handler's request iterator and its context."""

    def __init__(self, server: StreamServer[T]) -> None:
        super().__init__(server.parse)
        self._server = server
        self._metadata: asyncio.Future[Metadata] = self._loop.create_future()
        self._refusal: tuple[grpc.StatusCode, str] | None = None
        self._admitted = False
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if len(self._server.open) >= MAX_CONNECTIONS:
            self.cancel()
            return
        self._task = self._loop.create_task(self._serve(), name="tasks-stream")
        self._server.open[self] = self._task

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._task is not None:
            self._task.cancel()

    # -- the context of a gRPC servicer, as far as it is used --------------------------------------------

    def invocation_metadata(self) -> Metadata:
        return self._metadata.result()

    async def abort(self, code: grpc.StatusCode, details: str = "") -> NoReturn:
        raise _Aborted(code, details)

    # -- inside ------------------------------------------------------------------------------------------

    def _most(self, kind: int) -> int:
        # Nobody may make this process hold much before it is known who that is.
        return super()._most(kind) if self._admitted else MAX_OPEN_BYTES

    def _control(self, kind: int, payload: bytes) -> None:
        if kind != _OPEN or self._metadata.done():
            super()._control(kind, payload)
        metadata = tuple((str(key), str(value)) for key, value in json.loads(payload))
        token = self._server.token
        self._refusal = refusal(metadata, token) if token else None
        self._admitted = self._refusal is None
        self._metadata.set_result(metadata)

    async def _serve(self) -> None:
        """A task boundary: one call's fault is logged, its client told, the server goes on."""
        code, details = grpc.StatusCode.OK, ""
        try:
            await self._handle()
        except _Aborted as aborted:
            code, details = aborted.code, str(aborted)
        except TimeoutError:
            code, details = grpc.StatusCode.DEADLINE_EXCEEDED, "nothing was said"
        except StreamClosed:
            log.debug("a stream's client left")
        except Exception as error:
            log.exception("a stream's handler failed")
            code, details = grpc.StatusCode.UNKNOWN, f"{type(error).__name__}: {error}"
        finally:
            self._server.open.pop(self, None)
            with contextlib.suppress(StreamClosed):
                self._send(_END, json.dumps({"code": code.name, "details": details[:1000]}).encode())
            if self._transport is not None:
                self._transport.close()

    async def _handle(self) -> None:
        async with asyncio.timeout(OPEN_SECONDS):
            await self._metadata
        if self._refusal is not None:
            raise _Aborted(*self._refusal)
        outcome = self._server.handler(self, self)
        if not inspect.isasyncgen(outcome):
            await outcome
            return
        async with contextlib.aclosing(outcome):
            async for message in outcome:
                await self.write(cast(Message, message))


class StreamServer(Generic[T]):
    """Serves one stream method of a gRPC servicer over plain connections."""

    def __init__(
        self,
        handler: Callable[[Any, Any], Any],
        parse: Callable[[bytes], T],
        *,
        token: str,
        tls: Tls | None = None,
    ) -> None:
        """`handler(requests, context)` as gRPC calls it: a coroutine, or an asynchronous generator of its
        answers. `token`: the cluster's; "" admits everyone (loopback only)."""
        self.handler = handler
        self.parse = parse
        self.token = token
        self._tls = tls
        self.open: dict[_ServedStream[T], asyncio.Task[None]] = {}
        self._server: asyncio.Server | None = None

    async def start(self, host: str, port: int = 0) -> int:
        """The port it listens on. Raises OSError."""
        loop = asyncio.get_running_loop()
        options: dict[str, Any] = {}
        if self._tls is not None:
            options = {"ssl": self._tls.server_context(), "ssl_handshake_timeout": OPEN_SECONDS}
        self._server = await loop.create_server(lambda: _ServedStream(self), host, port, **options)
        number: int = self._server.sockets[0].getsockname()[1]
        return number

    async def stop(self, grace: float | None = None) -> None:
        """No new calls; running ones may end within `grace` seconds."""
        if self._server is not None:
            self._server.close()
            self._server = None
        if self.open and grace:
            await asyncio.wait(list(self.open.values()), timeout=grace)
        left = list(self.open.items())
        for stream, task in left:
            task.cancel()
            stream.cancel()
        await asyncio.gather(*(task for _, task in left), return_exceptions=True)


def _notice_dead_hosts(connection: socket.socket | None) -> None:
    """A peer whose host is gone is noticed as over gRPC: within two pings."""
    if connection is None or connection.family not in (socket.AF_INET, socket.AF_INET6):
        return
    seconds = KEEPALIVE_MS // 1000
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", seconds), ("TCP_KEEPINTVL", seconds), ("TCP_KEEPCNT", 2),
                        ("TCP_USER_TIMEOUT", 2 * KEEPALIVE_MS)):  # fmt: skip
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
