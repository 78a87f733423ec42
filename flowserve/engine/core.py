"""The engine without its thread: what one step does, as plain calls in a fixed order.

    prepare   ends expired tasks, polls populations, schedules, opens transfers  -> Plan
    slices    Plan -> the executor's batch
    finish    tokens, blocks that became reusable, announcements, ends           -> deltas

`flowserve.engine.engine` calls them from its loop, apart from the execution between them, so that a
later loop can prepare step N+1 while N runs (DeepServe section 4.2). Nothing here blocks or waits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from flowserve.engine import metrics
from flowserve.engine.admission import context_limit
from flowserve.engine.budget import CostModel, StepShape
from flowserve.engine.config import EngineConfig
from flowserve.engine.prefixes import Prefixes
from flowserve.engine.scheduler import Plan, Scheduler, Work
from flowserve.engine.sequence import Sequence, SequenceProcessor, State
from flowserve.engine.transfers import HandoverFailed, TransferLedger, continue_after
from flowserve.engine.types import (
    EngineTask,
    ErrorCode,
    FinishReason,
    Handover,
    KVEvents,
    KVHandover,
    PrefixExchange,
    TaskDelta,
    TaskError,
    TaskKind,
    TaskTimings,
)
from flowserve.executor.interface import ModelInfo, SampleSpec, SequenceSlice, SliceResult
from flowserve.rtc import RTC, PopulateState

log = logging.getLogger(__name__)

RATE_FADE = 0.8
"""EWMA of the rates in the load report: about 5 steps (ours)."""

Key = tuple[str, int]


@dataclass(frozen=True, slots=True)
class AuditResult:
    """Product metrics: both are zero unless there is a defect."""

    leaked_blocks: int
    stuck_tasks: int


class EngineCore:
    """Tasks, their blocks and their transfers. One thread at a time."""

    def __init__(
        self,
        info: ModelInfo,
        cache: RTC,
        config: EngineConfig,
        handover: KVHandover | None,
        wake: Callable[[], None],
        *,
        make_processor: Callable[[EngineTask], SequenceProcessor | None] = lambda task: None,
        exchange: PrefixExchange | None = None,
    ) -> None:
        """`wake` may be called from any thread when something that the core waits for is there.

        `make_processor` restores the processor of an early decode from what its prefill sent.
        """
        self.info = info
        self.cache = cache
        self.config = config
        self.costs = CostModel()
        self.scheduler = Scheduler(cache, config, self.costs)
        self.ledger = TransferLedger(handover, cache.block_tokens, self._stage)
        self.prefixes = Prefixes(cache, self.costs, config, exchange, wake)
        self.sequences: dict[Key, Sequence] = {}
        self.prefill_rate = 0.0  # tokens per second, EWMA
        self.decode_seconds = 0.0  # per step, EWMA
        self._limit = context_limit(info, cache.num_blocks * cache.block_tokens)
        self._wake = wake
        self._make_processor = make_processor
        self._deltas: list[TaskDelta] = []

    # -- commands --------------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        self.sequences[sequence.key] = sequence
        self.scheduler.add(sequence)

    def abort(self, key: Key, reason: str, now: float) -> None:
        """Ends a task; for one that handed over already, ends its offer."""
        sequence = self.sequences.get(key)
        if sequence is not None:
            self.end(sequence, FinishReason.ABORTED, now, reason=reason)
            return
        for offer in self.ledger.offers.values():
            if offer.sequence.key == key:
                self.ledger.withdraw(offer, reason)

    def abort_owner(self, owner: str, now: float) -> None:
        reason = "the owner's stream was lost"
        for sequence in [s for s in self.sequences.values() if s.task.owner == owner]:
            self.end(sequence, FinishReason.ABORTED, now, reason=reason)
        for offer in self.ledger.offers.values():
            if offer.sequence.task.owner == owner:
                self.ledger.withdraw(offer, reason)

    def pull_done(self, key: Key, error: TaskError | None, now: float, payload: bytes = b"") -> None:
        pull = self.ledger.pull_done(key)
        if pull is None:
            log.warning("pull of %s ended twice", key)
            return
        if pull.quarantined is not None:
            self.cache.free(pull.quarantined)
            return
        sequence = pull.sequence
        sequence.last_progress = now
        sequence.transfer_seconds = now - pull.since
        sequence.state = State.RUNNING  # nothing writes its blocks any more
        if error is None and sequence.task.early:
            error = continue_after(sequence, payload, self.info.vocab_size, self._make_processor)
        if error is not None:
            self.end(sequence, FinishReason.ERROR, now, error=error)
            return
        sequence.computed = sequence.pull_length
        self._commit(sequence)
        if not sequence.wants_tokens:
            self.end(sequence, FinishReason.LENGTH, now)

    def release_transfer(self, transfer_id: str, outcome: str) -> None:
        """The offer's one terminal event. Its blocks are free, or stay as reusable prefix."""
        if self.prefixes.release(transfer_id):
            return
        offer = self.ledger.release(transfer_id)
        if offer is None:
            log.warning("transfer %s was released twice (%s)", transfer_id, outcome)
            return
        self.cache.free(offer.staged)
        if offer.blocks is not None:
            self.cache.free(offer.blocks)
        # else its prefill runs on; `announce` or `complete` will fail it with KV_TRANSFER_FAILED

    # -- one step --------------------------------------------------------------------------------

    def prepare(self, now: float) -> Plan:
        for sequence in list(self.sequences.values()):
            deadline = sequence.task.deadline
            if deadline is not None and deadline <= now:
                error = TaskError(ErrorCode.DEADLINE_EXCEEDED, "the task's deadline has passed")
                self.end(sequence, FinishReason.ERROR, now, error=error)
        self.cache.collect()
        self._poll_populations(now)
        plan = self.scheduler.schedule(now)
        metrics.PREEMPTIONS.inc(len(plan.preempted))
        for sequence in plan.admitted:
            metrics.PROMPT_TOKENS.inc(len(sequence.prompt))
            metrics.PREFIX_HIT_TOKENS.inc(min(sequence.computed, len(sequence.prompt)))
            self._open_transfer(sequence, now)
        for sequence, match in plan.populates:
            if sequence.state is State.POPULATING:
                sequence.ticket = self.cache.populate(match, sequence.blocks, self._wake)
        for sequence in plan.admitted:
            if sequence.state is State.RUNNING:
                self.prefixes.fetch(sequence)
        plan.work = [work for work in plan.work if work.sequence.state is State.RUNNING]
        return plan

    def slices(self, plan: Plan) -> list[SequenceSlice]:
        return [self._slice(work) for work in plan.work]

    def finish(self, plan: Plan, results: Seq[SliceResult], seconds: float, now: float) -> None:
        """Takes a step's results in. `seconds` is what the executor took."""
        self._observe(plan, seconds)
        for work, result in zip(plan.work, results, strict=True):
            sequence = work.sequence
            sequence.last_progress = now
            sequence.computed = work.start + work.count
            self._commit(sequence)
            if sequence.logprobs_pending() and work.start < len(sequence.prompt):
                sequence.prompt_logprobs = sequence.prompt_logprobs or [None]
                sequence.prompt_logprobs.extend(result.prompt_logprobs or ())
            try:
                if sequence.transfer_id is not None:
                    self.ledger.announce(sequence, final=work.sample)
                if work.sample:
                    self._sampled(sequence, result, now)
                elif sequence.remaining == 0:
                    self.end(sequence, FinishReason.LENGTH, now)
            except HandoverFailed as failure:
                self.end(sequence, FinishReason.ERROR, now, error=failure.error)

    def fail(self, plan: Plan, message: str, now: float) -> None:
        """The step raised: its tasks end, and may be tried elsewhere. All others go on."""
        error = TaskError(ErrorCode.INTERNAL, message, retryable=True)
        for work in plan.work:
            if work.sequence.state is not State.ENDED:
                self.end(work.sequence, FinishReason.ERROR, now, error=error)

    def fail_all(self, message: str, now: float) -> None:
        error = TaskError(ErrorCode.INTERNAL, message, retryable=True)
        for sequence in list(self.sequences.values()):
            self.end(sequence, FinishReason.ERROR, now, error=error)
        for offer in self.ledger.offers.values():
            self.ledger.withdraw(offer, message)
        self.prefixes.withdraw_all(message)

    def end(
        self,
        sequence: Sequence,
        finish: FinishReason,
        now: float,
        *,
        error: TaskError | None = None,
        handover: Handover | None = None,
        delta: TaskDelta | None = None,
        reason: str = "",
    ) -> None:
        """The one way out: a task's last delta, and its blocks to where they belong."""
        self.scheduler.remove(sequence)
        del self.sequences[sequence.key]
        if sequence.state is State.PULLING and sequence.key in self.ledger.pulls:
            self.ledger.cancel_pull(sequence)
        if sequence.ticket is not None:
            self.cache.abandon_populate(sequence.ticket)
            self.prefixes.forget(sequence.ticket)
        withdraw = None if handover else (error.message if error else reason or f"ended: {finish.value}")
        if not self.ledger.leave(sequence, withdraw):
            self.cache.free(sequence.blocks)
            sequence.blocks = []
        sequence.state = State.ENDED
        delta = delta or self._delta(sequence)
        delta.finish, delta.error, delta.handover = finish, error, handover
        started = sequence.first_scheduled
        delta.timings = TaskTimings(
            queued_seconds=(started if started is not None else now) - sequence.arrival,
            transfer_seconds=sequence.transfer_seconds,
            compute_seconds=now - started if started is not None else 0.0,
            preemptions=sequence.preemptions,
        )
        metrics.FINISHED.labels(finish.value).inc()
        if error is not None:
            metrics.ERRORS.labels(error.code.value).inc()

    def take_deltas(self) -> list[TaskDelta]:
        deltas, self._deltas = self._deltas, []
        return deltas

    def take_kv_events(self) -> KVEvents | None:
        changes = self.cache.take_changes()
        return KVEvents(changes.sequence, changes.stored, changes.removed) if changes else None

    # -- reports ---------------------------------------------------------------------------------

    def audit(self, now: float) -> AuditResult:
        report = self.cache.audit(self._expected_refs())
        if report.leaked or report.missing:
            log.error("block audit: leaked %s, missing %s", report.leaked[:20], report.missing[:20])
        limit = now - self.config.stuck_seconds
        idle = not self.scheduler.running  # then nothing that waits has a reason to, but for transfers
        stuck = sum(
            1
            for sequence in self.sequences.values()
            if sequence.last_progress < limit and (sequence.state is not State.WAITING or idle)
        )
        stuck += sum(1 for p in self.ledger.pulls.values() if p.quarantined is not None and p.since < limit)
        stuck += sum(
            1
            for offer in self.ledger.offers.values()
            if offer.blocks is not None and offer.sequence.last_progress + offer.lease_seconds < limit
        )
        return AuditResult(len(report.leaked) + len(report.missing), stuck)

    def next_deadline(self) -> float | None:
        return min(
            (s.task.deadline for s in self.sequences.values() if s.task.deadline is not None), default=None
        )

    # -- inside ----------------------------------------------------------------------------------

    def _stage(self, blocks: Seq[int]) -> tuple[list[int], list[int]]:
        """The blocks a peer should read, and those of them that are copies made for it."""
        seconds = self.config.compact_call_seconds
        return self.cache.stage(blocks, seconds) if seconds > 0 else (list(blocks), [])

    def _expected_refs(self) -> Iterator[int]:
        for sequence in self.sequences.values():
            yield from sequence.blocks
        yield from self.ledger.held_blocks()
        yield from self.prefixes.held_blocks()

    def _poll_populations(self, now: float) -> None:
        for sequence in list(self.scheduler.running):
            if sequence.state is not State.POPULATING or sequence.ticket is None:
                continue
            state = self.cache.query_populate(sequence.ticket)
            if state is PopulateState.PENDING:
                continue
            ticket, sequence.ticket = sequence.ticket, None
            sequence.last_progress = now
            if self.prefixes.fetches(ticket):
                blocks = self.prefixes.take_in(sequence, ticket)
                metrics.PREFIX_HIT_TOKENS.inc(blocks * self.cache.block_tokens)
                sequence.state = State.RUNNING
            elif state is PopulateState.DONE:
                sequence.state = State.RUNNING
                self.prefixes.fetch(sequence)
            else:
                log.warning("populating %s failed; what is missing is computed", sequence.key)
                if not sequence.reported:
                    sequence.cached_tokens = None  # told by what is found at its next admission
                self.scheduler.preempt(sequence)

    def _open_transfer(self, sequence: Sequence, now: float) -> None:
        try:
            if sequence.state is State.PULLING:
                self.ledger.start_pull(sequence, sequence.committed, now)
            elif sequence.transfer_id is None and self._will_hand_over(sequence):
                opened = self.ledger.offer(sequence, now)
                if sequence.task.tell_start:
                    task = sequence.task
                    started = TaskDelta(task.task_id, task.attempt, task.owner, len(sequence.output))
                    started.handover = Handover(opened.transfer_id, 0, opened.lease_seconds)
                    self._deltas.append(started)
        except HandoverFailed as failure:
            self.end(sequence, FinishReason.ERROR, now, error=failure.error)

    def _will_hand_over(self, sequence: Sequence) -> bool:
        """A prefill, unless its one token is the last anyway."""
        if sequence.kind is not TaskKind.PREFILL:
            return False
        one_more = len(sequence.output) + 1 < sequence.task.max_output_tokens
        return one_more and len(sequence.tokens) + 1 < self._limit

    def _slice(self, work: Work) -> SequenceSlice:
        sequence = work.sequence
        task = sequence.task
        stop = work.start + work.count
        spec = None
        if work.sample:
            ends = task.sampling.stop_token_ids
            spec = SampleSpec(
                params=task.sampling,
                prompt=sequence.prompt,
                output=sequence.output,
                index=sequence.next_index,
                eos_token_ids=ends if task.sampling.ignore_eos else self.info.eos_token_ids + ends,
                processor=sequence.processor,
            )
        scored = sequence.logprobs_pending() and work.start < len(sequence.prompt)
        return SequenceSlice(
            tokens=sequence.tokens[work.start : stop],
            start=work.start,
            block_table=tuple(sequence.blocks),
            sample=spec,
            prompt_logprobs=task.sampling.prompt_logprobs if scored else None,
            next_token=sequence.prompt[stop] if scored and stop < len(sequence.prompt) else None,
            adapter_id=task.adapter_id,
        )

    def _commit(self, sequence: Sequence) -> None:
        """Full computed blocks can be reused from now on, by others and after a preemption."""
        if not self.config.enable_prefix_cache:
            return
        full = sequence.computed // self.cache.block_tokens
        if full > sequence.committed:
            self.scheduler.identify(sequence)
            for index in range(sequence.committed, full):
                self.cache.commit(sequence.blocks[index], sequence.identities[index])
            sequence.committed = full

    def _sampled(self, sequence: Sequence, result: SliceResult, now: float) -> None:
        """One more token. Raises HandoverFailed."""
        if result.token is None:
            self._end_internal(sequence, result.error or "the executor returned no token", now)
            return
        delta = self._delta(sequence)
        delta.tokens.append(result.token)
        if result.logprobs is not None:
            delta.logprobs = [result.logprobs]
        sequence.output.append(result.token)
        sequence.tokens.append(result.token)
        metrics.OUTPUT_TOKENS.inc()
        if sequence.processor is not None:
            try:
                sequence.processor.advance(result.token)
            except Exception as error:  # a task boundary: one task's processor
                log.exception("logit processor of %s failed", sequence.key)
                self._end_internal(sequence, f"logit processor failed: {error}", now)
                return
        finish = self._finish_of(sequence, result.token)
        if finish is not None:
            self.end(sequence, finish, now, delta=delta)
        elif sequence.kind is TaskKind.PREFILL:
            handover = self.ledger.complete(sequence)
            self.end(sequence, FinishReason.HANDOVER, now, handover=handover, delta=delta)

    def _finish_of(self, sequence: Sequence, token: int) -> FinishReason | None:
        params = sequence.task.sampling
        ends = token in params.stop_token_ids or (not params.ignore_eos and token in self.info.eos_token_ids)
        if ends and len(sequence.output) > params.min_tokens:
            return FinishReason.STOP
        if len(sequence.output) >= sequence.task.max_output_tokens or len(sequence.tokens) >= self._limit:
            return FinishReason.LENGTH
        return None

    def _end_internal(self, sequence: Sequence, message: str, now: float) -> None:
        error = TaskError(ErrorCode.INTERNAL, message, retryable=True)
        self.end(sequence, FinishReason.ERROR, now, error=error)

    def _delta(self, sequence: Sequence) -> TaskDelta:
        """A delta at the sequence's present output, to be handed out with this step."""
        task = sequence.task
        delta = TaskDelta(task.task_id, task.attempt, task.owner, start_index=len(sequence.output))
        self._deltas.append(delta)
        if not sequence.reported and sequence.cached_tokens is not None:
            sequence.reported = True
            delta.cached_tokens = sequence.cached_tokens
            if sequence.wants_prompt_logprobs and len(sequence.prompt_logprobs) == len(sequence.prompt):
                delta.prompt_logprobs, sequence.prompt_logprobs = sequence.prompt_logprobs, []
        return delta

    def _observe(self, plan: Plan, seconds: float) -> None:
        self.costs.observe(StepShape.of((work.start, work.count) for work in plan.work), seconds)
        prefill = sum(work.count for work in plan.work if work.count > 1)
        if prefill * 2 > plan.tokens and seconds > 0:
            self.prefill_rate = _faded(self.prefill_rate, prefill / seconds)
        if prefill < plan.tokens:
            self.decode_seconds = _faded(self.decode_seconds, seconds)
        metrics.STEPS.inc()
        metrics.STEP_SECONDS.observe(seconds)
        metrics.BATCH_TOKENS.observe(plan.tokens)


def _faded(old: float, new: float) -> float:
    return new if old == 0.0 else RATE_FADE * old + (1 - RATE_FADE) * new
