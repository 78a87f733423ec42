"""The cluster's autoscaler on one machine: executors as processes, started and drained by the supervisor.

`deepflow up --autoscale N`: each role of a model's topology may grow from its count to N executors while the
load is worth them (`controlplane.fleet.autoscale`, which decides; the counts of the topology are the minima).
Signals are what the executors report; there are no targets of answers here, and nobody goes to zero.

An executor that is not needed any more takes no new tasks, finishes those it has within a bound, and ends.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from controlplane.fleet.autoscale import Autoscaler, Bounds, Change, ScalePolicy, Signals
from controlplane.fleet.loads import loads_of
from controlplane.local import metrics
from controlplane.local.executors import Executor
from controlplane.local.rolecontrol import executor_view
from controlplane.local.topology import RoleName, Topology
from controlplane.scheduling.types import Role

SCALE_SECONDS = 2.0
"""Between two looks (as the operator's)."""
STABLE_SECONDS = 60.0
DOWN_SECONDS = 120.0
"""Window of the load, and how long fewer must suffice (defaults of a ModelServing)."""
LEAVE_SECONDS = 120.0
"""How long one that leaves may finish its tasks (default of a ModelServing's drainSeconds)."""

log = logging.getLogger("deepflow.local")

Start = Callable[[str, RoleName], Executor]


@dataclass(slots=True)
class _Group:
    policy: ScalePolicy
    executors: list[Executor]
    scaler: Autoscaler = field(default_factory=Autoscaler)


class LocalScaling:
    """One autoscaler per model. `start(model id, role)` adds an executor; who leaves is told by `leavers`."""

    def __init__(
        self,
        groups: Mapping[str, tuple[Topology, list[Executor]]],
        most: int,
        start: Start,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._start = start
        self._clock = clock
        self._groups = {
            model: _Group(_policy(topology, most), list(executors))
            for model, (topology, executors) in groups.items()
        }

    def cycle(self) -> None:
        """One look at each model, and what follows from it."""
        for model, group in self._groups.items():
            decision = group.scaler.step(group.policy, _signals(group, self._clock()))
            for change in decision.changes:
                self._follow(model, group, change)

    def leavers(self) -> Iterator[Executor]:
        """Those whose time here is over: nothing of theirs is left, or they had their time. Each once."""
        for group in self._groups.values():
            for executor in [e for e in group.executors if e.leaving_since is not None]:
                waited = self._clock() - (executor.leaving_since or 0.0)
                if executor.empty or waited > LEAVE_SECONDS:
                    group.executors.remove(executor)
                    yield executor

    def _follow(self, model: str, group: _Group, change: Change) -> None:
        role = RoleName(change.role.value)
        log.info("%s: %s %d -> %d (%s: %s)", model, role.value, change.before, change.after,
                 change.cause.value, change.message)  # fmt: skip
        metrics.SCALINGS.labels(model, role.value, "up" if change.after > change.before else "down").inc()
        for _ in range(change.after - change.before):
            group.executors.append(self._start(model, role))
        staying = [e for e in _present(group) if e.role is role]
        # Who does not serve yet goes first, then who has the fewest tasks, then the youngest.
        staying.sort(key=lambda e: (e.ready, e.tasks, -e.number))
        for executor in staying[: max(0, change.before - change.after)]:
            executor.leave(self._clock())


def _policy(topology: Topology, most: int) -> ScalePolicy:
    counts = Counter(topology.roles)
    return ScalePolicy(
        bounds={Role(role.value): Bounds(count, max(count, most)) for role, count in counts.items()},
        stable_window=STABLE_SECONDS,
        scale_down_delay=DOWN_SECONDS,
    )


def _present(group: _Group) -> list[Executor]:
    return [executor for executor in group.executors if executor.leaving_since is None]


def _signals(group: _Group, now: float) -> Signals:
    present = _present(group)
    views = [view for e in present if e.ready and (view := executor_view(e)) is not None]
    loads = loads_of(views)
    return Signals(
        now=now,
        replicas=Counter(Role(e.role.value) for e in present),
        ready=Counter(Role(e.role.value) for e in present if e.ready),
        score=loads.score,
        running=sum(loads.tasks.values()),
        tasks=loads.tasks if views else None,
        kv=loads.kv,
    )
