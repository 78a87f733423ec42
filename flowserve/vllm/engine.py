"""What the TE-shell asks of an engine, answered by vLLM's AsyncLLM.

vLLM schedules, computes and keeps its own prefix cache; this turns tasks into its requests and its outputs
into deltas. It runs on a loop of its own thread: a step's outputs never wait for the shell's loop. Tasks are
whole requests: KV is neither handed over nor lent, and what is cached is not told.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any, Protocol

from flowserve.engine import metrics
from flowserve.engine.admission import check_task
from flowserve.engine.core import AuditResult
from flowserve.engine.prefixes import NotCached
from flowserve.engine.types import (
    EngineTask,
    ErrorCode,
    FinishReason,
    KVEvents,
    LoadReport,
    Role,
    StepEvent,
    TaskDelta,
    TaskError,
    TaskKind,
    TaskRejected,
    TaskTimings,
    TokenLogprobs,
)
from flowserve.executor.interface import ModelInfo

log = logging.getLogger(__name__)

STOP_SECONDS = 30.0
"""For vLLM's processes to end."""
WEIGHT = 0.1
"""Of the newest value in a running mean (ours: about the last ten count)."""

_FINISH = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH, "abort": FinishReason.ABORTED}


class Output(Protocol):
    """What is read of a `vllm.RequestOutput` with one `CompletionOutput`."""

    @property
    def outputs(self) -> Any: ...

    @property
    def finished(self) -> bool: ...

    @property
    def prompt_logprobs(self) -> Any: ...

    @property
    def num_cached_tokens(self) -> int | None: ...


class Client(Protocol):
    """What is asked of vLLM; every call on the engine's loop."""

    def generate(self, task: EngineTask, request_id: str, max_tokens: int) -> AsyncGenerator[Output, None]:
        """Outputs since the one before. Closing it ends the request. Raises ValueError for what vLLM cannot
        do, EngineLost where it is gone."""
        ...

    @property
    def lost(self) -> str:
        """Why no request can be served any more; "" while they can."""
        ...

    @property
    def stats(self) -> Stats: ...

    def shutdown(self) -> None: ...


class EngineLost(RuntimeError):
    """vLLM's engine is dead; what is left to this process is to end."""


@dataclass(slots=True)
class Stats:
    """What vLLM last said of its scheduler."""

    steps: int = 0
    running: int = 0
    waiting: int = 0
    kv_used: float = 0.0  # share of its blocks


@dataclass(slots=True)
class _Running:
    task: EngineTask
    submitted: float
    first: float = 0.0  # when its first output came
    work: asyncio.Task[None] | None = None
    why: str = ""  # it was aborted
    sent: int = 0  # tokens of this attempt
    told: bool = False  # a delta was sent
    began: bool = False  # its work runs: one that is cancelled before never would
    done: bool = False


@dataclass(slots=True)
class Loop:
    """An event loop on a thread of its own."""

    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)
    thread: threading.Thread | None = None

    def start(self) -> None:
        self.thread = threading.Thread(target=self.loop.run_forever, name="vllm", daemon=True)
        self.thread.start()

    def call(self, work: Coroutine[Any, Any, Any], timeout: float | None = None) -> Any:
        """From another thread: what `work` comes to. Raises TimeoutError."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout)

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        if self.thread is not None:
            self.thread.join(STOP_SECONDS)


class VllmEngine:
    """One model on one AsyncLLM."""

    def __init__(
        self,
        client: Client,
        loop: Loop,
        info: ModelInfo,
        *,
        num_blocks: int,
        block_tokens: int,
        max_tasks: int,
        on_event: Callable[[StepEvent], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`loop` runs; `on_event` is called on its thread and must not block. At most `max_tasks` wait or
        run."""
        self._client, self._loop = client, loop
        self._info, self._num_blocks, self._block_tokens = info, num_blocks, block_tokens
        self._max_tasks = max_tasks
        self._on_event = on_event
        self._clock = clock
        self._lock = threading.Lock()
        self._tasks: dict[tuple[str, int], _Running] = {}
        self._stopping = False
        self._role = Role.COLOCATED
        self._prefill_rate = 0.0
        self._step_seconds = 0.0

    # -- calls from any thread -------------------------------------------------------------------

    def submit(self, task: EngineTask) -> None:
        """Accepts a task; exactly one delta with `finish` set will follow. Raises TaskRejected."""
        error = self._refusal(task)
        with self._lock:
            if error is not None:
                pass
            elif self._stopping:
                error = TaskError(ErrorCode.DRAINING, "the engine is stopping", retryable=True)
            elif task.key in self._tasks:
                error = TaskError(ErrorCode.INVALID_ARGUMENT, f"attempt {task.attempt} is here already")
            elif len(self._tasks) >= self._max_tasks:
                message = f"{self._max_tasks} tasks are waiting or running"
                error = TaskError(ErrorCode.QUEUE_FULL, message, retryable=True)
            else:
                running = self._tasks[task.key] = _Running(task, self._clock())
                self._loop.loop.call_soon_threadsafe(self._start, running)
                return
        metrics.ERRORS.labels(error.code.value).inc()
        raise TaskRejected(error)

    def abort(self, task_id: str, attempt: int, reason: str = "aborted by its owner") -> None:
        """Unknown tasks are ignored."""
        with self._lock:
            running = self._tasks.get((task_id, attempt))
        if running is not None:
            self._loop.loop.call_soon_threadsafe(self._abort, running, reason)

    def abort_owner(self, owner: str) -> None:
        with self._lock:
            mine = [running for running in self._tasks.values() if running.task.owner == owner]
        for running in mine:
            self._loop.loop.call_soon_threadsafe(self._abort, running, "its gateway is gone")

    def set_role(self, role: Role) -> None:
        """Only told on: whole requests are served in any role."""
        self._role = role

    def lend(self, identities: Seq[bytes]) -> tuple[str, int]:
        raise NotCached("engine vllm lends no KV")

    def pull_done(
        self, task_id: str, attempt: int, error: TaskError | None = None, payload: bytes = b""
    ) -> None:
        """Nothing was pulled."""

    def release_transfer(self, transfer_id: str, outcome: str) -> None:
        """Nothing was offered."""

    def stop(self, timeout: float = 5.0) -> bool:
        """Ends all tasks with a retryable error. False where they did not end within `timeout` seconds."""
        with self._lock:
            self._stopping = True
        try:
            self._loop.call(self._end_all(), timeout)
        except TimeoutError:
            return False
        return True

    # -- reports, from any thread ----------------------------------------------------------------

    @property
    def active_tasks(self) -> int:
        return len(self._tasks)

    @property
    def consecutive_failures(self) -> int:
        """vLLM counts none: it ends."""
        return 0

    @property
    def lost(self) -> str:
        return self._client.lost

    def load(self) -> LoadReport:
        stats, tasks = self._client.stats, len(self._tasks)
        used = min(self._num_blocks, round(stats.kv_used * self._num_blocks))
        running = min(stats.running, tasks)
        with self._lock:
            queued = [r.task for r in self._tasks.values() if not r.first]
        return LoadReport(
            step=stats.steps,
            waiting=tasks - running,
            running=running,
            queued_prefill_tokens=sum(len(task.prompt) + len(task.output) for task in queued),
            kv_blocks_total=self._num_blocks,
            kv_blocks_free=self._num_blocks - used,
            prefill_tokens_per_second=self._prefill_rate,
            decode_step_seconds=self._step_seconds,
            role=self._role,
        )

    def snapshot_kv_events(self) -> KVEvents:
        """Empty: what vLLM keeps is not told."""
        return KVEvents(cleared=True)

    def audit(self) -> AuditResult:
        """vLLM's blocks are its own; a task without its work on the loop is stuck."""
        with self._lock:
            stuck = sum(r.work is not None and r.work.done() for r in self._tasks.values())
        return AuditResult(leaked_blocks=0, stuck_tasks=stuck)

    # -- on the loop -----------------------------------------------------------------------------

    def _start(self, running: _Running) -> None:
        running.work = self._loop.loop.create_task(self._serve(running))

    def _abort(self, running: _Running, reason: str) -> None:
        if not running.done:
            running.why = running.why or reason
            if running.work is not None and running.began:  # else it sees the reason as it begins
                running.work.cancel()

    async def _end_all(self) -> None:
        while self._tasks:
            for running in list(self._tasks.values()):
                self._abort(running, "the engine is stopping")
            await asyncio.sleep(0.01)

    async def _serve(self, running: _Running) -> None:
        """One task from its submit to its last delta, whatever happens."""
        task = running.task
        finish, error = FinishReason.ERROR, None
        running.began = True
        try:
            if running.why:
                raise asyncio.CancelledError
            seconds = None if task.deadline is None else max(0.0, task.deadline - self._clock())
            async with asyncio.timeout(seconds):
                finish = await self._follow(running)
        except TimeoutError:
            error = TaskError(ErrorCode.DEADLINE_EXCEEDED, "the task's time is over")
        except asyncio.CancelledError:
            if running.why == "the engine is stopping":
                error = TaskError(ErrorCode.DRAINING, running.why, retryable=True)
            else:
                finish = FinishReason.ABORTED
        except ValueError as problem:
            error = TaskError(ErrorCode.INVALID_ARGUMENT, str(problem) or type(problem).__name__)
        except Exception as problem:  # a task boundary: one request fails, the engine goes on
            log.exception("task %s failed", task.task_id)
            error = TaskError(ErrorCode.INTERNAL, f"{type(problem).__name__}: {problem}", retryable=True)
        self._end(running, FinishReason.ERROR if error is not None else finish, error)

    async def _follow(self, running: _Running) -> FinishReason:
        """Sends what comes; why it ended. Raises ValueError, EngineLost."""
        task = running.task
        # A context that is full, or an echo, wants the prompt's scores alone: vLLM always makes one token.
        budget = task.max_output_tokens - len(task.output)
        request_id = f"{task.task_id}#{task.attempt}"
        outputs = self._client.generate(task, request_id, max(1, budget))
        last = running.submitted
        async with contextlib.aclosing(outputs) as found:
            async for output in found:
                now = self._clock()
                self._measure(running, now, last)
                last = now
                delta = self._delta(running, output, budget)
                reason = output.outputs[0].finish_reason if output.finished else None
                if delta.tokens or delta.cached_tokens is not None or delta.prompt_logprobs is not None:
                    self._tell(delta)
                if reason is not None:
                    if reason not in _FINISH:
                        raise EngineLost(f"vLLM ended the request: {reason}")
                    return _FINISH[reason] if budget else FinishReason.LENGTH
        raise EngineLost("vLLM ended the request without a word")

    def _delta(self, running: _Running, output: Output, budget: int) -> TaskDelta:
        task, said = running.task, output.outputs[0]
        tokens = [int(token) for token in said.token_ids][: max(0, budget - running.sent)]
        delta = TaskDelta(
            task.task_id,
            task.attempt,
            task.owner,
            start_index=len(task.output) + running.sent,
            tokens=tokens,
        )
        if task.sampling.logprobs is not None and said.logprobs is not None:
            delta.logprobs = [
                scored(token, found, task.sampling.logprobs)
                for token, found in zip(tokens, said.logprobs, strict=False)
            ]
        if not running.told:
            running.told = True
            delta.cached_tokens = min(output.num_cached_tokens or 0, len(task.prompt))
            if task.sampling.prompt_logprobs is not None and output.prompt_logprobs is not None:
                delta.prompt_logprobs = [
                    None if found is None else scored(int(token), found, task.sampling.prompt_logprobs)
                    for token, found in zip(task.prompt, output.prompt_logprobs, strict=False)
                ]
        running.sent += len(tokens)
        return delta

    def _measure(self, running: _Running, now: float, last: float) -> None:
        """Running means of what schedulers ask for."""
        if not running.first:
            running.first = now
            tokens, seconds = len(running.task.prompt), now - running.submitted
            if seconds > 0:
                self._prefill_rate = mean(self._prefill_rate, tokens / seconds)
        else:
            self._step_seconds = mean(self._step_seconds, now - last)

    def _end(self, running: _Running, finish: FinishReason, error: TaskError | None) -> None:
        running.done = True
        task, now = running.task, self._clock()
        first = running.first or now
        with self._lock:
            self._tasks.pop(task.key, None)
        if error is not None:
            metrics.ERRORS.labels(error.code.value).inc()
        self._tell(
            TaskDelta(
                task.task_id,
                task.attempt,
                task.owner,
                start_index=len(task.output) + running.sent,
                finish=finish,
                error=error,
                timings=TaskTimings(queued_seconds=first - running.submitted, compute_seconds=now - first),
            )
        )

    def _tell(self, delta: TaskDelta) -> None:
        try:
            self._on_event(StepEvent([delta]))
        except Exception:  # a task boundary: the shell's callback must not stop the engine
            log.exception("the step event's receiver failed; a delta of %s is lost", delta.task_id)

    def _refusal(self, task: EngineTask) -> TaskError | None:
        if task.kind is not TaskKind.UNIFIED:
            message = f"engine vllm serves whole requests, not {task.kind.value} tasks"
            return TaskError(ErrorCode.INVALID_ARGUMENT, message)
        if task.processor_state:
            message = "engine vllm takes no logit processors of ours (structured outputs)"
            return TaskError(ErrorCode.INVALID_ARGUMENT, message)
        return check_task(task, self._info, self._num_blocks * self._block_tokens, can_hand_over=False)


def scored(token: int, found: dict[int, Any], count: int) -> TokenLogprobs:
    """One position's log-probabilities, as vLLM gives them: the token's, and the `count` most likely ones'
    (among which the token need not be)."""
    top = sorted(
        ((int(one), float(value.logprob)) for one, value in found.items() if value.rank is not None),
        key=lambda pair: -pair[1],
    )
    mine = found.get(token)
    return TokenLogprobs(
        token,
        float(mine.logprob) if mine is not None else float("-inf"),
        int(mine.rank or 0) if mine is not None else 0,
        tuple(top[:count]),
    )


def mean(before: float, value: float) -> float:
    return value if not before else (1 - WEIGHT) * before + WEIGHT * value
