"""Answers over plain ASGI: server-sent events, and whole answers that end when their client leaves.

A stream's life: the 200 is held back for a moment (`peek_seconds`) so that an early error keeps its real
status; then pieces go out as they come, comments fill silences (from the headers on, so before the first
token too), an error after the headers travels in-band, `[DONE]` ends it. A watcher awaits the client's
disconnect all along and cancels the jobs in the same turn of the loop.

A slow client: the server's write buffer is bounded (`sse_buffer_bytes`, set in `server.py`); when it is
full, sending waits, and tokens gather in the job as ids, bounded by what may be made. A client whose buffer
does not drain for `sse_stall_seconds` is cut: its jobs end, its connection is reset.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from controlplane.api.errors import ApiError
from controlplane.gateway import metrics
from controlplane.gateway.answer import Entry, Piece
from controlplane.gateway.frames import DONE, KEEP_ALIVE, Frames, PromptEcho, Whole, error_frame, whole
from controlplane.gateway.middleware import send_error
from controlplane.gateway.run import Run

log = logging.getLogger(__name__)

ABORT_EXTENSION = "deepflow.abort"  # scope["extensions"]: resets the connection, see server.py

FULL_EXTENSION = "deepflow.full"  # whether a send would wait for the client, see server.py

_SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache, no-transform"),
    (b"x-accel-buffering", b"no"),  # nginx: do not buffer
]


class _SlowClient(Exception):
    """The client reads nothing for too long."""


class _RunResponse(Response):
    """Runs `_work` beside a watcher of the client's disconnect, under the run's deadline."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self._run = run
        self._gone = False
        self._slow = False
        self._ended = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.current_task()
        assert work is not None

        def leave() -> None:
            if not self._ended:
                self._gone = True
                self._run.cancel("client disconnected")
                work.cancel()

        reason = "failed"
        watcher = asyncio.create_task(self._watch(receive, send, leave))
        try:
            async with asyncio.timeout(self._run.deadline - time.perf_counter()):
                await self._work(send)
            self._ended = True
            reason = "done"
        except asyncio.CancelledError:
            if not self._gone:
                reason = "gateway shuts down"
                self._run.cancel(reason)
                await self._fail(
                    ApiError(503, "The server is shutting down.", code="shutting_down"), scope, send
                )
                raise
            work.uncancel()
            reason = self._left(scope)
        except _SlowClient:
            self._slow = True
            reason = self._left(scope)
        except TimeoutError:
            self._run.cancel("deadline exceeded")
            await self._fail(
                ApiError(504, "The request's deadline has passed.", code="deadline_exceeded"), scope, send
            )
        except ApiError as error:
            self._run.cancel("failed")
            await self._fail(error, scope, send)
        except Exception:
            # A fault of ours, at the boundary of the request's task: jobs end and the client is told.
            log.exception("request %s failed", self._run.context.request_id)
            self._run.cancel(reason)
            await self._fail(ApiError(500, "The server had an error.", code="internal_error"), scope, send)
        finally:
            self._ended = True
            watcher.cancel()
            await self._settle(work, reason)
            if self._slow:
                await asyncio.sleep(0)  # the server learns of the reset before it looks for the answer's end

    async def _settle(self, work: asyncio.Task[Any], reason: str) -> None:
        try:
            await self._run.settle(reason)
        except asyncio.CancelledError:
            # The client left in the very turn in which its answer ended: everything is settled already.
            if not self._gone:
                raise
            work.uncancel()

    def _left(self, scope: Scope) -> str:
        """The client left, or is cut because it does not read. Nothing more can be told to it."""
        context = self._run.context
        context.status = 499
        reason = "client disconnected"
        if self._slow:
            reason = "client too slow"
            context.error = "slow_client"
            _abort(scope)
        self._run.cancel(reason)
        metrics.CUT.labels("slow_client" if self._slow else "disconnect").inc()
        return reason

    async def _work(self, send: Send) -> None:
        raise NotImplementedError

    async def _watch(self, receive: Receive, send: Send, leave: Callable[[], None]) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        leave()

    async def _fail(self, error: ApiError, scope: Scope, send: Send) -> None:
        self._run.context.error = error.code or str(error.status)
        await send_error(error, send)

    async def _pump_all(
        self, emit: Callable[[int, Piece, PromptEcho | None], Coroutine[Any, Any, None]]
    ) -> None:
        run = self._run
        if len(run.prompts) == 1:
            await run.pump(0, emit)
            return
        try:
            async with asyncio.TaskGroup() as group:
                for position in run.prompts:
                    group.create_task(run.pump(position, emit))
        except BaseExceptionGroup as group_error:
            raise group_error.exceptions[0] from None


class WholeResponse(_RunResponse):
    """Collects every choice, then answers once."""

    async def _work(self, send: Send) -> None:
        plan = self._run.plan
        count = len(plan.prompts) * plan.n
        texts: list[list[str]] = [[] for _ in range(count)]
        entries: list[list[Entry]] = [[] for _ in range(count)]
        finishes = ["stop"] * count
        echoes: list[PromptEcho | None] = [None] * count

        async def emit(index: int, piece: Piece, echo: PromptEcho | None) -> None:
            texts[index].append(piece.text)
            entries[index].extend(piece.entries)
            if piece.finish is not None:
                finishes[index] = piece.finish
            if echo is not None:
                echoes[index] = echo

        await self._pump_all(emit)
        parts = [
            Whole("".join(texts[index]), entries[index], finishes[index], echoes[index])
            for index in range(count)
        ]
        body = whole(plan, parts, self._run.usage())
        await self._run.settle("done")
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


class StreamResponse(_RunResponse):
    """Server-sent events."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._frames = Frames(run.plan)
        self._started = False
        self._sending = 0
        self._last_sent = 0.0
        self._full = _always

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        extension = (scope.get("extensions") or {}).get(FULL_EXTENSION)
        if extension is not None:
            self._full = extension["full"]
        await super().__call__(scope, receive, send)

    async def _work(self, send: Send) -> None:
        held = b""  # the last events, where they can go out together with the end

        async def emit(index: int, piece: Piece, echo: PromptEcho | None) -> None:
            nonlocal held
            data = self._frames.piece(index, piece, echo)
            if piece.finish is not None and self._run.ending:
                held += data
            elif data:
                await self._send(send, data)

        await self._pump_all(emit)
        tail = DONE
        if self._run.plan.include_usage:
            tail = self._frames.usage(self._run.usage()) + DONE
        await self._run.settle("done")
        await self._send(send, held + tail, last=True)

    async def _start(self, send: Send) -> None:
        if not self._started:
            self._started = True
            await send({"type": "http.response.start", "status": 200, "headers": list(_SSE_HEADERS)})

    async def _send(self, send: Send, data: bytes, *, last: bool = False) -> None:
        """Whole events only, so that two senders (pieces and comments) cannot break one apart."""
        if self._started and not self._sending and not self._full():
            # Nothing to wait for, so no deadline to arm: what nearly every token of a stream does.
            body = self._run.context.send or send
            await body({"type": "http.response.body", "body": data, "more_body": not last})
            self._last_sent = time.perf_counter()
            return
        self._sending += 1
        try:
            async with asyncio.timeout(self._run.settings.sse_stall_seconds):
                await self._start(send)
                await send({"type": "http.response.body", "body": data, "more_body": not last})
        except TimeoutError:
            raise _SlowClient from None
        finally:
            self._sending -= 1
            self._last_sent = time.perf_counter()

    async def _watch(self, receive: Receive, send: Send, leave: Callable[[], None]) -> None:
        """Also sends the comments: it is the task that has nothing else to do."""
        settings = self._run.settings
        wait = settings.peek_seconds
        while True:
            try:
                async with asyncio.timeout(wait):
                    if (await receive())["type"] == "http.disconnect":
                        leave()
                        return
                    continue
            except TimeoutError:
                pass
            silence = time.perf_counter() - self._last_sent
            if self._sending or (self._started and silence < settings.sse_keepalive_seconds):
                # Something is on its way already, or was a moment ago.
                wait = settings.sse_keepalive_seconds - (0 if self._sending else silence)
                continue
            try:
                await self._send(send, KEEP_ALIVE)
            except _SlowClient:
                self._slow = True
                leave()
                return
            metrics.KEEPALIVES.inc()
            wait = settings.sse_keepalive_seconds

    async def _fail(self, error: ApiError, scope: Scope, send: Send) -> None:
        if not self._started:
            await super()._fail(error, scope, send)
            return
        self._run.context.error = error.code or str(error.status)
        metrics.CUT.labels("error").inc()
        try:
            await self._send(send, error_frame(error) + DONE, last=True)
        except _SlowClient:
            _abort(scope)


def _always() -> bool:
    """A server that does not tell: every send is given its deadline."""
    return True


def _abort(scope: Scope) -> None:
    extension = (scope.get("extensions") or {}).get(ABORT_EXTENSION)
    if extension is not None:
        extension["abort"]()
