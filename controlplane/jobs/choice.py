"""One choice of a request: placed, streamed, handed over, replayed, ended.

A small machine driven by the executors' events, by the pump's placements and by the clock; it never
waits. Attempts are numbered over all submits (a decode is the attempt after its prefill), so that a late
delta of an earlier attempt is known by its number. A *fault* (executor lost, retryable error, stall) costs
one of a bounded number of replays; a *refusal* (queue full, draining, other model) costs nothing but a
pause, because nothing was started.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Protocol

from deepflow.v1 import common_pb2
from deepflow.v1.common_pb2 import TaskError
from deepflow.v1.worker_pb2 import TaskDelta

from controlplane.jobs import metrics, wire
from controlplane.jobs.attempt import Ahead, Attempt, Offer
from controlplane.jobs.progress import Gap, Progress
from controlplane.jobs.records import TaskRecord
from controlplane.jobs.serving import ServingError, dropped
from controlplane.jobs.settings import RuntimeSettings
from controlplane.jobs.states import TaskEvent, TaskState, next_task_state
from controlplane.scheduling.admission import DropReason
from controlplane.scheduling.lengths import Asked, Predicted
from controlplane.scheduling.types import Decision, Mode, Reason

if TYPE_CHECKING:
    from controlplane.jobs.job import Job

log = logging.getLogger(__name__)

LEASE_SHARE = 0.5
"""Of a handover's lease that placement may use up; the rest is for the pull to begin (ours)."""
MAX_AHEAD_DELTAS = 256
"""Steps that a decode may be ahead of the news of its prefill's end: seconds of decoding, while both
streams are read by one loop (ours)."""

_EVENTS = {
    common_pb2.TASK_KIND_UNIFIED: TaskEvent.PLACE_UNIFIED,
    common_pb2.TASK_KIND_PREFILL: TaskEvent.PLACE_PREFILL,
    common_pb2.TASK_KIND_DECODE: TaskEvent.PLACE_DECODE,
}


class Host(Protocol):
    """What a choice asks of the job executor."""

    settings: RuntimeSettings

    def now(self) -> float: ...
    def wall(self) -> float: ...
    def backoff(self, times: int) -> float: ...
    def abort(self, te_id: str, task_id: str, attempt: int, reason: str) -> None: ...
    def wants_place(self, choice: Choice) -> None:
        """It is HELD or in HANDOVER now: place it, at once or from the queue."""
        ...

    def prefill_started(self, choice: Choice, opened: common_pb2.KVSource) -> None:
        """Its transfer is open: a decode executor may be chosen already."""
        ...

    def ended(self, choice: Choice) -> None: ...


class Choice:
    def __init__(self, host: Host, job: Job, index: int, *, leads: bool) -> None:
        self.job = job
        self.index = index
        self.task_id = f"{job.job_id}-{index}"
        self.state = TaskState.HELD if leads else TaskState.WAITING
        self.progress = Progress()
        self.attempts: list[Attempt] = []
        self.current: Attempt | None = None
        self.ahead: Ahead | None = None  # beside `current`, a prefill: its decode, placed early
        self.offer: Offer | None = None
        self.mode: Mode | None = None  # as it was first placed
        # Placement.
        self.excluded: set[str] = set()
        self.never: set[str] = set()
        self.force_unified = False
        self.not_before = 0.0
        self.unplaced_since = host.now()
        self.unplaced_reason = Reason.NO_EXECUTOR
        self.faults = 0
        self.refusals = 0
        self._avoid: str | None = None  # where an early decode failed
        self._pauses = 0  # since the last progress
        self._stalled = False
        self.asked: Asked | None = None  # what its answer's length was predicted from, and what was said
        self.predicted: Predicted | None = None
        # What the client gets.
        self.finish: str | None = None
        self.error: ServingError | None = None
        self.cached_tokens: int | None = None
        self.prompt_scored = False
        self.first_token_at: float | None = None  # Unix seconds
        self.last_token_at: float | None = None
        self.ended_at: float | None = None
        self._host = host
        self._last_event = host.now()
        self._seed = wire.mix_seed(job.request.sampling.seed, index)

    # -- placement (called by the pump) ----------------------------------------------------------------

    @property
    def seed(self) -> int:
        return self._seed

    @property
    def output(self) -> list[int]:
        return self.progress.output

    @property
    def next_attempt(self) -> int:
        return self.attempts[-1].number + 1 if self.attempts else 1

    def placed(
        self,
        kind: common_pb2.TaskKind.ValueType,
        te_id: str,
        incarnation: str,
        reason: str,
        decision: Decision | None = None,
    ) -> None:
        """An attempt was submitted."""
        host = self._host
        first = not self.attempts
        attempt = Attempt(self.next_attempt, kind, te_id, incarnation, reason, host.wall(), decision=decision)
        self._go(_EVENTS[kind])
        self.attempts.append(attempt)
        self.current = attempt
        self.progress.attempt = attempt.number
        self._last_event = host.now()
        self.force_unified = False
        metrics.PLACED.labels(wire.KINDS[kind], reason).inc()
        if first:
            self.mode = Mode.UNIFIED if kind == common_pb2.TASK_KIND_UNIFIED else Mode.DISAGGREGATED
            metrics.PLACEMENT_SECONDS.labels(str(self.mode)).observe(host.now() - self.job.created)
        self.job.task_placed()

    def placed_early(self, te_id: str, incarnation: str) -> None:
        """The decode of the running prefill was submitted: it copies KV while that computes."""
        attempt = Attempt(
            self.next_attempt, common_pb2.TASK_KIND_DECODE, te_id, incarnation, "early", self._host.wall()
        )
        self.attempts.append(attempt)
        self.ahead = Ahead(attempt)
        metrics.PLACED.labels("decode", "early").inc()
        self.job.changed()

    def release(self) -> None:
        """The leading sibling's prompt is cached now, or that sibling has ended."""
        now = self._host.now()
        if self.state is TaskState.WAITING and now < self.job.deadline:  # else the clock ends it too
            self._go(TaskEvent.RELEASE)
            self.unplaced_since = now
            self._host.wants_place(self)

    @property
    def preemptible(self) -> bool:
        """Its prompt waits or is computed on an executor, and no token has come of it yet."""
        current = self.current
        return (
            current is not None
            and current.kind != common_pb2.TASK_KIND_DECODE
            and self.state.on_executor
            and not self.output
        )

    def preempt(self) -> None:
        """A higher band needs the executor more: back to the queue. It has waited since its beginning."""
        attempt = self.current
        assert attempt is not None  # it is preemptible
        self._host.abort(attempt.te_id, self.task_id, attempt.number, "preempted")
        metrics.REPLAYS.labels("preempted").inc()
        self.unplaced_reason = Reason.BUSY
        self._again("preempted", pause=False, refused=True)

    def give_up_handover(self, why: str) -> None:
        """No decode executor in time: the rest runs unified, where the prompt is cached if possible."""
        self._drop_offer(why)
        metrics.HANDOVERS.labels("given_up").inc()
        self.force_unified = True
        self._again("decode_unplaced", pause=False)

    # -- events of executors ---------------------------------------------------------------------------

    def on_delta(self, te_id: str, delta: TaskDelta) -> None:
        attempt = self.current
        if self.ahead is not None and delta.attempt == self.ahead.attempt.number:
            self._on_ahead(self.ahead, te_id, delta)
            return
        if attempt is None or delta.attempt != attempt.number:
            metrics.STALE.labels("attempt").inc()
            return
        host = self._host
        self._last_event = host.now()
        attempt.heard = True
        try:
            fresh = self.progress.accept(delta.attempt, delta.start_index, list(delta.tokens))
        except Gap as gap:
            log.error("task %s on %s: %s", self.task_id, te_id, gap)
            host.abort(te_id, self.task_id, attempt.number, "gap")
            self._fault("gap", attempt)
            return
        assert fresh is not None  # the attempt is current
        if fresh.skip:
            metrics.STALE.labels("token").inc(fresh.skip)
        if delta.HasField("timings"):
            attempt.timings = delta.timings
        self._deliver(attempt, delta, fresh.skip, fresh.tokens)
        if delta.finish:
            self._finished(attempt, delta)
        elif delta.HasField("handover") and self.state is TaskState.PREFILLING and self.ahead is None:
            self._host.prefill_started(self, delta.handover.source)

    def on_lost(self, te_id: str, attempt: int, reason: str) -> None:
        if self.ahead is not None and self.ahead.attempt.number == attempt:
            self._drop_ahead("executor_lost", tell=False)
        if self.current is not None and self.current.number == attempt:
            log.info("task %s lost with executor %s: %s", self.task_id, te_id, reason)
            self._fault("executor_lost", self.current)

    # -- the clock and the client ------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Looks at the deadlines."""
        if self.state.terminal:
            return
        settings = self._host.settings
        if now >= self.job.deadline:
            late = ServingError(
                504, "deadline_exceeded", "The request was not completed within its deadline."
            )
            self.fail(late if self.attempts else dropped(late, DropReason.EVICTED_DEADLINE))
        elif self.state is TaskState.HELD:
            self._tick_held(now - self.unplaced_since)
        elif self.current is not None and self.state.on_executor:
            limit = settings.stall_seconds if self.current.heard else settings.first_token_seconds
            if now - self._last_event > limit:
                self._stall(self.current, limit)

    def stop(self) -> None:
        """The gateway found a stop string."""
        self._end(TaskEvent.COMPLETE, "stop", abort="stop string")

    def cancel(self, reason: str) -> None:
        self._end(TaskEvent.CANCEL, "cancelled", abort=reason or "cancelled")

    def fail(self, error: ServingError) -> None:
        self._end(TaskEvent.FAIL, "error", error=error, abort=error.code)

    # -- a decode placed early ---------------------------------------------------------------------------

    def _on_ahead(self, ahead: Ahead, te_id: str, delta: TaskDelta) -> None:
        """Before its prefill has handed over: what it computed already waits, its failure costs nothing."""
        if delta.finish == common_pb2.FINISH_REASON_ERROR and not ahead.held:
            reason = wire.refusal(delta.error) or wire.code_name(delta.error)
            log.info("task %s: the early decode on %s ended: %s", self.task_id, te_id, delta.error.message)
            if delta.error.code == common_pb2.ERROR_CODE_OUT_OF_KV:
                self.never.add(te_id)
            self._drop_ahead(reason, tell=False)
        elif len(ahead.held) >= MAX_AHEAD_DELTAS:
            self._drop_ahead("too far ahead", tell=True)
        else:
            ahead.held.append(delta)

    def _drop_ahead(self, reason: str, *, tell: bool) -> None:
        """The prefill's hand-over, if it comes, is placed as if there had been no early decode."""
        ahead, self.ahead = self.ahead, None
        if ahead is None:
            return
        attempt = ahead.attempt
        if tell:
            self._host.abort(attempt.te_id, self.task_id, attempt.number, reason)
        attempt.end(reason, self._host.wall())
        metrics.HANDOVERS.labels("early_lost").inc()
        self._avoid = attempt.te_id
        self.job.changed()

    def _promote(self, ahead: Ahead) -> None:
        """The prefill has handed over: its decode, which has the KV or almost, is what counts now."""
        self.ahead = None
        self._go(TaskEvent.PLACE_DECODE)
        self.current = ahead.attempt
        self.progress.attempt = ahead.attempt.number
        self._last_event = self._host.now()
        metrics.HANDOVERS.labels("early").inc()
        self.job.changed()
        for delta in ahead.held:
            self.on_delta(ahead.attempt.te_id, delta)

    # -- inside ------------------------------------------------------------------------------------------

    def _deliver(self, attempt: Attempt, delta: TaskDelta, skip: int, tokens: list[int]) -> None:
        cached: int | None = None
        if delta.HasField("cached_tokens"):
            attempt.cached_tokens = delta.cached_tokens
            if self.cached_tokens is None:
                cached = self.cached_tokens = min(delta.cached_tokens, len(self.job.request.prompt))
        scored = None
        if delta.prompt_logprobs and not self.prompt_scored:
            scored = wire.prompt_logprobs(delta.prompt_logprobs)
            self.prompt_scored = True
        if tokens:
            self._count(attempt, len(tokens))
        logprobs = None
        if tokens and delta.logprobs:
            logprobs = [wire.logprobs(entry) for entry in delta.logprobs[skip:]]
        if tokens or cached is not None or scored is not None:
            self.job.delivery.push(self.index, tokens, logprobs, cached, scored)
        if tokens:
            self.job.prompt_cached(self)

    def _count(self, attempt: Attempt, tokens: int) -> None:
        wall = self._host.wall()
        attempt.tokens += tokens
        self.last_token_at = wall
        self.excluded.clear()
        self.refusals = self._pauses = 0
        self._stalled = False
        if attempt.first_token_at is None:
            attempt.first_token_at = wall
        if self.first_token_at is None:
            self.first_token_at = wall
            metrics.TTFT_SECONDS.labels(str(self.mode)).observe(self._host.now() - self.job.created)
            self.job.changed()

    def _finished(self, attempt: Attempt, delta: TaskDelta) -> None:
        finish = delta.finish
        if finish == common_pb2.FINISH_REASON_STOP:
            self._end(TaskEvent.COMPLETE, "stop")
        elif finish == common_pb2.FINISH_REASON_LENGTH:
            self._end(TaskEvent.COMPLETE, "length")
        elif finish == common_pb2.FINISH_REASON_HANDOVER and self.state is TaskState.PREFILLING:
            self._hand_over(attempt, delta)
        elif finish == common_pb2.FINISH_REASON_ERROR:
            self._failed(attempt, delta.error)
        else:  # aborted, and not by us; or a reason that has no meaning here
            self._fault("aborted", attempt)

    def _hand_over(self, attempt: Attempt, delta: TaskDelta) -> None:
        handover = delta.handover
        have = len(self.job.request.prompt) + len(self.output) - 1
        if not self.output or handover.length != have:
            log.error(
                "task %s: %s offers %d tokens instead of %d",
                self.task_id, attempt.te_id, handover.length, have,
            )  # fmt: skip
            self._host.abort(attempt.te_id, self.task_id, attempt.number, "wrong length")
            self._fault("bad_handover", attempt)
            return
        now = self._host.now()
        wait = self._host.settings.handover_seconds
        if handover.lease_ms:
            wait = min(wait, handover.lease_ms / 1000 * LEASE_SHARE)
        self.offer = Offer(
            attempt.te_id, attempt.number, handover.source, handover.processor_state, now, now + wait
        )
        attempt.end("handover", self._host.wall())
        self.current = None
        self._go(TaskEvent.HAND_OVER)
        self.not_before = 0.0
        if self.ahead is not None:
            self._promote(self.ahead)
            return
        if self._avoid is not None:
            self.excluded.add(self._avoid)
        self.job.changed()
        self._host.wants_place(self)

    def _failed(self, attempt: Attempt, error: TaskError) -> None:
        decode = attempt.kind == common_pb2.TASK_KIND_DECODE
        refusal = wire.refusal(error)
        if refusal is not None:
            self._refused(attempt, refusal)
        elif error.code == common_pb2.ERROR_CODE_OUT_OF_KV:
            self.never.add(attempt.te_id)
            self._drop_offer("out of kv")
            self._again("out_of_kv", pause=False)
        elif error.code == common_pb2.ERROR_CODE_KV_TRANSFER_FAILED and decode and self.offer is not None:
            # The side that failed is most likely the sender: the receiver lives to tell.
            source = self.offer.te_id
            self._fault("kv_transfer_failed", attempt, exclude=source)
        elif error.retryable or error.code == common_pb2.ERROR_CODE_KV_TRANSFER_FAILED or decode:
            if error.code == common_pb2.ERROR_CODE_DEADLINE_EXCEEDED:
                self.fail(wire.final_error(error))
                return
            log.warning("task %s on %s: %s", self.task_id, attempt.te_id, error.message)
            self._fault(wire.code_name(error), attempt)
        else:
            self.fail(wire.final_error(error))

    def _refused(self, attempt: Attempt, reason: str) -> None:
        """Not started: elsewhere, or here later. Clears nothing of what bounds the waiting."""
        self.refusals += 1
        self.excluded.add(attempt.te_id)
        metrics.REPLAYS.labels(reason).inc()
        self.unplaced_reason = Reason.BUSY if reason == "queue_full" else Reason.NO_EXECUTOR
        now = self._host.now()
        if self.state is TaskState.DECODING and self.offer is not None and now < self.offer.until:
            attempt.end(reason, self._host.wall())
            self.current = None
            self._go(TaskEvent.DECODE_REFUSED)
            self.not_before = now + self._pause()
            self._host.wants_place(self)
            return
        self._drop_offer(reason)
        self._again(reason, pause=True, refused=True)

    def _fault(self, reason: str, attempt: Attempt, exclude: str | None = None) -> None:
        self.faults += 1
        self.excluded.add(exclude or attempt.te_id)
        metrics.REPLAYS.labels(reason).inc()
        self._drop_offer(reason)
        settings = self._host.settings
        if self.faults >= settings.max_attempts:
            attempt.end(reason, self._host.wall())
            self.current = None
            message = f"The request failed {self.faults} times, at last with {reason}."
            self.fail(ServingError(503, "replays_exhausted", message, retry_after=wire.RETRY_AFTER_SECONDS))
            return
        self._again(reason, pause=True)

    def _again(self, reason: str, *, pause: bool, refused: bool = False) -> None:
        """Back to the queue with everything delivered so far."""
        host, request = self._host, self.job.request
        self._drop_ahead(reason, tell=True)
        if self.current is not None:
            self.current.end(reason, host.wall())
            self.current = None
        self.progress.attempt = 0
        sampling = request.sampling
        if request.max_output_tokens and len(self.output) >= request.max_output_tokens:
            self._end(TaskEvent.COMPLETE, "length")  # only the end itself was lost
            return
        if (
            self.output
            and self.output[-1] in sampling.stop_token_ids
            and len(self.output) > sampling.min_tokens
        ):
            self._end(TaskEvent.COMPLETE, "stop")
            return
        self._go(TaskEvent.RETRY)
        now = host.now()
        if not refused:  # a refused task was never placed: its waiting goes on
            self.unplaced_since = now
        self.not_before = now + self._pause() if pause else 0.0
        self._tick_held(now - self.unplaced_since)  # refusals may follow each other without an end
        if not self.state.terminal:
            self.job.changed()
            host.wants_place(self)

    def _pause(self) -> float:
        self._pauses += 1
        return self._host.backoff(self._pauses)

    def _stall(self, attempt: Attempt, limit: float) -> None:
        log.warning("task %s on %s: nothing for %.0f s", self.task_id, attempt.te_id, limit)
        if self._stalled:
            message = f"The executors produced nothing for {limit:g} s, twice."
            self.fail(ServingError(504, "stalled", message, retry_after=wire.RETRY_AFTER_SECONDS))
            return
        self._host.abort(attempt.te_id, self.task_id, attempt.number, "stalled")
        self._fault("stall", attempt)
        self._stalled = True

    def _tick_held(self, waited: float) -> None:
        settings = self._host.settings
        if self.unplaced_reason is Reason.BUSY:
            if waited > settings.contended_seconds:
                self.fail(dropped(wire.queue_full(), DropReason.EVICTED_TIMEOUT))
        elif waited > settings.placement_seconds:
            message = f"No executor could serve this model within {settings.placement_seconds:g} s."
            error = ServingError(503, "no_executor", message, retry_after=wire.RETRY_AFTER_SECONDS)
            self.fail(dropped(error, DropReason.EVICTED_TIMEOUT))

    def _drop_offer(self, reason: str) -> None:
        """Lets the prefill side free what it kept for a decode that does not come."""
        if self.offer is not None:
            self._host.abort(self.offer.te_id, self.task_id, self.offer.attempt, reason)
            self.offer = None

    def _end(
        self, event: TaskEvent, finish: str, *, error: ServingError | None = None, abort: str | None = None
    ) -> None:
        """The one way out. `abort` tells every executor that may still work on it."""
        if self.state.terminal:
            return
        host = self._host
        self.ended_at = host.wall()
        self._drop_ahead(abort or finish, tell=True)
        if self.current is not None:
            if abort is not None:
                host.abort(self.current.te_id, self.task_id, self.current.number, abort)
            self.current.end(finish if abort is None else "aborted", self.ended_at)
            self.current = None
        if abort is not None:
            self._drop_offer(abort)
        self._go(event)
        self.finish, self.error = finish, error
        self.progress.attempt = 0
        metrics.TASKS.labels(error.code if error is not None else finish).inc()
        if error is not None and error.drop_reason is not None:
            metrics.DROPPED.labels(error.drop_reason).inc()
        if self.first_token_at is not None and self.last_token_at is not None and len(self.output) > 1:
            took = self.last_token_at - self.first_token_at
            metrics.TPOT_SECONDS.labels(str(self.mode)).observe(took / (len(self.output) - 1))
        self.job.delivery.close(self.index, finish, error)
        host.ended(self)
        self.job.task_ended(self)

    def _go(self, event: TaskEvent) -> None:
        self.state = next_task_state(self.state, event)

    def record(self) -> TaskRecord:
        def last(kind: common_pb2.TaskKind.ValueType) -> str | None:
            return next((a.te_id for a in reversed(self.attempts) if a.kind == kind), None)

        return TaskRecord(
            task_id=self.task_id,
            index=self.index,
            state=self.state,
            te_id=self.attempts[-1].te_id if self.attempts else None,
            prefill_te=last(common_pb2.TASK_KIND_PREFILL),
            decode_te=last(common_pb2.TASK_KIND_DECODE),
            output_tokens=len(self.output),
            cached_tokens=self.cached_tokens,
            replays=self.faults,
            finish=self.finish,
            error=str(self.error) if self.error is not None else None,
            first_token_at=self.first_token_at,
            last_token_at=self.last_token_at,
            ended_at=self.ended_at,
            attempts=tuple(attempt.record() for attempt in self.attempts),
        )
