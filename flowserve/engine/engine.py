"""The engine: a thread that turns, and the thread-safe calls the TE-shell makes on it.

Calls leave a command in the mailbox and wake the loop; what comes of it is told through `on_event`
on the engine's thread. Policy and bookkeeping are in `flowserve.engine.core`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from functools import partial

from flowserve.engine import metrics
from flowserve.engine.admission import check_task
from flowserve.engine.config import EngineConfig
from flowserve.engine.core import AuditResult, EngineCore, Key
from flowserve.engine.prefixes import NotCached
from flowserve.engine.scheduler import Plan
from flowserve.engine.sequence import Sequence, SequenceProcessor, State
from flowserve.engine.transfers import transfer_id_of
from flowserve.engine.types import (
    EngineTask,
    ErrorCode,
    KVEvents,
    KVHandover,
    LoadReport,
    PrefixExchange,
    Role,
    StepEvent,
    TaskError,
    TaskRejected,
)
from flowserve.executor.interface import Executor, ExecutorLost
from flowserve.rtc import RTC

log = logging.getLogger(__name__)

FAILURE_PAUSE_SECONDS = 0.1
"""Pause after a second failure in a row (ours): a broken device must not spin the loop."""

AUDIT_SECONDS = 5.0
"""How often the loop audits itself for the metrics (ours; about 1 ms for 10,000 blocks)."""

ProcessorFactory = Callable[[EngineTask], SequenceProcessor | None]


def restored_processor(task: EngineTask) -> SequenceProcessor | None:
    """The processor named in a task's state. Raises ValueError for a state that cannot be read."""
    if not task.processor_state:
        return None
    from flowserve.engine.processors import restore  # brings torch: most tasks, and tests, need none

    return restore(task.processor_state)


class Engine:
    """One model on one executor. `start`, then submit; `stop` ends every task."""

    def __init__(
        self,
        executor: Executor,
        cache: RTC,
        config: EngineConfig,
        *,
        handover: KVHandover | None,
        on_event: Callable[[StepEvent], None],
        exchange: PrefixExchange | None = None,
        processor_factory: ProcessorFactory = restored_processor,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`on_event` runs on the engine's thread and must not block. `handover` None: unified tasks only;
        `exchange` None: prefixes are neither lent nor fetched.

        `processor_factory` makes a task's logit processor (restored from `task.processor_state`); it runs
        in `submit`, and raises ValueError for a state it cannot read.
        """
        self._executor = executor
        self._config = config
        self._on_event = on_event
        self._processor_factory = processor_factory
        self._clock = clock
        self._core = EngineCore(
            executor.info,
            cache,
            config,
            handover,
            self.wake,
            make_processor=processor_factory,
            exchange=exchange,
        )
        self._cache = cache
        self._state = threading.RLock()  # the core and the cache; never held while a batch executes
        self._mail = threading.Condition()  # guards what is below, shortly
        self._commands: deque[Callable[[], None]] = deque()
        self._keys: set[Key] = set()  # accepted, not ended
        self._aborting: set[object] = set()  # abort commands in the mailbox: one per target
        self._nudged = False
        self._submitted = 0
        self._stopping = False
        self._finished = False
        self._thread: threading.Thread | None = None
        self._last_turn = clock()
        self._last_audit = clock()
        self._steps = 0
        self._failures = 0
        self._lost = ""
        self._load = self._measure()

    # -- life ------------------------------------------------------------------------------------

    def start(self) -> None:
        if self._thread is not None:
            raise RuntimeError("the engine was started before")
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def stop(self, timeout: float = 5.0) -> bool:
        """Ends all tasks with a retryable error. False if a running step outlasts `timeout` seconds."""
        with self._mail:
            self._stopping = True
            self._nudged = True
            self._mail.notify()
        if self._thread is None:
            self._wind_down()
            return True
        self._thread.join(timeout)
        return not self._thread.is_alive()

    # -- calls from any thread -------------------------------------------------------------------

    def submit(self, task: EngineTask) -> None:
        """Accepts a task; exactly one delta with `finish` set will follow. Raises TaskRejected."""
        cache = self._cache
        error = check_task(
            task,
            self._executor.info,
            cache.num_blocks * cache.block_tokens,
            self._core.ledger.can_hand_over,
        )
        if error is not None:
            raise self._rejected(error)
        try:
            processor = self._processor_factory(task)
        except ValueError as problem:
            message = f"logit processor cannot be made: {problem}"
            raise self._rejected(TaskError(ErrorCode.INVALID_ARGUMENT, message)) from problem
        key = task.key
        with self._mail:
            if self._stopping:
                error = TaskError(ErrorCode.DRAINING, "the engine is stopping", retryable=True)
            elif key in self._keys or key in self._core.ledger.pulls:
                error = TaskError(ErrorCode.INVALID_ARGUMENT, f"attempt {task.attempt} is here already")
            elif transfer_id_of(key) in self._core.ledger.offers:
                error = TaskError(ErrorCode.INVALID_ARGUMENT, f"attempt {task.attempt} is still on offer")
            elif len(self._keys) >= self._config.max_tasks:
                message = f"{self._config.max_tasks} tasks are waiting or running"
                error = TaskError(ErrorCode.QUEUE_FULL, message, retryable=True)
            else:
                self._submitted += 1
                sequence = Sequence(task, self._submitted, self._clock(), processor)
                self._keys.add(key)
                self._post(partial(self._core.add, sequence))
                return
        raise self._rejected(error)

    def abort(self, task_id: str, attempt: int, reason: str = "aborted by its owner") -> None:
        """Ends a task, or withdraws what it has handed over. Unknown tasks are ignored."""
        key = (task_id, attempt)
        with self._mail:
            known = key in self._keys or transfer_id_of(key) in self._core.ledger.offers
            if known and key not in self._aborting:
                self._aborting.add(key)
                self._post(partial(self._abort, key, reason))

    def abort_owner(self, owner: str) -> None:
        """Ends every task of `owner` and withdraws its offers."""
        with self._mail:
            if owner not in self._aborting:
                self._aborting.add(owner)
                self._post(partial(self._abort_owner, owner))

    def pull_done(
        self, task_id: str, attempt: int, error: TaskError | None = None, payload: bytes = b""
    ) -> None:
        """The one answer to `KVHandover.start_pull`: nothing writes the blocks any more. `payload` is what
        the prefill's `KVHandover.complete` gave."""
        self._command(lambda: self._core.pull_done((task_id, attempt), error, self._clock(), payload))

    def release_transfer(self, transfer_id: str, outcome: str) -> None:
        """The one answer to `KVHandover.offer`: no peer reads the blocks any more."""
        self._command(partial(self._core.release_transfer, transfer_id, outcome))

    def lend(self, identities: Seq[bytes]) -> tuple[str, int]:
        """Puts what is cached of a prefix on offer: (transfer id, blocks), see `Prefixes.lend` for errors.

        Waits for the bookkeeping of a step, not for its batch.
        """
        with self._state:
            if self._finished or self._stopping:
                raise NotCached("the engine is stopping")
            return self._core.prefixes.lend(identities)

    def set_role(self, role: Role) -> None:
        """Changes what the next step prefers. Any kind is still accepted."""
        self._core.scheduler.role = role
        self.wake()

    def wake(self) -> None:
        with self._mail:
            self._nudged = True
            self._mail.notify()

    # -- reports, from any thread ----------------------------------------------------------------

    @property
    def active_tasks(self) -> int:
        """Accepted tasks that have not ended."""
        return len(self._keys)

    @property
    def consecutive_failures(self) -> int:
        """Steps that raised since the last one that did not."""
        return self._failures

    @property
    def lost(self) -> str:
        """Why the executor can take no other step; empty while it can."""
        return self._lost

    def load(self) -> LoadReport:
        """The load after the last turn; takes no lock."""
        last = self._load
        return LoadReport(
            step=last.step,
            waiting=max(0, len(self._keys) - last.running),
            running=last.running,
            queued_prefill_tokens=last.queued_prefill_tokens,
            kv_blocks_total=last.kv_blocks_total,
            kv_blocks_free=last.kv_blocks_free,
            kv_blocks_cached=last.kv_blocks_cached,
            prefill_tokens_per_second=last.prefill_tokens_per_second,
            decode_step_seconds=last.decode_step_seconds,
            transfers_out=last.transfers_out,
            transfers_in=last.transfers_in,
            role=self._core.scheduler.role,
            age_seconds=max(0.0, self._clock() - self._last_turn),
        )

    def snapshot_kv_events(self) -> KVEvents:
        """Everything reusable now, as one event with `cleared` set.

        Its `sequence` is the number of the next change. A follower applies it, drops later events that
        end before that number, and applies those that start at it.
        """
        with self._state:
            sequence, stored = self._cache.snapshot()
        return KVEvents(sequence, stored=stored, cleared=True)

    def audit(self) -> AuditResult:
        """Counts leaked blocks and stuck tasks; waits for the bookkeeping of a step, not for its batch."""
        with self._state:
            if self._finished:  # nobody turns any more: late answers of transfers are taken in here
                self._run_commands()
            return self._core.audit(self._clock())

    # -- the loop --------------------------------------------------------------------------------

    def step_once(self) -> bool:
        """One turn: commands, one batch, events. False if there was nothing to do.

        For an engine that was not started (tests, a driver with its own loop).
        """
        with self._state:
            self._last_turn = now = self._clock()
            changed = self._run_commands()
            plan = self._core.prepare(now)
            batch = self._core.slices(plan)
            event = self._collect()
        self._tell(event)
        if not batch:
            return changed or event is not None or bool(plan.admitted or plan.preempted)
        started = self._clock()
        try:
            results = self._executor.execute(batch)
            if len(results) != len(batch):
                raise RuntimeError(f"the executor returned {len(results)} results for {len(batch)} slices")
        except Exception as error:  # a task boundary: this batch fails, the engine goes on
            log.exception("a step of %d slices failed", len(batch))
            self._lost = str(error) if isinstance(error, ExecutorLost) else self._lost
            self._failed(plan, f"the step failed: {type(error).__name__}: {error}")
            return True
        with self._state:
            self._last_turn = now = self._clock()
            self._steps += 1
            self._failures = 0
            self._core.finish(plan, results, now - started, now)
            event = self._collect()
        self._tell(event)
        return True

    def _run(self) -> None:
        while not self._stopping:
            try:
                busy = self.step_once()
            except Exception as error:  # a task boundary: a defect here must not silence the executor
                log.exception("the step loop failed")
                busy = True
                self._failed(None, f"the step loop failed: {type(error).__name__}: {error}")
            if not busy:
                self._sleep()
            elif self._failures > 1:
                time.sleep(FAILURE_PAUSE_SECONDS)
        self._wind_down()

    def _sleep(self) -> None:
        deadline = self._core.next_deadline()
        timeout = self._config.idle_tick_seconds
        if deadline is not None:
            timeout = min(timeout, max(0.0, deadline - self._clock()))
        with self._mail:
            if not self._commands and not self._nudged:
                self._mail.wait(timeout)
            self._nudged = False

    def _failed(self, plan: Plan | None, message: str) -> None:
        """Ends the tasks of a failed step, or all of them where the bookkeeping itself failed."""
        self._failures += 1
        metrics.EXECUTOR_FAILURES.inc()
        with self._state:
            self._last_turn = now = self._clock()
            if plan is not None:
                self._core.fail(plan, message, now)
            else:
                self._core.fail_all(message, now)
            event = self._collect()
        self._tell(event)

    def _wind_down(self) -> None:
        with self._state:
            self._run_commands()
            self._core.fail_all("the engine is stopping", self._clock())
            event = self._collect()
            self._finished = True
        self._tell(event)

    # -- the mailbox -----------------------------------------------------------------------------

    def _command(self, command: Callable[[], None]) -> None:
        with self._mail:
            self._post(command)

    def _post(self, command: Callable[[], None]) -> None:
        """Under the mail lock. Bounded: one per task, abort target, pull and offer."""
        self._commands.append(command)
        self._mail.notify()

    def _run_commands(self) -> bool:
        ran = False
        while True:
            with self._mail:
                if not self._commands:
                    return ran
                command = self._commands.popleft()
            command()
            ran = True

    def _abort(self, key: Key, reason: str) -> None:
        with self._mail:
            self._aborting.discard(key)
        self._core.abort(key, reason, self._clock())

    def _abort_owner(self, owner: str) -> None:
        with self._mail:
            self._aborting.discard(owner)
        self._core.abort_owner(owner, self._clock())

    def _rejected(self, error: TaskError) -> TaskRejected:
        metrics.ERRORS.labels(error.code.value).inc()
        return TaskRejected(error)

    # -- events and load -------------------------------------------------------------------------

    def _collect(self) -> StepEvent | None:
        """What this part of a turn changed, and the load after it. Under the state lock."""
        deltas = self._core.take_deltas()
        ended = [(delta.task_id, delta.attempt) for delta in deltas if delta.finish is not None]
        with self._mail:
            self._keys.difference_update(ended)
        self._load = self._measure()
        now = self._clock()
        if now - self._last_audit >= AUDIT_SECONDS:
            self._last_audit = now
            result = self._core.audit(now)
            metrics.LEAKED_BLOCKS.set(result.leaked_blocks)
            metrics.STUCK_TASKS.set(result.stuck_tasks)
        kv_events = self._core.take_kv_events()
        return StepEvent(deltas, kv_events) if deltas or kv_events else None

    def _tell(self, event: StepEvent | None) -> None:
        if event is None:
            return
        try:
            self._on_event(event)
        except Exception:  # a task boundary: the shell's callback must not stop the engine
            log.exception("the step event's receiver failed; %d deltas are lost", len(event.deltas))

    def _measure(self) -> LoadReport:
        core, cache = self._core, self._cache
        running, waiting = core.scheduler.running, core.scheduler.waiting
        report = LoadReport(
            step=self._steps,
            waiting=len(waiting),
            running=len(running),
            queued_prefill_tokens=sum(s.remaining for s in waiting if not s.pulls)
            + sum(s.remaining for s in running if s.state is not State.PULLING and s.remaining > 1),
            kv_blocks_total=cache.num_blocks,
            kv_blocks_free=cache.free_blocks,
            kv_blocks_cached=cache.idle_blocks,
            prefill_tokens_per_second=core.prefill_rate,
            decode_step_seconds=core.decode_seconds,
            transfers_out=len(core.ledger.offers) + core.prefixes.lends,
            transfers_in=len(core.ledger.pulls),
        )
        metrics.RUNNING.set(report.running)
        metrics.WAITING.set(report.waiting)
        metrics.KV_BLOCKS.labels("held").set(cache.held_blocks)
        metrics.KV_BLOCKS.labels("cached").set(cache.idle_blocks)
        metrics.KV_BLOCKS.labels("free").set(cache.free_blocks - cache.idle_blocks)
        metrics.HOST_BYTES.set(cache.host_bytes)
        metrics.TRANSFERS.labels("out").set(report.transfers_out)
        metrics.TRANSFERS.labels("in").set(report.transfers_in)
        return report
