"""The serving job executor: admits requests, keeps what waits in order, drives placements and deadlines.

Called by the gateway through `controlplane.jobs.serving`. Work is done where it arises: a submit places at
once if it can, an executor's event runs its choice's state machine, and two loops remain: the pump, which
places what had to wait when the fleet changes, and the clock, which looks at deadlines. DeepServe's job
executor for serving jobs; the policy is `controlplane.scheduling`.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable

from deepflow.v1.common_pb2 import KVSource

from controlplane.fleet.view import FleetView
from controlplane.jobs import metrics, wire
from controlplane.jobs.choice import Choice
from controlplane.jobs.job import Job
from controlplane.jobs.placement import Placer
from controlplane.jobs.serving import ServingError, ServingRequest, dropped
from controlplane.jobs.settings import RuntimeSettings
from controlplane.jobs.states import TaskState
from controlplane.jobs.waiting import WaitingRoom
from controlplane.scheduling.admission import DropReason
from controlplane.scheduling.types import Reason

PUMP_PAUSE_SECONDS = 0.002
"""Between two passes over what waits: many load reports make one pass (ours)."""

MAX_N = 1024
"""Numbers kept for the choices of one job: above any `n` that the API takes."""

log = logging.getLogger(__name__)


class JobExecutor:
    """`controlplane.jobs.serving.ServingExecutor` and the choices' `Host`. `run` until cancelled."""

    def __init__(
        self,
        fleet: FleetView,
        settings: RuntimeSettings,
        *,
        on_changed: Callable[[Job], None] = lambda job: None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        rng: random.Random | None = None,
    ) -> None:
        self.settings = settings
        self._fleet = fleet
        self._on_changed = on_changed
        self._clock = clock
        self._wall = wall
        self._rng = rng or random.Random()
        self._placer = Placer(fleet, settings.scheduling, clock, self._rng)
        self._jobs: dict[str, Job] = {}
        self._live: dict[str, Choice] = {}
        self._room = WaitingRoom(settings.max_held, settings.max_held_bytes, settings.tenant_weights)
        self._numbers: dict[str, int] = {}
        self._number = 0
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        fleet.on_change = self._fleet_changed

    # -- ServingExecutor ---------------------------------------------------------------------------------

    def submit(self, request: ServingRequest) -> Job:
        """Raises ServingError: 429 queue_full, 503 shutting_down, 400 what no executor could ever hold."""
        if self._draining:
            raise self._refuse(
                503, "shutting_down", "The server is shutting down.", DropReason.REJECTED_SHUTDOWN
            )
        over = len(self._live) + request.n - self.settings.max_choices
        if over > 0 and self._room.below(request) < over:
            raise self._refuse(
                429, "queue_full", "Too many requests are running. Try again shortly.",
                DropReason.REJECTED_IN_FLIGHT,
            )  # fmt: skip
        self._number += MAX_N
        job_id = f"job_{int(self._wall() * 1000):011x}{secrets.token_hex(8)}"
        job = Job(self, job_id, request, block_tokens=self._fleet.block_tokens(request.model_revision))
        self._numbers[job_id] = self._number
        first = job.choices[0]
        reason = Reason.BUSY if self._behind(first) else self._place(first)
        if reason is Reason.TOO_LARGE:
            del self._numbers[job_id]
            metrics.REFUSED.labels("too_large").inc()
            metrics.DROPPED.labels(DropReason.REJECTED_TOO_LARGE).inc()
            raise dropped(wire.too_large(), DropReason.REJECTED_TOO_LARGE)
        evicted: list[tuple[Choice, DropReason]] = []
        if reason is not None:
            refused, evicted = self._room.let_in(first, self._placer.cost(first), self._number)
            if refused is not None:
                del self._numbers[job_id]
                raise self._refuse(
                    429, "queue_full", "Too many requests are waiting. Try again shortly.", refused
                )
            first.unplaced_reason = reason
            self._wake.set()
        ousted = self._room.drop_lowest(request.model_revision, over - len(evicted))
        evicted += [(victim, DropReason.EVICTED_FOR_PRIORITY) for victim in ousted]
        self._jobs[job_id] = job
        self._live.update((choice.task_id, choice) for choice in job.choices)
        metrics.IN_FLIGHT.inc(len(job.choices))
        self._idle.clear()
        for victim, why in evicted:
            victim.fail(dropped(wire.queue_full(), why))
        if reason is Reason.BUSY:
            self._make_way(first)
        for choice in job.choices[1:]:
            if choice.state is TaskState.HELD:
                self._hold(choice)
        self.changed(job)
        return job

    def can_serve(self, model_revision: str) -> bool:
        return self._fleet.can_serve(model_revision)

    @property
    def accepting(self) -> bool:
        return not self._draining and len(self._live) < self.settings.max_choices and not self._room.full

    # -- Host --------------------------------------------------------------------------------------------

    def now(self) -> float:
        return self._clock()

    def wall(self) -> float:
        return self._wall()

    def backoff(self, times: int) -> float:
        """Seconds before try `times` + 1: doubling, and half of it jitter."""
        settings = self.settings
        pause = min(settings.retry_max_seconds, settings.retry_base_seconds * 2.0 ** min(times - 1, 16))
        return pause * (0.5 + self._rng.random() / 2)

    def abort(self, te_id: str, task_id: str, attempt: int, reason: str) -> None:
        self._fleet.abort(te_id, task_id, attempt, reason)

    def wants_place(self, choice: Choice) -> None:
        if choice.not_before <= self._clock() and not self._behind(choice):
            reason = self._place(choice)
            if reason is None:
                return
            if reason is Reason.TOO_LARGE and choice.state is TaskState.HELD:
                choice.fail(dropped(wire.too_large(), DropReason.REJECTED_TOO_LARGE))
                return
            choice.unplaced_reason = reason
        self._hold(choice)

    def prefill_started(self, choice: Choice, opened: KVSource) -> None:
        waiting = len(self._room.handovers(choice.job.request.model_revision))
        outcome = self._placer.place_early(choice, opened, handovers_waiting=waiting)
        metrics.EARLY.labels(outcome).inc()

    def ended(self, choice: Choice) -> None:
        self._room.leave(choice)
        if choice.finish in ("stop", "length"):
            self._placer.learn(choice)
        if self._live.pop(choice.task_id, None) is not None:
            metrics.IN_FLIGHT.dec()
        if all(item.state.terminal for item in choice.job.choices):
            self._jobs.pop(choice.job.job_id, None)
            self._numbers.pop(choice.job.job_id, None)
        if not self._live:
            self._idle.set()
        if len(self._room):
            self._wake.set()

    def changed(self, job: Job) -> None:
        self._on_changed(job)

    # -- life --------------------------------------------------------------------------------------------

    @property
    def live_jobs(self) -> Iterable[Job]:
        return self._jobs.values()

    async def run(self) -> None:
        """Pump and clock, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._guard(self._pump), name="jobs-pump")
            group.create_task(self._guard(self._watch), name="jobs-clock")

    async def drain(self, seconds: float) -> None:
        """No new requests; waits for the running ones, then cancels them."""
        self._draining = True
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            log.warning("%d choices are cancelled by the shutdown", len(self._live))
            for job in list(self._jobs.values()):
                job.cancel("shutdown")

    # -- inside ------------------------------------------------------------------------------------------

    def _refuse(self, status: int, code: str, message: str, why: DropReason) -> ServingError:
        metrics.REFUSED.labels(code).inc()
        metrics.DROPPED.labels(why).inc()
        return dropped(ServingError(status, code, message, retry_after=wire.RETRY_AFTER_SECONDS), why)

    def _fleet_changed(self) -> None:
        if len(self._room):
            self._wake.set()

    def _behind(self, choice: Choice) -> bool:
        """Something before it waits for the same executors. A decode, whose KV is held, goes first."""
        return choice.state is TaskState.HELD and self._room.behind(choice, self._numbers[choice.job.job_id])

    def _hold(self, choice: Choice) -> None:
        self._room.put_back(choice, self._placer.cost(choice), self._numbers[choice.job.job_id])
        self._wake.set()

    def _place(self, choice: Choice) -> Reason | None:
        """Submits it, and charges its tenant for what that costs. None: done; else why not."""
        decoding = choice.state is TaskState.HANDOVER
        reason = self._placer.place(choice)
        if reason is None and not decoding:
            self._room.charge(choice, self._placer.cost(choice))
        return reason

    def _make_way(self, choice: Choice) -> None:
        """Every executor is full: one choice of a lower band that has no token yet goes back to the queue."""
        request = choice.job.request
        lower = [
            other
            for other in self._live.values()
            if other.job.request.priority < request.priority
            and other.job.request.model_revision == request.model_revision
            and other.preemptible
        ]
        if lower:
            # Of the lowest band the one that came last: it has waited least.
            victim = min(
                lower, key=lambda c: (c.job.request.priority, -self._numbers[c.job.job_id], -c.index)
            )
            victim.preempt()

    def place_waiting(self) -> float | None:
        """One pass in order; per revision it stops at the first that must wait for an executor, so that a
        large task is not overtaken for ever. Returns seconds until a pause ends, None if none runs.

        A task that the executors there can never run waits for others to come, and stops nobody."""
        now = self._clock()
        due: float | None = None
        for choice in self._room.handovers():
            if choice.not_before > now:
                due = min(due or choice.not_before, choice.not_before)
            elif (reason := self._place(choice)) is None:
                self._room.leave(choice)
            else:
                self._wait_for_decode(choice, reason, now)
        for revision in self._room.revisions:
            passed: set[str] = set()
            while (waiting := self._room.next(revision, passed)) is not None:
                if waiting.not_before > now:
                    due = min(due or waiting.not_before, waiting.not_before)
                    passed.add(waiting.task_id)
                    continue
                reason = self._place(waiting)
                if reason is None:
                    self._room.leave(waiting)
                elif reason is Reason.TOO_LARGE:
                    waiting.fail(dropped(wire.too_large(), DropReason.REJECTED_TOO_LARGE))
                else:
                    waiting.unplaced_reason = reason
                    if reason is Reason.BUSY or not waiting.never:
                        break
                    passed.add(waiting.task_id)
        return None if due is None else max(0.0, due - now)

    def _wait_for_decode(self, choice: Choice, reason: Reason, now: float) -> None:
        assert choice.offer is not None
        if reason is Reason.BUSY and now < choice.offer.until:
            return
        self._room.leave(choice)
        choice.give_up_handover(f"no decode executor: {reason}")

    async def _pump(self) -> None:
        while True:
            self._wake.clear()
            pause = self.place_waiting()
            try:
                async with asyncio.timeout(pause):
                    await self._wake.wait()
            except TimeoutError:
                pass
            await asyncio.sleep(PUMP_PAUSE_SECONDS)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self.settings.tick_seconds)
            now = self._clock()
            for choice in list(self._live.values()):
                choice.tick(now)
            late = now - self.settings.stuck_grace_seconds
            metrics.STUCK.set(sum(choice.job.deadline < late for choice in self._live.values()))
            if len(self._room):
                self._wake.set()

    async def _guard(self, loop: Callable[[], Awaitable[None]]) -> None:
        """A task boundary: a fault is reported and the loop goes on."""
        while True:
            try:
                await loop()
            except Exception:
                log.exception("a loop of the job executor failed and starts over")
                await asyncio.sleep(self.settings.tick_seconds)
