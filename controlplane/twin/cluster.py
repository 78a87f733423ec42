"""The discrete-event loop: requests arrive, a policy places them, simulated executors run them.

One heap of events, one per executor at most, beside the sorted arrivals. The cluster plays the job
executor: it asks the policy for a place, holds what nobody can take, moves a finished prefill's KV over
simulated links and places its decode late, as `controlplane.jobs` does. It keeps figures per request and a
timeline, and knows nothing of policies beyond `Placing`.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from controlplane.scheduling.admission import DropReason, FairQueue, Waiting
from controlplane.scheduling.types import Role
from controlplane.twin.costs import CostProfile
from controlplane.twin.executor import SimExecutor
from controlplane.twin.task import DECODE, PREFILL, UNIFIED, Task
from controlplane.twin.workload import Workload

HOLD_SECONDS = 30.0
"""How long a request that every executor is too full for waits (RuntimeSettings.contended_seconds)."""
HANDOVER_SECONDS = 10.0
"""How long a finished prefill waits for a decode executor (RuntimeSettings.handover_seconds)."""
MAX_HELD = 100_000
"""Requests that wait at once (ours)."""
MAX_HELD_BYTES = 1 << 40  # the twin's requests have no bytes
TICK_SECONDS = 1.0
"""Turn of the role controller and of the timeline (the issue's: it reads the view each second)."""

UNFINISHED = "unfinished"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a request starts: whole, or its prefill."""

    te: int
    disaggregated: bool = False


class Placing(Protocol):
    """A policy as the cluster sees it. Executors go by number."""

    name: str

    def attach(self, cluster: Cluster) -> None: ...
    def place(self, request: int, now: float) -> Place | None:
        """None: nobody can take it now."""
        ...

    def place_decode(self, request: int, source: int, now: float) -> int | None:
        """Where a finished prefill goes on; None: nobody can take it now."""
        ...

    def reported(self, te: SimExecutor, now: float) -> None: ...
    def cached(self, te: int, stored: Sequence[int], removed: Sequence[int]) -> None: ...
    def submitted(self, te: int, task: Task, now: float) -> None: ...
    def ended(self, te: int, task: Task, now: float) -> None: ...
    def tick(self, now: float) -> Sequence[tuple[int, Role]]:
        """Role changes that take effect now."""
        ...


@dataclass(slots=True)
class Timeline:
    """One row a tick, over all executors."""

    seconds: list[float] = field(default_factory=list)
    roles: list[tuple[int, int, int]] = field(default_factory=list)  # colocated, prefill, decode
    busy: list[float] = field(default_factory=list)  # share of time in steps since the tick before
    kv: list[float] = field(default_factory=list)  # share of blocks held
    held: list[int] = field(default_factory=list)  # requests without a place


class Cluster:
    """One simulation. `run` once."""

    def __init__(
        self,
        workload: Workload,
        roles: Sequence[Role],
        profile: CostProfile | Sequence[CostProfile],
        policy: Placing,
        *,
        horizon: float = float("inf"),
        tick_seconds: float = TICK_SECONDS,
        max_wait: float = HOLD_SECONDS,
    ) -> None:
        """`roles`: one executor each. `horizon`: simulated seconds after which nothing more is looked at.
        `max_wait`: seconds that a request may wait for an executor with room."""
        profiles = [profile] * len(roles) if isinstance(profile, CostProfile) else list(profile)
        if len(profiles) != len(roles) or not roles:
            raise ValueError(f"{len(profiles)} profiles for {len(roles)} executors")
        self.workload = workload
        self.policy = policy
        self.profile = profiles[0]
        self.now = 0.0
        caches = bool(len(workload.units))
        curves = {key: each.table() for key, each in {id(each): each for each in profiles}.items()}
        self.tes = [
            SimExecutor(number, role, each, self, workload.unit_tokens, table=curves[id(each)], caches=caches)
            for number, (role, each) in enumerate(zip(roles, profiles, strict=True))
        ]
        self.inflight = [0] * len(roles)  # tasks submitted and not ended, per executor
        self.pending_tokens = [0] * len(roles)  # uncached prompt tokens submitted and not begun to decode
        count = len(workload)
        self.first_at = np.full(count, np.nan)
        self.ended_at = np.full(count, np.nan)
        self.cached_tokens = np.zeros(count, dtype=np.int64)
        self.split = np.zeros(count, dtype=bool)
        self.placed_on = np.full(count, -1, dtype=np.int32)
        self.reasons: dict[int, str] = {}  # request -> why it was dropped
        self.timeline = Timeline()
        self.flips = 0
        self.given_up = 0  # hand-overs that found no decode executor in time
        self.transferred_tokens = 0
        self.decisions = 0
        self._tick_seconds = tick_seconds
        self._horizon = horizon
        self._events: list[tuple[float, int, SimExecutor | None, int, Callable[[float], None] | None]] = []
        self._sequence = 0
        self._queue = FairQueue(MAX_HELD, MAX_HELD_BYTES)
        self._since: dict[int, float] = {}  # request that waits -> since when
        self._max_wait = max_wait
        self._tenant: list[int] = workload.tenant.tolist()
        self._waiting_decode: deque[tuple[float, SimExecutor, Task]] = deque()  # since when
        self._left = count
        self._busy_before = 0.0
        self._prompt: list[int] = workload.prompt.tolist()
        self._output: list[int] = workload.output.tolist()
        self._priority: list[int] = workload.priority.tolist()
        self._first: list[int] = workload.first.tolist()
        self._units: list[int] = workload.units.tolist()
        policy.attach(self)

    # -- what policies read ------------------------------------------------------------------------------

    def prompt(self, request: int) -> int:
        return self._prompt[request]

    def output(self, request: int) -> int:
        return self._output[request]

    def tenant(self, request: int) -> str:
        return str(self._tenant[request])

    def priority(self, request: int) -> int:
        return self._priority[request]

    def units(self, request: int) -> list[int]:
        """Ids of its leading prefix blocks."""
        return self._units[self._first[request] : self._first[request + 1]]

    # -- the loop ----------------------------------------------------------------------------------------

    def run(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Until every request has ended, or the horizon. `progress(done, of)` is called now and then."""
        arrivals = self.workload.arrival.tolist()
        count, at = len(arrivals), 0
        events = self._events
        profile_delay = self.profile.request_seconds
        self._at(self._tick_seconds, None, 0, self._tick)
        told = 0
        while self._left > 0:
            if at < count and (not events or arrivals[at] + profile_delay <= events[0][0]):
                self.now = arrivals[at] + profile_delay
                if self.now > self._horizon:
                    break
                self._arrive(at, self.now)
                at += 1
                continue
            if not events:
                break
            time, _, te, version, call = heapq.heappop(events)
            if time > self._horizon:
                break
            if te is not None:
                if te.version != version:
                    continue
                self.now = time
                te.fire(time)
            elif call is not None:
                self.now = time
                call(time)
            if progress is not None and count - self._left >= told + 1000:
                told = count - self._left
                progress(told, count)
            if self._waiting_decode or self._since:
                self._retry()
        for request in range(count):
            if self.ended_at[request] != self.ended_at[request] and request not in self.reasons:
                self.reasons[request] = UNFINISHED
        if progress is not None:
            progress(count, count)

    def _at(
        self, time: float, te: SimExecutor | None, version: int, call: Callable[[float], None] | None
    ) -> None:
        self._sequence += 1
        heapq.heappush(self._events, (time, self._sequence, te, version, call))

    def _tick(self, now: float) -> None:
        tes = self.tes
        busy = sum([te.busy_seconds for te in tes])
        counts = [0, 0, 0]
        used = total = 0
        for te in tes:
            counts[_ROLE_INDEX[te.role]] += 1
            used += te.total_blocks - te.free_blocks
            total += te.total_blocks
        line = self.timeline
        line.seconds.append(now)
        line.roles.append((counts[0], counts[1], counts[2]))
        line.busy.append((busy - self._busy_before) / (len(tes) * self._tick_seconds))
        line.kv.append(used / total)
        line.held.append(len(self._since) + len(self._waiting_decode))
        self._busy_before = busy
        self._expire(now)
        for number, role in self.policy.tick(now):
            if tes[number].role is not role:
                self.flips += 1
                tes[number].set_role(role, now)
                self.policy.reported(tes[number], now)
        self._at(now + self._tick_seconds, None, 0, self._tick)

    # -- requests ----------------------------------------------------------------------------------------

    def _arrive(self, request: int, now: float) -> None:
        if not any(te.fits(self._prompt[request] + 1) for te in self.tes[:1]):
            self._drop(request, DropReason.REJECTED_TOO_LARGE)
            return
        item = Waiting(
            str(request), str(self._tenant[request]), self._priority[request], self._prompt[request], 0,
            number=request,
        )  # fmt: skip
        if (self._since and self._queue.before(item)) or not self._place(request, now):
            pushed = self._queue.push(item)
            if pushed.refused is not None:
                self._drop(request, pushed.refused)
            else:
                self._since[request] = now
            for gone, why in pushed.evicted:
                del self._since[int(gone.key)]
                self._drop(int(gone.key), why)

    def _place(self, request: int, now: float) -> bool:
        self.decisions += 1
        place = self.policy.place(request, now)
        if place is None:
            return False
        prompt, output = self._prompt[request], self._output[request]
        split = place.disaggregated and output > 1
        kind = PREFILL if split else UNIFIED
        task = Task(request, kind, prompt, output, self._priority[request], self.units(request))
        self.split[request] = split
        uncached = prompt - self.tes[place.te].matched(task.units) if task.units else prompt
        self._queue.charge(str(self._tenant[request]), self._priority[request], max(uncached, 1))
        self._submit(place.te, task, now)
        return True

    def _submit(self, number: int, task: Task, now: float) -> None:
        self.inflight[number] += 1
        self.placed_on[task.request] = number
        self.policy.submitted(number, task, now)
        self.tes[number].submit(task, now)

    def _retry(self) -> None:
        """Tries what waits, in the order of the job executor's queue, until one finds no place."""
        now = self.now
        while self._waiting_decode:
            _, te, task = self._waiting_decode[0]
            if not self._place_decode(te, task, now):
                break
            self._waiting_decode.popleft()
        while (head := self._queue.head()) is not None:
            request = int(head.key)
            if now - self._since[request] > self._max_wait:
                self._drop(request, DropReason.EVICTED_TIMEOUT)
            elif not self._place(request, now):
                break
            self._queue.remove(head.key)
            del self._since[request]

    def _expire(self, now: float) -> None:
        """Rejects what nobody had room for in all its time; hand-overs without a taker go on unified."""
        waiting = self._waiting_decode
        while (
            waiting and now - waiting[0][0] > HANDOVER_SECONDS and self._go_on_unified(*waiting[0][1:], now)
        ):
            waiting.popleft()
        for request in [r for r, since in self._since.items() if now - since > self._max_wait]:
            self._queue.remove(str(request))
            del self._since[request]
            self._drop(request, DropReason.EVICTED_TIMEOUT)

    def _drop(self, request: int, reason: str) -> None:
        self.reasons[request] = reason
        self._left -= 1

    # -- what executors tell -----------------------------------------------------------------------------

    def at(self, te: SimExecutor, time: float) -> None:
        te.version += 1
        self._at(time, te, te.version, None)

    def first_token(self, te: SimExecutor, task: Task, now: float) -> None:
        self.first_at[task.request] = now
        self.cached_tokens[task.request] = task.cached

    def ended(self, te: SimExecutor, task: Task, now: float) -> None:
        self.ended_at[task.request] = now
        self.inflight[te.number] -= 1
        self._left -= 1
        self.policy.ended(te.number, task, now)

    def handover(self, te: SimExecutor, task: Task, now: float) -> None:
        self.inflight[te.number] -= 1
        self.policy.ended(te.number, task, now)
        if self._waiting_decode or not self._place_decode(te, task, now):
            self._waiting_decode.append((now, te, task))

    def _place_decode(self, source: SimExecutor, prefill: Task, now: float) -> bool:
        self.decisions += 1
        number = self.policy.place_decode(prefill.request, source.number, now)
        if number is None:
            return False
        task = Task(prefill.request, DECODE, prefill.prompt, prefill.output, prefill.priority, prefill.units)
        task.source = (source, prefill)
        self._submit(number, task, now)
        return True

    def _go_on_unified(self, source: SimExecutor, prefill: Task, now: float) -> bool:
        """Its prefill gives its blocks up; the sequence is computed again wherever it runs now."""
        place = self.policy.place(prefill.request, now)
        if place is None:
            return False
        source.release(prefill, now)
        task = Task(prefill.request, UNIFIED, prefill.prompt, prefill.output, prefill.priority, prefill.units)
        task.length = prefill.length
        self.given_up += 1
        self._submit(place.te, task, now)
        return True

    def pull(self, te: SimExecutor, task: Task, skip: int, now: float) -> None:
        """Moves its KV; each link carries one transfer after the other."""
        if task.source is None:
            raise AssertionError("a decode task has a source")
        source, prefill = task.source
        tokens = task.length - 1 - skip
        self.transferred_tokens += tokens
        profile = te.profile
        seconds = tokens * profile.kv_bytes_per_token / profile.transfer_bytes_per_second
        start = max(now, source.link_free, te.link_free)
        source.link_free = te.link_free = start + seconds

        def arrived(at: float) -> None:
            source.release(prefill, at)
            te.pulled(task, at)

        self._at(start + seconds + profile.transfer_seconds, None, 0, arrived)

    def reported(self, te: SimExecutor, now: float) -> None:
        self.policy.reported(te, now)

    def cached(self, te: SimExecutor, stored: Sequence[int], removed: Sequence[int]) -> None:
        self.policy.cached(te.number, stored, removed)


_ROLE_INDEX = {Role.COLOCATED: 0, Role.PREFILL: 1, Role.DECODE: 2}
