"""The bridge between the engine's thread and kvtransfer: offers go out, pulls and prefixes come in.

Offers go straight to the sender, whose registry is thread-safe. Pulls and fetches run on the event loop,
each a task of `run`'s TaskGroup; whatever happens to one, and however early it is cancelled, the engine
hears of its end exactly once, and only when nothing writes its blocks any more (quarantine).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from flowserve.engine.types import EngineTask, ErrorCode, PrefixSource, PullRequest, TaskError
from flowserve.shell import metrics
from kvtransfer.errors import TransferError, TransferErrorCode

if TYPE_CHECKING:
    from kvtransfer.prefixes import Fetched
    from kvtransfer.receiver import PullResult
    from kvtransfer.sender import Sender

log = logging.getLogger(__name__)

Key = tuple[str, int]

MAX_FETCHES = 8
"""Prefixes fetched at once (ours): more would only share the same memory and network; others are computed."""


class Puller(Protocol):
    """What is asked of `kvtransfer.receiver.Receiver`."""

    async def pull(  # noqa: PLR0917  as the receiver's
        self,
        source_address: str,
        source_te_id: str,
        source_incarnation: str,
        transfer_id: str,
        dst_blocks: Sequence[int],
        length: int,
        skip_blocks: int = 0,
        deadline: float | None = None,
        attempt: int = 0,
    ) -> PullResult: ...


class Fetcher(Protocol):
    """What is asked of `kvtransfer.prefixes.PrefixFetcher`."""

    def expected_seconds(self, peer: tuple[str, str, str], blocks: int) -> float: ...

    def declined(self, peer: tuple[str, str, str]) -> None: ...

    async def fetch(
        self,
        peer: tuple[str, str, str],
        identities: Sequence[bytes],
        blocks: Sequence[int],
        deadline: float,
    ) -> Fetched: ...


class TransferAnswers(Protocol):
    """What is told to `flowserve.engine.engine.Engine`."""

    def pull_done(
        self, task_id: str, attempt: int, error: TaskError | None = None, payload: bytes = b""
    ) -> None: ...

    def release_transfer(self, transfer_id: str, outcome: str) -> None: ...


class Handover:
    """Implements `KVHandover` and `PrefixExchange` of `flowserve.engine.types`."""

    def __init__(
        self,
        sender: Callable[[], Sender],
        puller: Puller,
        fetcher: Fetcher | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`sender` is asked at each call: sender and handover know each other. `fetcher` None: no prefix is
        fetched. `clock` is the receiver's."""
        self._sender = sender
        self._puller = puller
        self._fetcher = fetcher
        self._clock = clock
        self._engine: TransferAnswers | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._group: asyncio.TaskGroup | None = None
        self._stopped = asyncio.Event()
        self._pulls: dict[Key, asyncio.Task[TaskError | bytes]] = {}
        self._fetches: set[asyncio.Task[int]] = set()

    def attach(self, engine: TransferAnswers) -> None:
        """Answers go to `engine` from now on. Before the first task."""
        self._engine = engine

    def detach(self) -> None:
        """No answer goes to the engine any more: it has ended, with no task and no offer left."""
        self._engine = None

    async def run(self) -> None:
        """Owns the pulls until `stop`."""
        self._loop = asyncio.get_running_loop()
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                await self._stopped.wait()
                for task in (*self._pulls.values(), *self._fetches):
                    task.cancel()
        finally:
            self._group = None

    def stop(self) -> None:
        """Cancels every pull; `run` returns when nothing writes any more."""
        self._stopped.set()

    # -- the engine's thread ---------------------------------------------------------------------

    def offer(self, transfer_id: str, task: EngineTask) -> float:
        return self._sender().offer(transfer_id)

    def announce(self, transfer_id: str, first_block: int, blocks: Sequence[int], tokens: int) -> None:
        self._sender().announce(transfer_id, first_block, blocks, tokens)

    def complete(self, transfer_id: str, tokens: int, payload: bytes) -> None:
        self._sender().complete(transfer_id, tokens, payload)

    def withdraw(self, transfer_id: str, reason: str) -> None:
        self._sender().withdraw(transfer_id, reason)

    def start_pull(self, request: PullRequest) -> None:
        """Raises RuntimeError where the loop has ended: the pull was not started, no answer follows."""
        if self._loop is None:
            raise RuntimeError("the executor's loop does not run")
        self._loop.call_soon_threadsafe(self._start, request)

    def cancel_pull(self, task_id: str, attempt: int) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._cancel, (task_id, attempt))

    # -- prefixes: the engine's thread, `lend` under its state lock -------------------------------

    def lend(self, transfer_id: str, blocks: Sequence[int], tokens: int) -> None:
        sender = self._sender()
        sender.offer(transfer_id)
        sender.announce(transfer_id, 0, blocks, tokens)
        sender.complete(transfer_id, tokens)

    def fetch_seconds(self, source: PrefixSource, blocks: int) -> float:
        if self._fetcher is None or self._loop is None or len(self._fetches) >= MAX_FETCHES:
            return math.inf
        return self._fetcher.expected_seconds(_address(source), blocks)

    def fetch_declined(self, source: PrefixSource) -> None:
        if self._fetcher is not None:
            self._fetcher.declined(_address(source))

    def start_fetch(
        self,
        source: PrefixSource,
        identities: Sequence[bytes],
        blocks: Sequence[int],
        seconds: float,
        done: Callable[[int], None],
    ) -> Callable[[], None]:
        """Raises RuntimeError where the loop has ended: nothing was started, `done` is not called."""
        loop = self._loop
        if loop is None:
            raise RuntimeError("the executor's loop does not run")
        started: list[asyncio.Task[int]] = []
        deadline = self._clock() + seconds

        def start() -> None:
            if self._group is None or self._stopped.is_set():
                done(0)
                return
            work = self._fetch(source, list(identities), list(blocks), deadline)
            task = self._group.create_task(work, name=f"fetch-{source.te_id}")
            started.append(task)
            self._fetches.add(task)
            task.add_done_callback(lambda ended: self._fetched(ended, done))

        def stop() -> None:
            for task in started:
                task.cancel()

        loop.call_soon_threadsafe(start)
        return lambda: _post(loop, stop)

    def _fetched(self, task: asyncio.Task[int], done: Callable[[int], None]) -> None:
        self._fetches.discard(task)
        done(0 if task.cancelled() else task.result())

    async def _fetch(
        self, source: PrefixSource, identities: list[bytes], blocks: list[int], deadline: float
    ) -> int:
        """How many blocks came; errors are a miss, so that they cannot end the group."""
        assert self._fetcher is not None, "`fetch_seconds` says so"
        try:
            came = await self._fetcher.fetch(_address(source), identities, blocks, deadline)
        except TransferError as error:
            log.info("no prefix from %s: %s", source.te_id, error)
            return 0
        except Exception:  # a task boundary: one fetch fails, its task computes
            log.exception("fetching a prefix from %s failed", source.te_id)
            return 0
        log.debug(
            "%d blocks from %s: %d bytes, %s, %.3f s",
            came.blocks,
            source.te_id,
            came.bytes,
            came.transport,
            came.seconds,
        )
        return came.blocks

    # -- any thread ------------------------------------------------------------------------------

    def released(self, transfer_id: str, outcome: str) -> None:
        """The sender's terminal event of an offer."""
        if self._engine is not None:
            self._engine.release_transfer(transfer_id, outcome)

    # -- the loop --------------------------------------------------------------------------------

    def _start(self, request: PullRequest) -> None:
        key = (request.task_id, request.attempt)
        if self._group is None or self._stopped.is_set():
            self._answer(key, _lost("this executor is stopping"))
            return
        task = self._group.create_task(self._pull(request), name=f"pull-{request.task_id}")
        self._pulls[key] = task
        metrics.PULLS.set(len(self._pulls))
        # Not in the coroutine: one that is cancelled before its first step never runs.
        task.add_done_callback(lambda done: self._done(key, done))

    def _cancel(self, key: Key) -> None:
        task = self._pulls.get(key)
        if task is not None:
            task.cancel()

    def _done(self, key: Key, task: asyncio.Task[TaskError | bytes]) -> None:
        del self._pulls[key]
        metrics.PULLS.set(len(self._pulls))
        self._answer(key, _lost("the pull was cancelled") if task.cancelled() else task.result())

    def _answer(self, key: Key, result: TaskError | bytes) -> None:
        if self._engine is None:
            return
        if isinstance(result, TaskError):
            self._engine.pull_done(*key, result)
        else:
            self._engine.pull_done(*key, None, result)

    async def _pull(self, request: PullRequest) -> TaskError | bytes:
        """One pull's payload; an error as a value, so that it cannot end the group."""
        source = request.source
        try:
            result = await self._puller.pull(
                source.address,
                source.te_id,
                source.incarnation,
                source.transfer_id,
                request.blocks,
                request.length,
                request.skip_blocks,
                request.deadline,
                request.attempt,
            )
        except TransferError as error:
            log.warning("pull of %s from %s failed: %s", source.transfer_id, source.te_id, error)
            return task_error(error, request.deadline is not None)
        except Exception as error:  # a task boundary: one pull fails, the others go on
            log.exception("pull of %s from %s failed", source.transfer_id, source.te_id)
            return TaskError(ErrorCode.INTERNAL, f"{type(error).__name__}: {error}", retryable=True)
        log.debug(
            "pulled %s: %d bytes, %d moves, %s, %.3f s",
            source.transfer_id,
            result.bytes,
            result.moves,
            result.transport,
            result.seconds,
        )
        return result.payload


def task_error(error: TransferError, has_deadline: bool) -> TaskError:
    """A failed transfer as the gateway sees it.

    Only the task's own deadline ends it for good. A layout mismatch, which no second pull between the
    same two executors survives, is retryable too: another placement needs no transfer.
    """
    if error.code is TransferErrorCode.DEADLINE and has_deadline:
        return TaskError(ErrorCode.DEADLINE_EXCEEDED, error.message)
    return TaskError(ErrorCode.KV_TRANSFER_FAILED, str(error), retryable=True)


def _address(source: PrefixSource) -> tuple[str, str, str]:
    return (source.address, source.te_id, source.incarnation)


def _post(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop was closed: its tasks have ended
        loop.call_soon_threadsafe(call)


def _lost(message: str) -> TaskError:
    return TaskError(ErrorCode.KV_TRANSFER_FAILED, message, retryable=True)
