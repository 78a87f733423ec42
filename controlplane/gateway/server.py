"""uvicorn with the bounds it lacks: header bytes and time, connections, refused bodies, write buffers.

`GatewayProtocol` is uvicorn's httptools protocol plus those bounds and errors in OpenAI's shape;
`GatewayServer` drains in order: not ready → grace → no new connections → running answers end or are cut.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import orjson
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from controlplane.api.errors import ApiError
from controlplane.gateway import metrics
from controlplane.gateway.connection import EXTENSION
from controlplane.gateway.settings import GatewaySettings

log = logging.getLogger(__name__)

_CHUNKED = b"transfer-encoding: chunked\r\n\r\n"
_CHUNKED_THEN_CLOSED = b"connection: close\r\n" + _CHUNKED


def protocol_class(settings: GatewaySettings) -> type[HttpToolsProtocol]:
    """The protocol with these bounds; uvicorn makes one instance a connection."""
    return cast("type[HttpToolsProtocol]", type("BoundProtocol", (GatewayProtocol,), {"settings": settings}))


class GatewayProtocol(HttpToolsProtocol):
    """One connection."""

    settings: GatewaySettings

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast(asyncio.Transport, transport))
        self._header_bytes = 0
        self._in_headers = True
        self._discarded = 0
        self.watching: list[_RequestConnection] = []  # requests that are told when the client leaves
        self._discard_timer: asyncio.TimerHandle | None = None
        self._header_timer: asyncio.TimerHandle | None = None
        self.transport.set_write_buffer_limits(high=self.settings.sse_buffer_bytes)
        metrics.CONNECTIONS.inc()
        if len(self.connections) > self.settings.max_connections:
            metrics.LIMITED.labels("connections").inc()
            self._refuse(ApiError(503, "Too many connections.", code="too_many_connections", retry_after=1))
            return
        self._arm_header_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        metrics.CONNECTIONS.dec()
        self._stop_header_timer()
        self._stop_discard_timer()
        super().connection_lost(exc)
        watching, self.watching = self.watching, []
        for connection in watching:
            connection.lost()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing() or self.parser is None:
            return
        if self._in_headers:
            self._header_bytes += len(data)
            # A body in the same packet counts too, hence the allowance of one read.
            if self._header_bytes > self.settings.max_header_bytes + 256 * 1024:
                self._refuse_headers()
                return
        super().data_received(data)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_headers = True
        self._header_count = 0
        self._discarded = 0
        if self._header_timer is None:
            self._arm_header_timer()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count_header(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._count_header(len(name) + len(value) + 4)

    def on_headers_complete(self) -> None:
        self._in_headers = False
        self._header_bytes = 0
        self._stop_header_timer()
        if self.transport.is_closing():
            return
        super().on_headers_complete()
        # Its task runs in a later turn of the loop, and finds this there.
        extensions: dict[str, Any] = {EXTENSION: _RequestConnection(self, self.cycle)}
        self.scope["extensions"] = extensions

    def on_body(self, body: bytes) -> None:
        if self.transport.is_closing():
            return
        if self.cycle is not None and self.cycle.response_complete:
            # The answer (413, 401, …) is out; the rest of the body is read and dropped for a while, so
            # that a client that first sends everything still gets to read it.
            self._discarded += len(body)
            if self._discard_timer is None:
                self._discard_timer = self.loop.call_later(
                    self.settings.discard_seconds, self.transport.close
                )
            if self._discarded > self.settings.discard_bytes:
                self.transport.close()
            return
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.transport.is_closing():
            return
        self._stop_discard_timer()
        super().on_message_complete()
        if self.cycle.response_complete:
            # The body ended after its answer: from here on this is an idle connection.
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def on_response_complete(self) -> None:
        for connection in self.watching:
            connection.forget_ended()
        self.watching = [connection for connection in self.watching if not connection.cycle.response_complete]
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, msg, code="invalid_http_request"))

    def _count_header(self, size: int) -> None:
        self._header_count += size
        if self._header_count > self.settings.max_header_bytes:
            self._refuse_headers()

    def _refuse_headers(self) -> None:
        metrics.LIMITED.labels("header_bytes").inc()
        message = f"The request's headers are larger than {self.settings.max_header_bytes} bytes."
        self._refuse(ApiError(431, message, code="headers_too_large"))

    def _refuse(self, error: ApiError) -> None:
        """Answers outside of any request and closes."""
        if self.transport.is_closing():
            return
        body = orjson.dumps(error.body())
        head = (
            f"HTTP/1.1 {error.status} Refused\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        if self.cycle is None or self.cycle.response_complete:
            self.transport.write(head.encode() + body)
        self.transport.close()

    def _arm_header_timer(self) -> None:
        self._header_timer = self.loop.call_later(self.settings.header_seconds, self._headers_late)

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _stop_discard_timer(self) -> None:
        if self._discard_timer is not None:
            self._discard_timer.cancel()
            self._discard_timer = None

    def _headers_late(self) -> None:
        self._header_timer = None
        if self._in_headers and not self.transport.is_closing():
            metrics.LIMITED.labels("header_seconds").inc()
            self._refuse(
                ApiError(408, "The request's headers did not arrive in time.", code="header_timeout")
            )


class _RequestConnection:
    """`controlplane.gateway.connection.Connection` of one request (uvicorn: one cycle)."""

    __slots__ = ("_gone", "_protocol", "cycle")

    def __init__(self, protocol: GatewayProtocol, cycle: RequestResponseCycle) -> None:
        self._protocol = protocol
        self._gone: Callable[[], None] | None = None
        self.cycle = cycle

    def body(self) -> bytes | None:
        cycle = self.cycle
        if cycle.more_body or cycle.waiting_for_100_continue or cycle.disconnected:
            return None
        data = bytes(cycle.body)
        cycle.body = bytearray()
        cycle.message_event.clear()
        self._protocol.flow.resume_reading()
        return data

    def full(self) -> bool:
        return self._protocol.flow.write_paused

    def begin(self, headers: Sequence[tuple[bytes, bytes]], data: bytes) -> None:
        cycle = self.cycle
        assert not cycle.response_started
        cycle.response_started = cycle.chunked_encoding = True
        cycle.waiting_for_100_continue = False
        if cycle.disconnected or self._protocol.transport.is_closing():
            return
        lines = [b"HTTP/1.1 200 OK\r\n"]
        for name, value in (*cycle.default_headers, *headers):
            lines += (name, b": ", value, b"\r\n")
        lines.append(_CHUNKED if cycle.keep_alive else _CHUNKED_THEN_CLOSED)
        if data:
            lines.append(b"%x\r\n%b\r\n" % (len(data), data))
        self._protocol.transport.write(b"".join(lines))

    def write(self, data: bytes) -> None:
        cycle = self.cycle
        if cycle.disconnected or self._protocol.transport.is_closing():
            return
        assert cycle.chunked_encoding, "the answer's start was sent, without a length"
        self._protocol.transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    def on_lost(self, callback: Callable[[], None]) -> None:
        if self.cycle.disconnected or self._protocol.transport.is_closing():
            callback()
            return
        self._gone = callback
        self._protocol.watching.append(self)

    def lost(self) -> None:
        gone, self._gone = self._gone, None
        if gone is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # uvicorn tells the last request of a connection alone
            gone()

    def forget_ended(self) -> None:
        if self.cycle.response_complete:
            self._gone = None

    def abort(self) -> None:
        self._protocol.transport.abort()


class GatewayServer(uvicorn.Server):
    """`begin_drain` from a signal handler; a second call cuts the wait short."""

    def __init__(
        self,
        config: uvicorn.Config,
        settings: GatewaySettings,
        *,
        on_drain: Callable[[], Any],
        on_started: Callable[[], Any],
    ) -> None:
        super().__init__(config)
        self._settings = settings
        self._on_drain = on_drain
        self._on_started = on_started
        self._exit_at: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_started()

    def begin_drain(self) -> None:
        if self._exit_at is not None:
            # Not uvicorn's `force_exit`: that would skip the lifespan's end (usage, aborts to executors).
            self._exit_at = time.monotonic()
            for task in list(self.server_state.tasks):
                task.cancel()
            return
        log.info("draining")
        self._on_drain()
        self._exit_at = time.monotonic() + self._settings.drain_grace_seconds

    async def on_tick(self, counter: int) -> bool:
        if self._exit_at is not None and time.monotonic() >= self._exit_at:
            self.should_exit = True
        return await super().on_tick(counter)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are handled by the owner of the loop; uvicorn would raise them again after the end."""
        yield


def uvicorn_config(app: Any, settings: GatewaySettings) -> uvicorn.Config:
    """uvicorn's own bounds and none of its guesses (no proxy headers, no websockets)."""
    return uvicorn.Config(
        app,
        http=protocol_class(settings),
        ws="none",
        loop="none",
        lifespan="on",
        access_log=False,
        log_config=None,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=settings.keep_alive_seconds,
        timeout_graceful_shutdown=settings.drain_seconds,
        backlog=2048,
    )
