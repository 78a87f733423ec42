"""The serving job executor: admits requests, keeps what waits in order, drives placements and deadlines.

Called by the gateway through `controlplane.jobs.serving`. Work is done where it arises: a submit places at
once if it can, an executor's event runs its choice's state machine, and two loops remain: the pump, which
places what had to wait when the fleet changes, and the clock, which looks at deadlines. DeepServe's job
executor for serving jobs; the policy is `controlplane.scheduling`.
"""

from __future__ import annotations

import asyncio
import bisect
import logging
import random
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable

from deepflow.v1.common_pb2 import KVSource

from controlplane.fleet.view import FleetView
from controlplane.jobs import metrics, wire
from controlplane.jobs.choice import RETRY_AFTER_SECONDS, Choice
from controlplane.jobs.job import Job
from controlplane.jobs.placement import Placer
from controlplane.jobs.serving import ServingError, ServingRequest
from controlplane.jobs.settings import RuntimeSettings
from controlplane.jobs.states import TaskState
from controlplane.scheduling.types import Reason

PUMP_PAUSE_SECONDS = 0.002
"""Between two passes over what waits: many load reports make one pass (ours)."""

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
        self._waiting: dict[str, list[tuple[int, int, int]]] = {}  # per revision, in order
        self._by_key: dict[tuple[int, int, int], Choice] = {}
        self._keys: dict[str, tuple[int, int, int]] = {}
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
            raise self._refuse(503, "shutting_down", "The server is shutting down.")
        if len(self._live) + request.n > self.settings.max_choices:
            raise self._refuse(429, "queue_full", "Too many requests are running. Try again shortly.")
        revision = request.model_revision
        queued = bool(self._waiting.get(revision))
        if queued and len(self._keys) >= self.settings.max_held:
            raise self._refuse(429, "queue_full", "Too many requests are waiting. Try again shortly.")
        self._number += 1
        job_id = f"job_{int(self._wall() * 1000):011x}{secrets.token_hex(8)}"
        job = Job(self, job_id, request, block_tokens=self._fleet.block_tokens(revision))
        self._numbers[job_id] = self._number
        first = job.choices[0]
        reason = Reason.BUSY if queued else self._placer.place(first)
        if reason is Reason.TOO_LARGE:
            del self._numbers[job_id]
            metrics.REFUSED.labels("too_large").inc()
            raise wire.too_large()
        if reason is not None and len(self._keys) >= self.settings.max_held:
            del self._numbers[job_id]
            raise self._refuse(429, "queue_full", "Too many requests are waiting. Try again shortly.")
        self._jobs[job_id] = job
        self._live.update((choice.task_id, choice) for choice in job.choices)
        metrics.IN_FLIGHT.inc(len(job.choices))
        self._idle.clear()
        if reason is not None:
            first.unplaced_reason = reason
            self._hold(first)
        for choice in job.choices[1:]:
            if choice.state is TaskState.HELD:
                self._hold(choice)
        self.changed(job)
        return job

    def can_serve(self, model_revision: str) -> bool:
        return self._fleet.can_serve(model_revision)

    @property
    def accepting(self) -> bool:
        return (
            not self._draining
            and len(self._live) < self.settings.max_choices
            and len(self._keys) < self.settings.max_held
        )

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
            reason = self._placer.place(choice)
            if reason is None:
                return
            if reason is Reason.TOO_LARGE and choice.state is TaskState.HELD:
                choice.fail(wire.too_large())
                return
            choice.unplaced_reason = reason
        self._hold(choice)

    def prefill_started(self, choice: Choice, opened: KVSource) -> None:
        waiting = self._waiting.get(choice.job.request.model_revision, ())
        handovers = sum(self._by_key[key].state is TaskState.HANDOVER for key in waiting)
        outcome = self._placer.place_early(choice, opened, handovers_waiting=handovers)
        metrics.EARLY.labels(outcome).inc()

    def ended(self, choice: Choice) -> None:
        self._unhold(choice)
        if self._live.pop(choice.task_id, None) is not None:
            metrics.IN_FLIGHT.dec()
        if all(item.state.terminal for item in choice.job.choices):
            self._jobs.pop(choice.job.job_id, None)
            self._numbers.pop(choice.job.job_id, None)
        if not self._live:
            self._idle.set()
        if self._keys:
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

    def _refuse(self, status: int, code: str, message: str) -> ServingError:
        metrics.REFUSED.labels(code).inc()
        return ServingError(status, code, message, retry_after=RETRY_AFTER_SECONDS)

    def _fleet_changed(self) -> None:
        if self._keys:
            self._wake.set()

    def _key(self, choice: Choice) -> tuple[int, int, int]:
        return (-choice.job.request.priority, self._numbers[choice.job.job_id], choice.index)

    def _behind(self, choice: Choice) -> bool:
        """Something before it waits for the same executors. A decode, whose KV is held, goes first."""
        waiting = self._waiting.get(choice.job.request.model_revision)
        return bool(waiting and choice.state is TaskState.HELD and waiting[0] < self._key(choice))

    def _hold(self, choice: Choice) -> None:
        if choice.task_id in self._keys:
            return
        key = self._key(choice)
        self._keys[choice.task_id] = key
        self._by_key[key] = choice
        bisect.insort(self._waiting.setdefault(choice.job.request.model_revision, []), key)
        metrics.HELD.inc()
        self._wake.set()

    def _unhold(self, choice: Choice) -> None:
        key = self._keys.pop(choice.task_id, None)
        if key is None:
            return
        del self._by_key[key]
        revision = choice.job.request.model_revision
        waiting = self._waiting[revision]
        waiting.pop(bisect.bisect_left(waiting, key))
        if not waiting:
            del self._waiting[revision]
        metrics.HELD.dec()

    def place_waiting(self) -> float | None:
        """One pass in order; per revision it stops at the first that must wait for an executor, so that a
        large task is not overtaken for ever. Returns seconds until a pause ends, None if none runs.

        A task that the executors there can never run waits for others to come, and stops nobody."""
        now = self._clock()
        due: float | None = None
        for revision in list(self._waiting):
            blocked = False
            for key in list(self._waiting.get(revision, ())):
                choice = self._by_key.get(key)
                if choice is None:
                    continue
                handover = choice.state is TaskState.HANDOVER
                if choice.not_before > now:
                    due = min(due or choice.not_before, choice.not_before)
                    continue
                if blocked and not handover:
                    continue
                reason = self._placer.place(choice)
                if reason is None:
                    self._unhold(choice)
                elif handover:
                    self._wait_for_decode(choice, reason, now)
                elif reason is Reason.TOO_LARGE:
                    choice.fail(wire.too_large())
                else:
                    choice.unplaced_reason = reason
                    blocked = reason is Reason.BUSY or not choice.never
        return None if due is None else max(0.0, due - now)

    def _wait_for_decode(self, choice: Choice, reason: Reason, now: float) -> None:
        assert choice.offer is not None
        if reason is Reason.BUSY and now < choice.offer.until:
            return
        self._unhold(choice)
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
            if self._keys:
                self._wake.set()

    async def _guard(self, loop: Callable[[], Awaitable[None]]) -> None:
        """A task boundary: a fault is reported and the loop goes on."""
        while True:
            try:
                await loop()
            except Exception:
                log.exception("a loop of the job executor failed and starts over")
                await asyncio.sleep(self.settings.tick_seconds)
