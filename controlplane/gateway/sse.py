"""Answers over plain ASGI: server-sent events, and whole answers that end when their client leaves.

A stream's life: the 200 is held back for a moment (`peek_seconds`) so that an early error keeps its real
status; then pieces go out as they come, comments fill silences (from the headers on, so before the first
token too; while the model wakes they tell how that goes), an error after the headers travels in-band,
`[DONE]` ends it. The connection tells of the client's disconnect, and the jobs are cancelled in the same turn
of the loop.

A slow client: the server's write buffer is bounded (`sse_buffer_bytes`, set in `server.py`); when it is
full, sending waits, and tokens gather in the job as ids, bounded by what may be made. A client whose buffer
does not drain for `sse_stall_seconds` is cut: its jobs end, its connection is reset.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from controlplane.api.errors import ApiError
from controlplane.gateway import metrics
from controlplane.gateway.answer import Entry
from controlplane.gateway.connection import Connection, connection_of
from controlplane.gateway.frames import DONE, KEEP_ALIVE, Frames, PromptEcho, Whole, error_frame, whole
from controlplane.gateway.holding import Held
from controlplane.gateway.middleware import send_error
from controlplane.gateway.run import Run
from controlplane.gateway.wake import Wake

log = logging.getLogger(__name__)

_SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache, no-transform"),
    (b"x-accel-buffering", b"no"),  # nginx: do not buffer
]


class _SlowClient(Exception):
    """The client reads nothing for too long."""


class _RunResponse(Response):
    """Runs `_work`, under the run's deadline, until it ends or the client leaves. One task a request: it
    sleeps in `_wait` until a job has something (`_wake`)."""

    def __init__(self, run: Run, held: Held | None = None) -> None:
        """`held`: the run is submitted once its model is awake."""
        super().__init__()
        self._run = run
        self._held = held
        self._gone = False
        self._slow = False
        self._ended = False
        self._woken = False
        self._waiter: asyncio.Future[None] | None = None
        self._connection: Connection | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.current_task()
        assert work is not None

        def leave() -> None:
            if not self._ended:
                self._gone = True
                self._run.cancel("client disconnected")
                work.cancel()

        reason = "failed"
        watcher = None
        self._connection = connection_of(scope)
        try:
            async with asyncio.timeout(self._run.deadline - time.perf_counter()):
                if self._connection is not None:
                    self._connection.on_lost(leave)
                else:
                    watcher = asyncio.create_task(_watch(receive, leave))
                if self._held is not None:
                    await self._hold(self._held, send)
                self._run.listen(self._wake)
                await self._work(send)
            self._ended = True
            reason = "done"
        except asyncio.CancelledError:
            if not self._gone:
                reason = "gateway shuts down"
                self._run.cancel(reason)
                await self._fail(ApiError(503, "The server is shutting down.", code="shutting_down"), send)
                raise
            work.uncancel()
            reason = self._left()
        except _SlowClient:
            self._slow = True
            reason = self._left()
        except TimeoutError:
            self._run.cancel("deadline exceeded")
            error = ApiError(504, "The request's deadline has passed.", code="deadline_exceeded")
            await self._fail(error, send)
        except ApiError as error:
            self._run.cancel("failed")
            await self._fail(error, send)
        except Exception:
            # A fault of ours, at the boundary of the request's task: jobs end and the client is told.
            log.exception("request %s failed", self._run.context.request_id)
            self._run.cancel(reason)
            await self._fail(ApiError(500, "The server had an error.", code="internal_error"), send)
        finally:
            self._ended = True
            self._connection = None  # it holds `leave`, and that this response
            if watcher is not None:
                watcher.cancel()
            await self._settle(work, reason)
            if self._slow:
                await asyncio.sleep(0)  # the server learns of the reset before it looks for the answer's end

    def _wake(self) -> None:
        self._woken = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _wait(self) -> None:
        """Until `_wake` was called, since the last time here."""
        if not self._woken:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        self._woken = False

    async def _settle(self, work: asyncio.Task[Any], reason: str) -> None:
        try:
            await self._run.settle(reason)
        except asyncio.CancelledError:
            # The client left in the very turn in which its answer ended: everything is settled already.
            if not self._gone:
                raise
            work.uncancel()

    def _left(self) -> str:
        """The client left, or is cut because it does not read. Nothing more can be told to it."""
        context = self._run.context
        context.status = 499
        reason = "client disconnected"
        if self._slow:
            reason = "client too slow"
            context.error = "slow_client"
            if self._connection is not None:
                self._connection.abort()
        self._run.cancel(reason)
        metrics.CUT.labels("slow_client" if self._slow else "disconnect").inc()
        return reason

    async def _work(self, send: Send) -> None:
        raise NotImplementedError

    async def _hold(self, held: Held, send: Send) -> None:
        await held.submit(self._run, None)

    async def _fail(self, error: ApiError, send: Send) -> None:
        self._run.context.error = error.code or str(error.status)
        await send_error(error, send)


async def _watch(receive: Receive, leave: Callable[[], None]) -> None:
    """Under a server without `Connection`: a task that awaits the disconnect all along."""
    while (await receive())["type"] != "http.disconnect":
        pass
    leave()


class WholeResponse(_RunResponse):
    """Collects every choice, then answers once."""

    async def _work(self, send: Send) -> None:
        run, plan = self._run, self._run.plan
        count = len(plan.prompts) * plan.n
        texts: list[list[str]] = [[] for _ in range(count)]
        entries: list[list[Entry]] = [[] for _ in range(count)]
        finishes = ["stop"] * count
        echoes: list[PromptEcho | None] = [None] * count
        while not run.ended:
            await self._wait()
            for index, piece, echo in run.take():
                texts[index].append(piece.text)
                entries[index].extend(piece.entries)
                if piece.finish is not None:
                    finishes[index] = piece.finish
                if echo is not None:
                    echoes[index] = echo
        parts = [
            Whole("".join(texts[index]), entries[index], finishes[index], echoes[index])
            for index in range(count)
        ]
        body = whole(plan, parts, run.usage())
        await run.settle("done")
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


class StreamResponse(_RunResponse):
    """Server-sent events."""

    def __init__(self, run: Run, held: Held | None = None) -> None:
        super().__init__(run, held)
        self._frames = Frames(run.plan)
        self._started = False
        self._silent = False  # for so long that a comment is due
        self._last_sent = 0.0
        self._timer: asyncio.TimerHandle | None = None

    async def _work(self, send: Send) -> None:
        run, frames = self._run, self._frames
        # The first comment ends the peek: until then an error keeps its own status.
        self._arm(run.settings.peek_seconds)
        data = b""
        while not run.ended:
            await self._wait()
            data = b"".join([frames.piece(*shown) for shown in run.take()])
            if run.ended:
                break
            if not data and self._silent:
                data = KEEP_ALIVE
                metrics.KEEPALIVES.inc()
            if data:
                await self._send(send, data)
            if self._silent:
                self._silent = False
                self._arm(run.settings.sse_keepalive_seconds)
        if data and not run.settles_at_once:
            await self._send(send, data)
            data = b""
        usage = frames.usage(run.usage()) if run.plan.include_usage else b""
        await run.settle("done")
        await self._send(send, data + usage + DONE, last=True)

    async def _hold(self, held: Held, send: Send) -> None:
        async def tell(wake: Wake) -> None:
            await self._send(send, wake.comment())

        await held.submit(self._run, tell)

    async def _settle(self, work: asyncio.Task[Any], reason: str) -> None:
        if self._timer is not None:
            self._timer.cancel()
        await super()._settle(work, reason)

    def _arm(self, seconds: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds, self._look)

    def _look(self) -> None:
        """Was anything sent of late? One timer a silence, not one a token."""
        left = self._run.settings.sse_keepalive_seconds - (time.perf_counter() - self._last_sent)
        if self._started and left > 0:
            self._arm(left)
        else:
            self._silent = True
            self._wake()

    async def _send(self, send: Send, data: bytes, *, last: bool = False) -> None:
        """Whole events. Where the connection may be asked, they go to it past the layers above."""
        connection = self._connection
        if connection is not None and not connection.full():
            # Nothing to wait for, so no deadline to arm: what nearly every token of a stream does.
            if not self._started:
                self._started = True
                connection.begin([*_SSE_HEADERS, *self._run.context.start(200)], b"" if last else data)
                if not last:
                    self._last_sent = time.perf_counter()
                    return
            if last:
                await (self._run.context.send or send)(
                    {"type": "http.response.body", "body": data, "more_body": False}
                )
            else:
                connection.write(data)
            self._last_sent = time.perf_counter()
            return
        try:
            async with asyncio.timeout(self._run.settings.sse_stall_seconds):
                if not self._started:
                    self._started = True
                    headers = list(_SSE_HEADERS)
                    await send({"type": "http.response.start", "status": 200, "headers": headers})
                await send({"type": "http.response.body", "body": data, "more_body": not last})
        except TimeoutError:
            raise _SlowClient from None
        self._last_sent = time.perf_counter()

    async def _fail(self, error: ApiError, send: Send) -> None:
        if not self._started:
            await super()._fail(error, send)
            return
        self._run.context.error = error.code or str(error.status)
        metrics.CUT.labels("error").inc()
        try:
            await self._send(send, error_frame(error) + DONE, last=True)
        except _SlowClient:
            if self._connection is not None:
                self._connection.abort()
