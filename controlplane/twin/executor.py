"""A simulated task executor: the engine's scheduling pass over counted blocks, in simulated time.

Mirrors `flowserve.engine.scheduler` step by step: running decodes move by one token, prefills under way get
chunks within the step's token and time budget, then admission in order of priority and arrival reserves
every block of a task; a decode that finds no block takes those of the last in order. KV is counted in
blocks; prompt prefixes are kept by id and evicted least recently used first, as `flowserve.rtc` does.
`tests/unit/controlplane/twin` runs the real engine over the same costs and compares.

What makes it fast: as long as nothing but decoding happens, the next change is known (a task's end, a lack of
blocks, the next load report), and all steps until then are one event. An arrival cuts such a run at the
next step boundary, as the engine would take the task in there.
"""

from __future__ import annotations

import heapq
import math
from bisect import insort
from collections.abc import Sequence
from typing import Protocol

from controlplane.scheduling.types import Role
from controlplane.twin.costs import CostProfile
from controlplane.twin.pool import Pool
from controlplane.twin.task import DECODE, PREFILL, Budget, Order, Task

ROLE_BONUS_SECONDS = 1.0  # EngineConfig.role_bonus_seconds
ADMISSION_RESERVE = 0.02  # EngineConfig.admission_reserve
PREFIX_WAIT_SECONDS = 5.0  # EngineConfig.prefix_wait_seconds
RATE_FADE = 0.8  # flowserve.engine.core
REPORT_SECONDS = 1.0
"""Longest time between two load reports of a busy executor (the house plan's bound)."""


class Host(Protocol):
    """What an executor tells the cluster. Times are seconds."""

    def first_token(self, te: SimExecutor, task: Task, now: float) -> None: ...
    def ended(self, te: SimExecutor, task: Task, now: float) -> None: ...
    def handover(self, te: SimExecutor, task: Task, now: float) -> None: ...
    def pull(self, te: SimExecutor, task: Task, skip: int, now: float) -> None: ...
    def at(self, te: SimExecutor, time: float) -> None:
        """Call `te.fire` at `time`, instead of whenever was asked for before."""
        ...

    def reported(self, te: SimExecutor, now: float) -> None: ...
    def cached(self, te: SimExecutor, stored: Sequence[int], removed: Sequence[int]) -> None: ...


class SimExecutor:
    """One executor. Driven by `submit`, `pulled`, `release` and `fire`."""

    def __init__(
        self,
        number: int,
        role: Role,
        profile: CostProfile,
        host: Host,
        unit_tokens: int,
        *,
        table: list[float] | None = None,
        caches: bool = True,
    ) -> None:
        """`table`: `profile.table()`, where many executors share it."""
        self.number = number
        self.role = role
        self.profile = profile
        self.steps = 0
        self.version = 0  # of the pending event
        self.busy = False
        self._pool = Pool(profile.kv_tokens, profile.block_tokens, unit_tokens, caches=caches)
        self.tasks = 0  # waiting and running
        self.queued = 0  # prompt tokens still to compute
        self.transfers_in = self.transfers_out = 0
        self.prefill_rate = self.step_seconds = 0.0
        self.busy_seconds = self.prefill_seconds = 0.0
        self.preemptions = 0
        self.flips = 0
        self.link_free = 0.0  # when its link has sent what it has been given
        self._host = host
        self._bt = profile.block_tokens
        self._unit = unit_tokens
        self._caches = caches
        self._table = table or profile.table()
        self._slope = profile.slope
        self._reserve = max(1, int(self._pool.total * ADMISSION_RESERVE))
        self._waiting: list[tuple[Order, Task]] = []
        self._pulls: list[tuple[Order, Task]] = []
        self._prefilling: list[tuple[Order, Task]] = []
        self._pulling: set[Task] = set()
        self._decoding: dict[Task, None] = {}
        self._ready: list[Task] = []  # pulled, to decode from the next boundary on
        self._ends: list[tuple[int, int, Task]] = []  # heap by step
        self._context = 0  # lengths of the decoding tasks
        self._phases = [0] * self._bt
        self._numbers = 0
        self._plan: list[tuple[Task, int]] = []  # chunks of the step under way
        self._run = 0  # steps until the pending event
        self._started = 0.0
        self._until = 0.0
        self._run_batch = self._run_context = 0
        self._run_base = 0.0

    # -- what the cluster asks -------------------------------------------------------------------------

    @property
    def running(self) -> int:
        """Tasks that hold blocks."""
        return len(self._prefilling) + len(self._pulling) + len(self._decoding) + len(self._ready)

    @property
    def decoding(self) -> int:
        return len(self._decoding)

    @property
    def context(self) -> int:
        """Tokens of the decoding tasks at the last event."""
        return self._context

    @property
    def waiting(self) -> int:
        return len(self._waiting) + len(self._pulls)

    @property
    def total_blocks(self) -> int:
        return self._pool.total

    @property
    def free_blocks(self) -> int:
        """Blocks a new task could have: free, or idle prefixes that would be evicted."""
        return self._pool.available

    @property
    def cached_blocks(self) -> int:
        return self._pool.idle_blocks

    def fits(self, tokens: int) -> bool:
        return tokens <= self.total_blocks * self._bt and tokens < self.profile.max_model_len

    def matched(self, units: Sequence[int]) -> int:
        """Tokens of leading units that are cached here."""
        return self._pool.match(units, len(units)) * self._unit

    # -- calls of the cluster --------------------------------------------------------------------------

    def submit(self, task: Task, now: float) -> None:
        self._numbers += 1
        task.number = self._numbers
        task.arrival = now
        self.tasks += 1
        if not task.pulling:
            self.queued += task.length
        self._wait(task)
        self._look(now)

    def pulled(self, task: Task, now: float) -> None:
        """Its KV is here."""
        self._pulling.discard(task)
        self.transfers_in -= 1
        task.pulling = False
        task.computed = task.length - 1
        if self._caches and task.units:
            self._host.cached(self, self._pool.commit(task), ())
        self._ready.append(task)
        self._look(now)

    def release(self, task: Task, now: float) -> None:
        """The peer has pulled what `task` left behind."""
        self.transfers_out -= 1
        self._pool.release(task)
        self._look(now)

    def set_role(self, role: Role, now: float) -> None:
        """Takes effect at the next step boundary; nothing running is touched."""
        if role is self.role:
            return
        self.role = role
        self.flips += 1
        for group in (self._waiting, self._pulls, self._prefilling):
            tasks = [task for _, task in group]
            group.clear()
            for task in tasks:
                task.order = self._order(task)
                insort(group, (task.order, task))
        self._look(now)

    # -- steps -----------------------------------------------------------------------------------------

    def fire(self, now: float) -> None:
        """The pending event: takes in the steps that end now and starts the next."""
        self._finish(now)
        self._begin(now)

    def _look(self, now: float) -> None:
        """Something has changed: the engine sees it at its next step boundary."""
        if not self.busy:
            self._begin(now)
        elif self._run > 1:
            steps = self._boundary(now)
            if steps < self._run:
                self._run = steps
                self._until = max(now, self._started + self._after(steps))
                self._host.at(self, self._until)

    def _boundary(self, now: float) -> int:
        """Steps of the run under way until its first boundary at or after `now`."""
        passed = max(now - self._started, 0.0)
        half = self.profile.context_seconds * self._run_batch / 2
        linear = self._run_base + self.profile.context_seconds * self._run_context - half
        if half > 0:
            steps = (math.sqrt(linear * linear + 4 * half * passed) - linear) / (2 * half)
        else:
            steps = passed / linear
        return min(max(math.ceil(steps - 1e-9), 1), self._run)

    def _after(self, steps: int) -> float:
        """Seconds that so many steps of the run take."""
        attended = self._run_context * steps + self._run_batch * (steps * (steps - 1) // 2)
        return self._run_base * steps + self.profile.context_seconds * attended

    def _begin(self, now: float) -> None:
        for task in self._ready:
            self._join(task)
        self._ready.clear()
        lost = bool(self._decoding) and self._make_room()
        batch, plan = len(self._decoding), self._plan
        budget = Budget(self.profile, self._table, self._slope, self.role, batch, self._context)
        for _, task in self._prefilling:
            count = budget.chunk(task.computed, task.length - task.computed)
            if count:
                plan.append((task, count))
                budget.take(task.computed, count)
        if (self._waiting or self._pulls) and not lost:
            self._admit(now, budget)
        if batch or plan:
            self._start(now, batch, budget)
        self._report(now)

    def _start(self, now: float, batch: int, budget: Budget) -> None:
        self.busy = True
        self._started = now
        self._run_batch, self._run_context = batch, self._context
        if self._plan:
            sampled = batch + sum(task.computed + count >= task.length for task, count in self._plan)
            self._run = 1
            profile = self.profile
            self._until = now + (
                self._table[budget.tokens]
                + sampled * profile.sample_seconds
                + budget.pairs * profile.pair_seconds
                + self._context * profile.context_seconds
            )
        else:
            self._run_base = self._table[batch] + batch * self.profile.sample_seconds
            self._run = self._run_length(batch)
            self._until = now + self._after(self._run)
        self._host.at(self, self._until)

    def _run_length(self, batch: int) -> int:
        """Decode steps until something may change: an end, a lack of blocks, the next report."""
        ends = self._ends
        while ends[0][2] not in self._decoding or ends[0][2].finish_step != ends[0][0]:
            heapq.heappop(ends)  # it was preempted
        step = self._run_base + self.profile.context_seconds * self._run_context
        steps = max(1, min(ends[0][0] - self.steps, int(REPORT_SECONDS / step)))
        first, available = self._growth(1, batch), self._pool.available
        while steps > 1 and self._growth(steps, batch) - first > available:
            steps //= 2
        return steps

    def _growth(self, steps: int, batch: int) -> int:
        """New blocks of the decoding tasks in the next `steps` steps."""
        rounds, rest = divmod(steps, self._bt)
        phases, at = self._phases, 1 - self.steps
        return rounds * batch + sum([phases[(at - j) % self._bt] for j in range(rest)])

    def _finish(self, now: float) -> None:
        batch, run = self._run_batch, self._run
        self.busy = False
        self.busy_seconds += now - self._started
        if batch:
            if run > 1:  # those of the first step were taken before it
                self._pool.take(self._growth(run, batch) - self._growth(1, batch))
            self.steps += run
            self._context += batch * run
            self.step_seconds = _faded(self.step_seconds, (now - self._started) / run)
            ends = self._ends
            while ends and ends[0][0] <= self.steps:
                step, _, task = heapq.heappop(ends)
                if task in self._decoding and task.finish_step == step:
                    self._leave(task)
                    self._end(task, now)
        else:
            self.steps += run
        if self._plan:
            self._chunks_done(now)

    def _chunks_done(self, now: float) -> None:
        plan, self._plan = self._plan, []
        taken = now - self._started
        count = sum([tokens for _, tokens in plan])
        if count > self._run_batch and taken > 0:
            self.prefill_rate = _faded(self.prefill_rate, count / taken)
        self.prefill_seconds += taken * count / (count + self._run_batch)
        stored: list[int] = []
        for task, tokens in plan:
            task.computed += tokens
            self.queued -= tokens
            if self._caches and task.units:
                stored += self._pool.commit(task)
            if task.computed >= task.length:
                self._prefilling.remove((task.order, task))
                self._sampled(task, now)
        if stored:
            self._host.cached(self, stored, ())

    def _sampled(self, task: Task, now: float) -> None:
        """A prefill (or recomputation) has its next token."""
        task.length += 1
        if task.length == task.prompt + 1:
            self._host.first_token(self, task, now)
        if task.length - task.prompt >= task.output:
            self._end(task, now)
        elif task.kind == PREFILL:
            self.transfers_out += 1
            self.tasks -= 1
            self._host.handover(self, task, now)
        else:
            self._join(task)

    def _end(self, task: Task, now: float) -> None:
        self._pool.release(task)
        self.tasks -= 1
        self._host.ended(self, task, now)

    def _report(self, now: float) -> None:
        if self._pool.gone:
            gone, self._pool.gone = self._pool.gone, []
            self._host.cached(self, (), gone)
        self._host.reported(self, now)

    # -- decoding tasks ----------------------------------------------------------------------------------

    def _join(self, task: Task) -> None:
        """From the next step on it decodes."""
        task.join_step = self.steps
        task.finish_step = self.steps + task.output - (task.length - task.prompt)
        self._decoding[task] = None
        self._context += task.length
        self._phases[(task.length - self.steps) % self._bt] += 1
        self._pool.resize(task, task.length - 1)  # its step takes the next block, if it needs one
        heapq.heappush(self._ends, (task.finish_step, task.number, task))

    def _leave(self, task: Task) -> None:
        """Brings its counts up to the present step and takes it out of the batch."""
        del self._decoding[task]
        self._phases[(task.length - task.join_step) % self._bt] -= 1
        task.length += self.steps - task.join_step
        self._context -= task.length
        task.blocks = self._pool.own_blocks(task, task.length - 1)  # taken by the steps already

    def _make_room(self) -> bool:
        """Takes the blocks of the next step's tokens, those of the last in order first. True: somebody lost
        his."""
        lost = False
        while True:
            need = self._phases[(1 - self.steps) % self._bt]
            if need <= self._pool.available:
                self._pool.take(need)
                return lost
            lost = True
            self._preempt(max([*self._decoding, *self._may_lose()], key=lambda task: task.order))

    def _may_lose(self) -> list[Task]:
        """Prefills under way whose KV no peer waits for."""
        return [task for _, task in self._prefilling if task.kind != PREFILL]

    def _preempt(self, task: Task) -> None:
        self.preemptions += 1
        if task in self._decoding:
            self._leave(task)
        else:
            self._prefilling.remove((task.order, task))
            self.queued -= task.length - task.computed
        self._pool.release(task)
        task.computed = 0
        task.wait_since = math.inf
        self.queued += task.length
        self._wait(task)

    # -- admission ---------------------------------------------------------------------------------------

    def _order(self, task: Task) -> Order:
        preferred = (self.role is Role.PREFILL and task.kind == PREFILL) or (
            self.role is Role.DECODE and task.kind == DECODE
        )
        return (-task.priority, task.arrival - (ROLE_BONUS_SECONDS if preferred else 0.0), task.number)

    def _wait(self, task: Task) -> None:
        task.order = self._order(task)
        insort(self._pulls if task.pulling else self._waiting, (task.order, task))

    def _admit(self, now: float, budget: Budget) -> None:
        waiting, pulls = self._waiting, self._pulls
        coming = self._coming()
        at, open_ = 0, True
        while self.running < self.profile.max_running:
            order, task = waiting[at] if open_ and at < len(waiting) else _NOBODY
            if pulls and pulls[0][0] < order:
                task = pulls[0][1]
                skip = self._pool.match(task.units, (task.length - 1) // self._unit)
                if not self._pool.hold(task, skip, self._reserve if self.running else 0):
                    return
                pulls.pop(0)
                self._pulling.add(task)
                self.transfers_in += 1
                self._host.pull(self, task, skip * self._unit, now)
                continue
            if task is None:
                return
            match = self._pool.match(task.units, (task.length - 1) // self._unit)
            if coming and self._waits_for_prefix(task, match, coming, now):
                at += 1
                continue
            start = match * self._unit
            count = budget.chunk(start, task.length - start)
            if not count:
                open_ = False  # no time left in this step; pulls cost none
                continue
            if not self._pool.hold(task, match, self._reserve if self.running else 0):
                return  # blocks go to the first in order, or a long prompt would starve
            waiting.pop(at)
            task.computed = start
            self.queued -= start
            if task.length == task.prompt:
                task.cached = start
            insort(self._prefilling, (task.order, task))
            self._plan.append((task, count))
            budget.take(start, count)
            coming.update(task.units[match:])

    def _coming(self) -> set[int]:
        """Prefix units that prefills under way will have computed soon."""
        coming: set[int] = set()
        if self._caches:
            for _, task in self._prefilling:
                coming.update(task.units[task.computed // self._unit :])
        return coming

    @staticmethod
    def _waits_for_prefix(task: Task, match: int, coming: set[int], now: float) -> bool:
        if match >= len(task.units) or task.units[match] not in coming:
            return False
        task.wait_since = min(task.wait_since, now)
        return now - task.wait_since < PREFIX_WAIT_SECONDS


_NOBODY: tuple[Order, Task | None] = ((1 << 62, math.inf, 1 << 62), None)


def _faded(old: float, new: float) -> float:
    return new if old == 0.0 else RATE_FADE * old + (1 - RATE_FADE) * new
