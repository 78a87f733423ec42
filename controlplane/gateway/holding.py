"""Holds requests while their model wakes: bounded by count, bytes and age, in order, told how it goes.

A request for a model that no executor serves, but that somebody starts on demand, enters here between
planning and its jobs; for a model that is up, `enter` is a dictionary look-up. What is held is told to
whoever scales through `controlplane.fleet.demand`, once a model and interval however many requests wait. The
first executor that serves releases all, higher priorities first; where the job executor's queue is full by
then, the rest waits on here. A replica holds its own: its bounds count for one process.

A held request ends in one of four ways, counted by `deepflow_gateway_holds_total`: its jobs are submitted,
its time is over (503), the executor refused it, or its client left.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from controlplane.api.errors import ApiError
from controlplane.fleet.demand import DemandWriter
from controlplane.gateway import metrics
from controlplane.gateway.catalogue import Catalogue, CatalogueEntry, HoldLimits, ServedModel
from controlplane.gateway.context import RequestContext
from controlplane.gateway.run import Run
from controlplane.gateway.settings import GatewaySettings
from controlplane.gateway.wake import Stage, Wake, WakeTimes, seconds_left
from controlplane.jobs.serving import ServingExecutor
from controlplane.scheduling.admission import DropReason

Tell = Callable[[Wake], Awaitable[None]]

RETRY_SECONDS = 0.1
"""Between tries to submit into a full queue: places turn over with every answer that ends (ours)."""
RETRY_AFTER_SECONDS = 5.0
"""Told where nothing is known of how long a start takes (ours: a warm start of a small model)."""
RETRY_AFTER_MAX_SECONDS = 60.0

# Bounds: label in the metric, what is told, reason of the refusal.
_REQUESTS = ("hold_requests", "as many requests as may", DropReason.REJECTED_QUEUE_FULL)
_BYTES = ("hold_bytes", "as many bytes as may", DropReason.REJECTED_QUEUE_BYTES)


@dataclass(slots=True, eq=False)
class _Sleeping:
    """A model that requests are held for."""

    entry: CatalogueEntry
    since: float
    held: dict[int, Held] = field(default_factory=dict)  # by arrival
    bytes: int = 0


class Held:
    """One held request; `submit` it once."""

    __slots__ = ("_holding", "_number", "_sleeping", "_until", "priority", "since", "size", "up")

    def __init__(
        self, holding: Holding, sleeping: _Sleeping, number: int, *, size: int, priority: int, seconds: float
    ) -> None:
        self.size = size
        self.priority = priority
        self.since = holding.clock()
        self.up: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._holding = holding
        self._sleeping = sleeping
        self._number = number
        self._until = self.since + seconds

    @property
    def overdue(self) -> bool:
        return self._holding.clock() >= self._until

    async def submit(self, run: Run, tell: Tell | None) -> None:
        """Waits for the model, then submits the run's jobs. `tell` is called now and then on the way. Raises
        ApiError 503 wake_timeout when its time is over, and what `Run.submit` raises."""
        outcome = "left"
        try:
            await self._wait(tell)
            executor = self._holding.executor
            while True:
                # Refused now for want of a place, it would have waited for nothing.
                if executor.accepting or self.overdue:
                    try:
                        run.submit(executor)
                        break
                    except ApiError as error:
                        if error.code != "queue_full" or run.context.job_id or self.overdue:
                            outcome = "refused"
                            raise
                await asyncio.sleep(RETRY_SECONDS)
            outcome = "served"
        except ApiError as error:
            if error.code == "wake_timeout":
                outcome = "expired"
            raise
        finally:
            waited = self._holding.clock() - self.since
            run.context.held_seconds += waited
            run.context.stage("hold")
            if outcome == "served":
                metrics.HOLD_SECONDS.observe(waited)
                held = b"%.3f" % run.context.held_seconds
                run.context.response_headers.append((b"x-deepflow-held-seconds", held))
            metrics.HOLDS.labels(outcome).inc()
            self._holding.leave(self._sleeping, self._number)

    async def _wait(self, tell: Tell | None) -> None:
        settings = self._holding.settings
        pause = settings.peek_seconds  # an early refusal keeps its own status
        while not self.up.done():
            await asyncio.wait({self.up}, timeout=None if tell is None else pause)
            if tell is not None and not self.up.done():
                await tell(self._holding.wake(self._sleeping, self.since))
                pause = settings.hold_comment_seconds
        self.up.result()


class Holding:
    """One process's held requests. `run` looks after them until cancelled."""

    def __init__(
        self,
        executor: ServingExecutor,
        demand: DemandWriter,
        settings: GatewaySettings,
        *,
        stage: Callable[[CatalogueEntry], Stage],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.executor = executor
        self.settings = settings
        self.clock = clock
        self._demand = demand
        self._stage = stage
        self._times = WakeTimes()
        self._sleeping: dict[str, _Sleeping] = {}  # by revision
        self._held: Counter[str] = Counter()  # by the model's name in demand
        self._bytes = 0
        self._number = 0
        self._some = asyncio.Event()

    def enter(self, model: ServedModel, *, size: int, priority: int) -> Held | None:
        """Notes the demand. None: submit at once. `size`: bytes of the body. Raises ApiError 429."""
        entry = model.entry
        self._demand.began(entry.demand_key)  # until the run settles
        if not entry.wakes or self.executor.can_serve(entry.revision):
            return None
        sleeping = self._sleeping.get(entry.revision)
        limits = entry.hold or self._limits()
        held, used = (len(sleeping.held), sleeping.bytes) if sleeping is not None else (0, 0)
        if held >= limits.requests:
            raise _full(entry.id, _REQUESTS, self._retry_after(sleeping))
        if used + size > limits.bytes or self._bytes + size > self.settings.hold_total_bytes:
            raise _full(entry.id, _BYTES, self._retry_after(sleeping))
        if sleeping is None:
            sleeping = self._sleeping[entry.revision] = _Sleeping(entry, self.clock())
        self._number += 1
        ticket = Held(self, sleeping, self._number, size=size, priority=priority, seconds=limits.seconds)
        sleeping.held[self._number] = ticket
        self._count(sleeping, 1, size)
        self._some.set()
        return ticket

    async def introduce(self, catalogue: Catalogue, name: str, context: RequestContext) -> ServedModel:
        """For a name whose model was never started, as when its ModelServing is new: nobody has its tokenizer
        yet, and being asked for is what brings it. Held within the bounds of the settings, without comments,
        for there is no answer to comment on. Raises ApiError as `Catalogue.resolve`, 429 hold_full."""
        pending = catalogue.pending(name)
        if pending is None:
            return catalogue.resolve(name)
        settings, key, size = self.settings, pending.demand, context.body_bytes
        if self._held[key] >= settings.hold_requests:
            raise _full(pending.id, _REQUESTS, RETRY_AFTER_SECONDS)
        if self._bytes + size > settings.hold_total_bytes:
            raise _full(pending.id, _BYTES, RETRY_AFTER_SECONDS)
        context.stage("read")
        since = self.clock()
        self._add(key, 1, size)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(settings.hold_seconds):
                    while catalogue.find(name) is None and catalogue.pending(name):
                        await catalogue.changed()
        finally:
            self._add(key, -1, -size)
            context.held_seconds += self.clock() - since
            context.stage("hold")
        return catalogue.resolve(name)

    def leave(self, sleeping: _Sleeping, number: int) -> None:
        """Its request is no longer held. Idempotent."""
        ticket = sleeping.held.pop(number, None)
        if ticket is None:
            return
        if ticket.up.done():
            ticket.up.exception()  # its client may have left in the turn in which its time was over
        self._count(sleeping, -1, -ticket.size)
        if not sleeping.held and self._sleeping.get(sleeping.entry.revision) is sleeping:
            del self._sleeping[sleeping.entry.revision]

    def wake(self, sleeping: _Sleeping, since: float) -> Wake:
        """How it goes, for a request that waits since then."""
        now, entry = self.clock(), sleeping.entry
        stage = self._stage(entry)
        typical = self._times.typical(entry.demand_key) or stage.typical
        left = seconds_left(now - sleeping.since, typical=typical, progress=stage.progress)
        return Wake(entry.id, stage, now - since, left)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            if not self._sleeping:
                self._some.clear()
                await self._some.wait()
            self.look()
            await asyncio.sleep(self.settings.hold_poll_seconds)

    def look(self) -> None:
        """Releases what can be served now and ends what has waited too long."""
        for revision, sleeping in list(self._sleeping.items()):
            if self.executor.can_serve(revision):
                self._release(sleeping)
                continue
            for ticket in list(sleeping.held.values()):
                if not ticket.overdue:
                    break  # those after it came later
                if not ticket.up.done():
                    ticket.up.set_exception(self._expired(sleeping, ticket))

    def _release(self, sleeping: _Sleeping) -> None:
        # Taken out of the table: requests for the model's next sleep are counted anew.
        del self._sleeping[sleeping.entry.revision]
        took = self.clock() - sleeping.since
        self._times.observed(sleeping.entry.demand_key, took)
        metrics.WAKE_SECONDS.labels(sleeping.entry.id).observe(took)
        for ticket in sorted(sleeping.held.values(), key=lambda held: -held.priority):
            if not ticket.up.done():
                ticket.up.set_result(None)  # their tasks run in this order

    def _count(self, sleeping: _Sleeping, requests: int, size: int) -> None:
        sleeping.bytes += size
        self._add(sleeping.entry.demand_key, requests, size)

    def _add(self, key: str, requests: int, size: int) -> None:
        self._bytes += size
        self._held[key] += requests
        metrics.HELD.inc(requests)
        metrics.HELD_BYTES.inc(size)
        self._demand.record_held(key, self._held[key])
        if not self._held[key]:
            del self._held[key]

    def _limits(self) -> HoldLimits:
        settings = self.settings
        return HoldLimits(
            requests=settings.hold_requests, bytes=settings.hold_bytes, seconds=settings.hold_seconds
        )

    def _retry_after(self, sleeping: _Sleeping | None) -> float:
        left = self.wake(sleeping, 0.0).left if sleeping is not None else None
        return min(RETRY_AFTER_SECONDS if left is None else left, RETRY_AFTER_MAX_SECONDS)

    def _expired(self, sleeping: _Sleeping, ticket: Held) -> ApiError:
        waited = self.clock() - ticket.since
        detail = self._stage(sleeping.entry)
        why = f" ({detail.name}{': ' + detail.detail if detail.detail else ''})"
        return ApiError(
            503,
            f"The model `{sleeping.entry.id}` did not start within {waited:.0f} s{why}.",
            code="wake_timeout",
            retry_after=self._retry_after(sleeping),
            drop_reason=DropReason.EVICTED_TIMEOUT,
        )


def _full(name: str, bound: tuple[str, str, DropReason], retry_after: float) -> ApiError:
    label, what, reason = bound
    metrics.LIMITED.labels(label).inc()
    message = f"The model `{name}` is starting, and {what} wait for it already."
    return ApiError(429, message, code="hold_full", retry_after=retry_after, drop_reason=reason)
