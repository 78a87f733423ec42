"""How many executors of each role a model wants. Pure: signals in, decision out; the caller acts.

Called by the operator for every ModelServing; nothing here knows of Kubernetes, so whoever runs executors as
processes can call it as well.

The unit is *work*: executors' worth of load at the target. A role's work is its load score (1 = as much as
its share, `controlplane.scheduling.roles`) times the executors that serve, averaged over two windows:

- the stable window decides ordinary changes; down only after fewer have sufficed for the whole delay;
- the panic window notices a sudden rise: from `panic_threshold` times what is there on, replicas only go up
  until the stable window has passed (as Knative's autoscaler, applied to work instead of concurrency).

A share of answers that miss the SLO above the allowed one adds executors to the side that causes it (TTFT:
prefill or colocated, TPOT: decode or colocated), once per window, judged anew when the new ones serve.
Slowness alone is no load: on a slow machine one request makes a long queue and long steps, and another
executor would stand beside it and wait. So nobody is added beyond the tasks that are there to be shared, or
beyond what the KV in use asks for.

Prefill and decode stay within their ratio by raising the lower side. An executor that is still starting is
never idle: while some start, nothing goes down. Zero load is a signal like any other; zero replicas come only
from idleness, and one after zero is not decided here but by the activator, apart from minima that schedules
raise.
"""

from __future__ import annotations

import enum
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from controlplane.fleet.cron import Cron
from controlplane.fleet.demand import above
from controlplane.scheduling.types import Role

MIN_ANSWERS = 10
"""Fewer answers in the window say nothing about a share (ours)."""
MAX_SAMPLES = 4096
"""Of a window; above one a second over the longest window that fields allow (ours)."""
SLACK = 1e-6
ANY_NUMBER = 1 << 30
OVERLAP_TASKS = 0.5
"""Of the average number of tasks, what is no second one: looks that fall between the end of a request and the
beginning of the next see both (ours)."""


class Cause(enum.StrEnum):
    """Why a count changes; the words of scalingHistory."""

    QUEUE_TIME = "QueueTime"
    SLO = "SLOViolated"
    PANIC = "Panic"
    RATIO = "Ratio"
    SCHEDULE = "Schedule"
    IDLE = "Idle"
    LESS = "ScaledDown"
    BOUNDS = "AtLimit"


@dataclass(frozen=True, slots=True)
class Bounds:
    min: int
    max: int


@dataclass(frozen=True, slots=True)
class Window:
    """A schedule: minima that hold for a time that comes again."""

    name: str
    cron: Cron
    seconds: float
    minima: Mapping[Role, int]


@dataclass(frozen=True, slots=True)
class ScalePolicy:
    """Seconds everywhere. Defaults are those of the ModelServing."""

    bounds: Mapping[Role, Bounds]
    ttft: float | None = None
    tpot: float | None = None
    allowed_violations: float = 0.05
    stable_window: float = 60.0
    panic_window: float = 6.0
    panic_threshold: float = 2.0
    scale_down_delay: float = 120.0
    scale_to_zero_after: float = 0.0  # 0 = never
    max_scale_up_rate: float = 4.0
    ratio_min: float = 0.125
    ratio_max: float = 8.0
    schedules: Sequence[Window] = ()


@dataclass(frozen=True, slots=True)
class Signals:
    """One look at a model."""

    now: float  # seconds since the epoch
    replicas: Mapping[Role, int]  # what is asked for now
    ready: Mapping[Role, int]
    score: Mapping[Role, float]  # load score by role; absent: nobody reports
    ttft: Mapping[int, int] = field(default_factory=dict)  # answers since the last look, by bucket
    tpot: Mapping[int, int] = field(default_factory=dict)
    idle: float | None = None  # seconds since the last request; None: unknown
    held: int = 0
    running: int = 0  # tasks in executors
    tasks: Mapping[Role, int] | None = None  # that a role's executors could share, held ones too
    kv: Mapping[Role, float] = field(default_factory=dict)  # KV in use, 1 = as much as its target


@dataclass(frozen=True, slots=True)
class Change:
    role: Role
    before: int
    after: int
    cause: Cause
    message: str


@dataclass(frozen=True, slots=True)
class Decision:
    wanted: Mapping[Role, int]
    changes: tuple[Change, ...]
    signals: bool  # something was known to decide by
    at_limit: bool  # more is wanted than the bounds allow
    panic: bool


class Autoscaler:
    """Remembers the windows of one model. A new one (after a change of leader) begins with empty windows, and
    so goes down no earlier than one delay later."""

    def __init__(self) -> None:
        self._work: dict[Role, deque[tuple[float, float]]] = {}
        self._tasks: dict[Role, deque[tuple[float, float]]] = {}
        self._answers: deque[tuple[float, int, int, int, int]] = deque(maxlen=MAX_SAMPLES)
        self._wanted: dict[Role, deque[tuple[float, int]]] = {}
        self._panic_until = -math.inf
        self._began: float | None = None
        self._idle_known_since: float | None = None

    def step(self, policy: ScalePolicy, signals: Signals) -> Decision:
        """One look. Applies nothing: the caller may, or (in advisory mode) may only say it."""
        now = signals.now
        if self._began is None:
            self._began = now
        current = {role: signals.replicas.get(role, 0) for role in policy.bounds}
        minima, schedule = _minima(policy, now)
        self._observe(policy, signals)
        if self._is_idle(policy, signals, minima):
            none = dict.fromkeys(current, 0)
            idle = "unknown" if signals.idle is None else f"{signals.idle:.0f} s"
            message = f"no request for {idle}"
            return _decision(current, none, dict.fromkeys(none, (Cause.IDLE, message)), signals=True)
        if not any(current.values()) and not any(minima.values()):
            return _decision(current, current, {}, signals=True)  # the activator's
        causes: dict[Role, tuple[Cause, str]] = {}
        wanted: dict[Role, int] = {}
        starting = any(signals.ready.get(role, 0) < count for role, count in current.items())
        panic = self._panics(policy, signals, current)
        for role, count in current.items():
            wanted[role] = self._by_work(policy, signals, role, count, panic=panic, causes=causes)
            wanted[role] = min(wanted[role], self._useful(policy, signals, role))
        if not starting:
            self._by_slo(policy, signals, current, wanted, causes)
        for role, count in current.items():
            floor = max(minima[role], 1)
            if wanted[role] < floor and count < floor:
                causes[role] = (Cause.SCHEDULE, schedule or f"at least {floor}")
            wanted[role] = max(wanted[role], floor)
            rate = max(count + 1, math.floor(count * policy.max_scale_up_rate + SLACK), floor)
            wanted[role] = min(wanted[role], rate)
        _keep_ratio(policy, wanted, causes)
        limited = any(wanted[role] > bounds.max for role, bounds in policy.bounds.items())
        for role, bounds in policy.bounds.items():
            wanted[role] = max(min(wanted[role], bounds.max), min(floor_of(bounds, minima[role]), bounds.max))
            wanted[role] = self._not_yet_down(policy, now, role, current[role], wanted[role],
                                              hold=panic or starting)  # fmt: skip
        wanted = {role: min(count, policy.bounds[role].max) for role, count in wanted.items()}
        known = bool(signals.score) or not any(signals.ready.values())
        return _decision(current, wanted, causes, signals=known, at_limit=limited, panic=panic)

    # -- windows -------------------------------------------------------------------------------------------

    def _observe(self, policy: ScalePolicy, signals: Signals) -> None:
        for role in policy.bounds:
            samples = self._work.setdefault(role, deque(maxlen=MAX_SAMPLES))
            if role in signals.score:
                samples.append((signals.now, signals.score[role] * max(signals.ready.get(role, 0), 1)))
            _forget(samples, signals.now - policy.stable_window)
            if signals.tasks is not None:
                there = self._tasks.setdefault(role, deque(maxlen=MAX_SAMPLES))
                there.append((signals.now, float(signals.tasks.get(role, 0))))
                _forget(there, signals.now - policy.stable_window)
        missed_ttft = above(signals.ttft, policy.ttft) if policy.ttft is not None else 0
        missed_tpot = above(signals.tpot, policy.tpot) if policy.tpot is not None else 0
        counts = (sum(signals.ttft.values()), missed_ttft, sum(signals.tpot.values()), missed_tpot)
        if any(counts):
            self._answers.append((signals.now, *counts))
        while self._answers and self._answers[0][0] <= signals.now - policy.stable_window:
            self._answers.popleft()

    def _average(self, role: Role, since: float) -> float | None:
        return _mean(self._work[role], since)

    def _useful(self, policy: ScalePolicy, signals: Signals, role: Role) -> int:
        """The most executors of a role that would have anything to do: one for each task, on average over the
        window that shows more, or as many as the KV in use fills. Without counts of tasks: no bound."""
        there = self._tasks.get(role)
        if signals.tasks is None or not there:
            return ANY_NUMBER
        windows = (policy.stable_window, policy.panic_window)
        tasks = max(_mean(there, signals.now - window) or 0.0 for window in windows)
        full = signals.kv.get(role, 0.0) * max(signals.ready.get(role, 0), 1)
        return max(1, math.ceil(tasks - OVERLAP_TASKS - SLACK), math.ceil(full - SLACK))

    def _panics(self, policy: ScalePolicy, signals: Signals, current: Mapping[Role, int]) -> bool:
        for role, count in current.items():
            work = self._average(role, signals.now - policy.panic_window)
            if work is None or not count:
                continue
            if min(work, self._useful(policy, signals, role)) >= policy.panic_threshold * count:
                self._panic_until = signals.now + policy.stable_window
        return signals.now < self._panic_until

    def _by_work(
        self, policy: ScalePolicy, signals: Signals, role: Role, count: int, *, panic: bool,
        causes: dict[Role, tuple[Cause, str]],
    ) -> int:  # fmt: skip
        stable = self._average(role, signals.now - policy.stable_window)
        if stable is None:
            return count
        wanted = math.ceil(stable - SLACK)
        cause, seen = Cause.QUEUE_TIME, stable
        if panic:
            sudden = self._average(role, signals.now - policy.panic_window) or 0.0
            if math.ceil(sudden - SLACK) > wanted:
                wanted, cause, seen = math.ceil(sudden - SLACK), Cause.PANIC, sudden
        if wanted > count:
            causes[role] = (cause, f"load worth {seen:.2f} executors on {count}")
        elif wanted < count:
            causes[role] = (Cause.LESS, f"load worth {seen:.2f} executors on {count}")
        return wanted

    def _by_slo(
        self, policy: ScalePolicy, signals: Signals, current: Mapping[Role, int], wanted: dict[Role, int],
        causes: dict[Role, tuple[Cause, str]],
    ) -> None:  # fmt: skip
        totals = [sum(row[index] for row in self._answers) for index in range(1, 5)]
        for what, limit, answers, missed, side in (
            ("TTFT", policy.ttft, totals[0], totals[1], Role.PREFILL),
            ("TPOT", policy.tpot, totals[2], totals[3], Role.DECODE),
        ):
            if limit is None or answers < MIN_ANSWERS:
                continue
            role = side if current.get(side) else Role.COLOCATED
            if role not in current or not current[role]:
                continue
            share = missed / answers
            if share <= policy.allowed_violations:
                if share > policy.allowed_violations / 2:
                    wanted[role] = max(wanted[role], current[role])  # near the line: nobody goes
                continue
            more = (share - policy.allowed_violations) / max(1 - policy.allowed_violations, SLACK)
            asked = max(current[role] + 1, math.ceil(current[role] * (1 + more) - SLACK))
            # Who is there stays while answers are late; more come only if they would have something to do.
            asked = max(current[role], min(asked, self._useful(policy, signals, role)))
            if asked > wanted[role]:
                wanted[role] = asked
                causes[role] = (Cause.SLO, f"{share:.0%} of {answers} answers miss {what} {limit:g} s")
                if asked > current[role]:
                    self._answers.clear()  # judged anew with the new executors

    def _not_yet_down(
        self, policy: ScalePolicy, now: float, role: Role, current: int, wanted: int, *, hold: bool
    ) -> int:
        """Fewer only once the highest wish of the whole delay was below what is there."""
        wishes = self._wanted.setdefault(role, deque(maxlen=MAX_SAMPLES))
        wishes.append((now, max(wanted, current) if hold else wanted))
        _forget(wishes, now - policy.scale_down_delay)
        if wanted >= current:
            return wanted
        assert self._began is not None
        if hold or now - self._began < policy.scale_down_delay:
            return current
        return min(current, max(wish for _, wish in wishes))

    # -- zero ----------------------------------------------------------------------------------------------

    def _is_idle(self, policy: ScalePolicy, signals: Signals, minima: Mapping[Role, int]) -> bool:
        """Nobody asked for long enough. Unknown activity counts from when it was first not known."""
        after = policy.scale_to_zero_after
        if not after or any(minima.values()) or signals.held or signals.running:
            self._idle_known_since = None
            return False
        if not any(signals.replicas.values()):
            return False
        if signals.idle is not None:
            self._idle_known_since = None
            return signals.idle >= after
        if self._idle_known_since is None:
            self._idle_known_since = signals.now
        return signals.now - self._idle_known_since >= after


def floor_of(bounds: Bounds, scheduled: int) -> int:
    """The fewest that may stay while the model is not at zero."""
    return max(bounds.min, scheduled, 1)


def _minima(policy: ScalePolicy, now: float) -> tuple[dict[Role, int], str]:
    """By role, and the schedule that raises one."""
    minima = {role: bounds.min for role, bounds in policy.bounds.items()}
    name = ""
    for window in policy.schedules:
        if window.cron.open_since(now, window.seconds) is None:
            continue
        for role, count in window.minima.items():
            if count > minima.get(role, 0) and role in minima:
                minima[role] = min(count, policy.bounds[role].max)
                name = f"schedule {window.name}"
    return minima, name


def _keep_ratio(policy: ScalePolicy, wanted: dict[Role, int], causes: dict[Role, tuple[Cause, str]]) -> None:
    prefill, decode = wanted.get(Role.PREFILL, 0), wanted.get(Role.DECODE, 0)
    if not prefill or not decode:
        return
    least = math.ceil(policy.ratio_min * decode - SLACK)
    if prefill < least:
        wanted[Role.PREFILL] = least
        causes[Role.PREFILL] = (Cause.RATIO, f"at least {policy.ratio_min:g} prefill per decode of {decode}")
    most = math.floor(policy.ratio_max * decode + SLACK)
    if prefill > most:
        wanted[Role.DECODE] = math.ceil(prefill / policy.ratio_max - SLACK)
        causes[Role.DECODE] = (Cause.RATIO, f"at most {policy.ratio_max:g} prefill per decode, of {prefill}")


def _decision(
    current: Mapping[Role, int],
    wanted: Mapping[Role, int],
    causes: Mapping[Role, tuple[Cause, str]],
    *,
    signals: bool,
    at_limit: bool = False,
    panic: bool = False,
) -> Decision:
    changes = []
    for role, count in current.items():
        if wanted[role] != count:
            cause, message = causes.get(role, (Cause.BOUNDS, "within its bounds"))
            if wanted[role] < count and cause is not Cause.IDLE:
                cause = Cause.LESS
            changes.append(Change(role, count, wanted[role], cause, message))
    return Decision(dict(wanted), tuple(changes), signals, at_limit, panic)


def _mean(samples: deque[tuple[float, float]], since: float) -> float | None:
    values = [value for at, value in samples if at > since]
    return sum(values) / len(values) if values else None


def _forget(samples: deque[tuple[float, float]] | deque[tuple[float, int]], until: float) -> None:
    while samples and samples[0][0] <= until:
        samples.popleft()
