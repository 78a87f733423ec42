"""One bidirectional Tasks stream to one executor process.

All tasks of the pair (this gateway process, that executor process) travel on it, and it is the
executor's sign of life: silence makes it suspect, longer silence or an error ends it. When it ends every
task open on it is reported lost, once; the executor has dropped them too (worker protocol).
"""

from __future__ import annotations

import asyncio
import enum
import logging
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Protocol

import grpc
import grpc.aio
from deepflow.v1.worker_pb2 import (
    AbortTask,
    ExecutorRecord,
    Hello,
    StepEvent,
    SubmitTask,
    TaskDelta,
    TasksRequest,
    TasksResponse,
    Welcome,
)
from deepflow.v1.worker_pb2_grpc import TaskExecutorStub

from controlplane.fleet import metrics
from kvtransfer.auth import call_metadata
from kvtransfer.channel import open_channel
from kvtransfer.framed import StreamCall, StreamEnded, open_stream
from kvtransfer.tls import Tls

MAX_MESSAGE_BYTES = 64 << 20
"""A snapshot of a large cache's block identities is the largest message (16 bytes a block)."""

PLAIN_SECONDS = 1.5
"""Until a plain connection counts as blocked (a policy that drops packets says nothing), and gRPC is tried
(ours: a connection takes two round trips)."""

log = logging.getLogger(__name__)


class TasksCall(Protocol):
    """A Tasks stream, whichever connection carries it (`kvtransfer.framed` or gRPC)."""

    def __aiter__(self) -> AsyncIterator[TasksResponse]: ...

    async def write(self, request: TasksRequest) -> None: ...

    def cancel(self) -> object: ...

    async def details(self) -> str: ...


class Link(enum.StrEnum):
    IDLE = "idle"  # opened at first use
    CONNECTING = "connecting"
    UP = "up"
    SUSPECT = "suspect"  # silent: gets no new tasks
    DOWN = "down"  # waiting before the next try
    CLOSED = "closed"


class LinkUnavailable(Exception):
    """The task was not sent; nothing of it is held."""


class TaskListener(Protocol):
    """Whoever submitted a task. Called on the event loop; must not block or raise."""

    def on_delta(self, te_id: str, delta: TaskDelta) -> None: ...

    def on_lost(self, te_id: str, attempt: int, reason: str) -> None:
        """The stream ended before the attempt's last delta. Nothing more comes of this attempt."""
        ...


@dataclass(frozen=True, slots=True)
class ChannelSettings:
    gateway_id: str
    incarnation: str
    token: str = ""
    tls: Tls | None = None
    suspect_seconds: float = 3.0  # executors report load every second
    lost_seconds: float = 10.0
    welcome_seconds: float = 5.0
    backoff_min: float = 0.1
    backoff_max: float = 2.0
    send_queue: int = 4096  # messages; a submit beyond is refused, so the executor is not chosen


class ExecutorChannel:
    """Made for one record; a new incarnation gets a new channel. `run` owns everything until cancelled."""

    def __init__(
        self,
        record: ExecutorRecord,
        settings: ChannelSettings,
        *,
        on_welcome: Callable[[Welcome], None],
        on_step: Callable[[StepEvent], None],
        on_link: Callable[[Link], None],
        clock: Callable[[], float] = time.monotonic,
        lazy: bool = False,
    ) -> None:
        self.te_id = record.te_id
        self.incarnation = record.incarnation
        self.address = record.address
        self._plain = record.tasks_address  # "" = gRPC
        self.link = Link.IDLE if lazy else Link.CONNECTING
        self.last_heard = 0.0
        self.last_error = ""
        self._settings = settings
        self._on_welcome = on_welcome
        self._on_step = on_step
        self._on_link = on_link
        self._clock = clock
        self._tasks: dict[tuple[str, int], TaskListener] = {}
        self._queue: deque[TasksRequest] = deque()
        self._queued = asyncio.Event()
        self._direct: StreamCall[TasksResponse] | None = (
            None  # a plain stream: read and written without tasks
        )
        self._rest: StepEvent | None = None  # a step whose first tokens are taken in
        self._wanted = asyncio.Event()
        if not lazy:
            self._wanted.set()

    # -- what the job executor asks ----------------------------------------------------------------

    @property
    def usable(self) -> bool:
        """A task may be submitted now."""
        return self.link in (Link.UP, Link.IDLE)

    @property
    def open_tasks(self) -> int:
        return len(self._tasks)

    def submit(self, task: SubmitTask, listener: TaskListener) -> None:
        """Queues a task. Raises LinkUnavailable if the link is not up or its queue is full."""
        if not self.usable and not (self.link is Link.CONNECTING and self._queue):
            raise LinkUnavailable(f"the stream to executor {self.te_id} is {self.link}")
        if len(self._queue) >= self._settings.send_queue:
            raise LinkUnavailable(f"the stream to executor {self.te_id} is behind by {len(self._queue)}")
        self._tasks[task.task_id, task.attempt] = listener
        metrics.TASKS.inc()
        self._send(TasksRequest(submit=task))
        self._wanted.set()

    def abort(self, task_id: str, attempt: int, reason: str) -> None:
        """Tells the executor to drop the attempt; its listener hears nothing more. Bounded by submits."""
        self.forget(task_id, attempt)
        if self.link in (Link.UP, Link.SUSPECT) or (self.link is Link.CONNECTING and self._queue):
            self._send(TasksRequest(abort=AbortTask(task_id=task_id, attempt=attempt, reason=reason[:200])))

    def forget(self, task_id: str, attempt: int) -> None:
        if self._tasks.pop((task_id, attempt), None) is not None:
            metrics.TASKS.dec()

    # -- life ----------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Connects, again and again, until cancelled."""
        failures = 0
        try:
            while True:
                await self._wanted.wait()
                self._set_link(Link.CONNECTING)
                welcomed, reason = await self._session()
                failures = 0 if welcomed else failures + 1
                metrics.LINKS.labels("lost" if welcomed else "refused").inc()
                if reason != self.last_error:
                    log.warning("stream to executor %s (%s): %s", self.te_id, self.address, reason)
                self.last_error = reason
                self._lose(Link.DOWN, reason)
                pause = min(self._settings.backoff_max, self._settings.backoff_min * 2 ** min(failures, 10))
                await asyncio.sleep(pause * (0.5 + random.random() / 2))
        finally:
            self._lose(Link.CLOSED, "the executor left, or this gateway closes")

    async def _session(self) -> tuple[bool, str]:
        """One stream from Hello to its end: (welcomed, why it ended)."""
        metadata = call_metadata(self._settings.token)
        if self._plain:
            try:
                plain = await open_stream(
                    self._plain, metadata, TasksResponse.FromString, seconds=PLAIN_SECONDS,
                    tls=self._settings.tls,
                )  # fmt: skip
            except OSError as error:
                # A firewall between that knows the gRPC port alone: that one is tried, from now on.
                log.warning("executor %s at %s: %s; over gRPC then", self.te_id, self._plain, error)
                self._plain = ""
            else:
                return await self._talk(plain)
        options = [
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ("grpc.enable_retries", 0),
            ("grpc.enable_http_proxy", 0),  # executors are never behind the environment's http_proxy
            ("grpc.use_local_subchannel_pool", 1),  # a fresh connection: back-off is ours
        ]
        async with open_channel(self.address, self._settings.tls, options) as channel:
            call: grpc.aio.StreamStreamCall[TasksRequest, TasksResponse]
            call = TaskExecutorStub(channel).Tasks(metadata=metadata)
            return await self._talk(call)

    async def _talk(self, call: TasksCall) -> tuple[bool, str]:
        parts = [
            asyncio.create_task(self._read(call), name=f"read-{self.te_id}"),
            asyncio.create_task(self._write(call), name=f"write-{self.te_id}"),
            asyncio.create_task(self._watch(), name=f"watch-{self.te_id}"),
        ]
        self.last_heard = self._clock()
        try:
            done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            reason = next(_reason(task) for task in parts if task in done)
            return self.link in (Link.UP, Link.SUSPECT), reason
        finally:
            for task in parts:
                task.cancel()
            call.cancel()
            await asyncio.gather(*parts, return_exceptions=True)

    async def _read(self, call: TasksCall) -> str:
        started = self._clock()
        stranger = False

        def heard(response: TasksResponse) -> None:
            nonlocal stranger
            self.last_heard = self._clock()
            if response.HasField("welcome"):
                stranger = response.welcome.incarnation != self.incarnation
                if stranger:
                    call.cancel()
                else:
                    self._welcomed(response.welcome, self.last_heard - started)
                return
            if self.link is Link.SUSPECT:
                self._set_link(Link.UP)
            self._take(response.step)

        try:
            if isinstance(call, StreamCall):
                self._direct = call
                await call.hear(heard)
            else:
                async for response in call:
                    heard(response)
                    if stranger:
                        break
        finally:
            self._direct = None
            self._take_rest()
        if stranger:
            return "another process answers at its address"
        return f"closed by the executor: {await call.details() or 'end of stream'}"

    def _welcomed(self, welcome: Welcome, seconds: float) -> None:
        metrics.CONNECT_SECONDS.observe(seconds)
        self.last_error = ""
        self._on_welcome(welcome)
        self._set_link(Link.UP)
        metrics.LINKS.labels("up").inc()
        self._queued.set()

    def _take(self, step: StepEvent) -> None:
        """A step of many streams is milliseconds of work: first tokens go before those that follow others."""
        self._take_rest()  # of the step before
        metrics.EVENTS.inc()
        self._on_step(step)
        firsts = 0
        for delta in step.deltas:
            if not delta.start_index:
                firsts += 1
                self._take_delta(delta)
        self._rest = step if firsts < len(step.deltas) else None
        if not firsts:
            self._take_rest()
        elif self._rest is not None:  # who waited for a first token reads it before the others are served
            asyncio.get_running_loop().call_soon(self._take_rest)

    def _take_rest(self) -> None:
        step, self._rest = self._rest, None
        if step is not None:
            for delta in step.deltas:
                if delta.start_index:
                    self._take_delta(delta)

    def _take_delta(self, delta: TaskDelta) -> None:
        key = (delta.task_id, delta.attempt)
        listener = self._tasks.get(key)
        if listener is None:
            return
        if delta.finish:
            self.forget(*key)
        try:
            listener.on_delta(self.te_id, delta)
        except Exception:  # a task boundary: one task's fault must not end the stream of all others
            log.exception("task %s: a delta of executor %s cannot be taken in", delta.task_id, self.te_id)
            self.abort(*key, "its delta cannot be taken in")
            self._tell_lost(listener, delta.attempt, "its delta cannot be taken in")

    async def _write(self, call: TasksCall) -> str:
        hello = Hello(gateway_id=self._settings.gateway_id, incarnation=self._settings.incarnation)
        await call.write(TasksRequest(hello=hello))
        while True:
            self._queued.clear()
            while self._queue and self.link in (Link.UP, Link.SUSPECT):
                message = self._queue.popleft()
                metrics.SEND_QUEUE.dec()
                await call.write(message)
            await self._queued.wait()

    async def _watch(self) -> str:
        opened = turned = self._clock()
        pause = min(0.5, self._settings.suspect_seconds / 4)
        while True:
            await asyncio.sleep(pause)
            now = self._clock()
            # What this process slept through (a busy or stopped host) is not the executor's silence.
            self.last_heard = min(now, self.last_heard + max(0.0, now - turned - 2 * pause))
            turned = now
            silent = now - self.last_heard
            if self.link is Link.CONNECTING and self._clock() - opened > self._settings.welcome_seconds:
                return f"no welcome within {self._settings.welcome_seconds:g} s"
            if self.link is Link.UP and silent > self._settings.suspect_seconds:
                metrics.LINKS.labels("suspect").inc()
                self._set_link(Link.SUSPECT)
            if silent > self._settings.lost_seconds:
                return f"silent for {silent:.1f} s"

    def _send(self, message: TasksRequest) -> None:
        self._queue.append(message)
        metrics.SEND_QUEUE.inc()
        if self._direct is None:
            self._queued.set()
        elif len(self._queue) == 1:  # what else is asked in this turn of the loop goes with it
            asyncio.get_running_loop().call_soon(self._write_at_once)

    def _write_at_once(self) -> None:
        direct = self._direct
        while self._queue and direct is not None and self.link in (Link.UP, Link.SUSPECT):
            if not direct.write_now(self._queue[0]):
                break
            self._queue.popleft()
            metrics.SEND_QUEUE.dec()
        if self._queue:
            self._queued.set()  # `_write` waits for room

    def _set_link(self, link: Link) -> None:
        if link is not self.link:
            self.link = link
            self._on_link(link)

    def _lose(self, link: Link, reason: str) -> None:
        tasks, self._tasks = self._tasks, {}
        metrics.TASKS.dec(len(tasks))
        metrics.SEND_QUEUE.dec(len(self._queue))
        self._queue.clear()
        self._set_link(link)
        if tasks:
            log.warning("executor %s lost with %d tasks: %s", self.te_id, len(tasks), reason)
            metrics.TASKS_LOST.inc(len(tasks))
        for (_, attempt), listener in tasks.items():
            self._tell_lost(listener, attempt, reason)

    def _tell_lost(self, listener: TaskListener, attempt: int, reason: str) -> None:
        try:
            listener.on_lost(self.te_id, attempt, reason)
        except Exception:  # a task boundary: the other tasks must hear of their loss too
            log.exception("a task's loss with executor %s cannot be handled", self.te_id)


def _reason(task: asyncio.Task[str]) -> str:
    if task.cancelled():
        return "cancelled"
    error = task.exception()
    if error is None:
        return task.result()
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    if isinstance(error, StreamEnded):
        return str(error)
    if not isinstance(error, (grpc.RpcError, asyncio.InvalidStateError, OSError)):
        log.error("the stream's reader or writer failed", exc_info=error)
    return f"{type(error).__name__}: {error}"
