"""Load-aware role control: one look at the load a second in, role changes out.

FlowKV's controller (section 3) tells normal load, imbalance (an idle side helps for several cycles) and
overload apart; the paper gives neither scores nor thresholds. Ours, both 1.0 at "as much as its share":

    prefill = sum(queued tokens / rate over the executors that prefill) / their number / prefill_target
    decode  = mean over the executors that decode of max(KV used, step / step_target, tasks / max tasks)

An executor that is colocated counts on both sides. Both are smoothed. One side hot while the other is idle
for several cycles moves one executor over: to the other role if its side keeps `floor` of its own, else to
colocated, so that the last one of a side never leaves it. Once both sides are calm, executors go home to
the roles they were given. A role is a preference of the executor's next step: no weights move, no task
stops. Called each second by the one leader (`controlplane.local`; the twin's tick).
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass

from controlplane.scheduling.types import ExecutorView, Role

DEFAULT_RATE = 2000.0
"""Prompt tokens per second assumed before an executor reported any (as `Policy.default_prefill_rate`)."""


class Balance(enum.StrEnum):
    NORMAL = "normal"
    PREFILL_HOT = "prefill_hot"  # decode executors help
    DECODE_HOT = "decode_hot"  # prefill executors help
    OVERLOAD = "overload"  # both: no role helps; more executors or less load do


@dataclass(frozen=True, slots=True)
class RolePolicy:
    """Thresholds; "ours" all of them, see docs/scheduling.md for how they were found."""

    prefill_target_seconds: float = 1.0
    """Queue in front of a prefill executor that counts as fully loaded: what a client waits for a start."""
    step_target_seconds: float = 0.2
    """Step of a decode executor that counts as fully loaded: the time between tokens clients accept."""
    hot: float = 1.0
    idle: float = 0.5
    """Below half of its share a side can spare an executor: moving one of two doubles the other's load."""
    calm: float = 0.25
    """Both sides below this: everyone goes home."""
    cycles: int = 3
    """Turns in a row that an imbalance must last: bursts end by themselves."""
    calm_cycles: int = 30
    dwell_seconds: float = 10.0
    """Least time between two changes of one executor."""
    floor: int = 1
    """Executors that keep the role of their side; the last ones become colocated instead."""
    smoothing: float = 0.5
    """Weight of the newest look."""

    def __post_init__(self) -> None:
        if not 0 < self.calm <= self.idle < self.hot:
            raise ValueError("0 < calm <= idle < hot must hold")
        if self.cycles < 1 or self.calm_cycles < 1 or self.floor < 1 or not 0 < self.smoothing <= 1:
            raise ValueError("cycles, calm_cycles and floor are at least 1, smoothing is in (0, 1]")


@dataclass(frozen=True, slots=True)
class RoleChange:
    te_id: str
    role: Role
    reason: str


@dataclass(frozen=True, slots=True)
class RoleDecision:
    """One turn's answer: what to change now, and what it was seen from."""

    balance: Balance
    prefill: float  # smoothed score of the prefill side; 1 = fully loaded
    decode: float
    changes: tuple[RoleChange, ...] = ()

    @property
    def wants_executors(self) -> bool:
        """Ask for scaling, and shed by priority meanwhile."""
        return self.balance is Balance.OVERLOAD


class RoleController:
    """Remembers what hysteresis needs: smoothed scores, how long they last, when whom it moved.

    One per model revision. Knows only the executors it is shown; those `pinned` it counts and leaves alone.
    """

    def __init__(self, policy: RolePolicy | None = None) -> None:
        self._policy = policy or RolePolicy()
        self._home: dict[str, Role] = {}
        self._moved: dict[str, float] = {}
        self._prefill: float | None = None
        self._decode: float | None = None
        self._lasted: tuple[Balance, int] = (Balance.NORMAL, 0)
        self._calm = 0

    def step(
        self, executors: Sequence[ExecutorView], now: float, pinned: frozenset[str] = frozenset()
    ) -> RoleDecision:
        """One turn. At most one executor changes, so that its effect is seen before the next does."""
        policy = self._policy
        present = [e for e in executors if e.ready and not e.draining and e.link_up]
        for executor in present:
            self._home.setdefault(executor.te_id, executor.role)
        for te_id in self._home.keys() - {e.te_id for e in executors}:
            del self._home[te_id]
            self._moved.pop(te_id, None)
        self._prefill = self._smooth(self._prefill, prefill_score(present, policy))
        self._decode = self._smooth(self._decode, decode_score(present, policy))
        balance = self._balance(self._prefill, self._decode)
        before, count = self._lasted
        self._lasted = (balance, count + 1 if balance is before else 1)
        calm = max(self._prefill, self._decode) < policy.calm
        self._calm = self._calm + 1 if calm else 0
        movable = [
            e
            for e in present
            if e.te_id not in pinned and now - self._moved.get(e.te_id, -math.inf) >= policy.dwell_seconds
        ]
        change: RoleChange | None = None
        if self._lasted[1] >= policy.cycles and balance in _HELPERS:
            change = self._help(balance, present, movable)
        elif self._calm >= policy.calm_cycles:
            change = self._go_home(movable)
        if change is not None:
            self._moved[change.te_id] = now
            self._lasted = (balance, 0)
        return RoleDecision(balance, self._prefill, self._decode, (change,) if change else ())

    def set_home(self, te_id: str, role: Role) -> None:
        """An operator gave it this role."""
        self._home[te_id] = role

    def _smooth(self, old: float | None, new: float) -> float:
        return new if old is None else old + self._policy.smoothing * (new - old)

    def _balance(self, prefill: float, decode: float) -> Balance:
        policy = self._policy
        if prefill >= policy.hot and decode >= policy.hot:
            return Balance.OVERLOAD
        if prefill >= policy.hot and decode < policy.idle:
            return Balance.PREFILL_HOT
        if decode >= policy.hot and prefill < policy.idle:
            return Balance.DECODE_HOT
        return Balance.NORMAL

    def _help(
        self, balance: Balance, present: Sequence[ExecutorView], movable: Sequence[ExecutorView]
    ) -> RoleChange | None:
        spare, wanted = _HELPERS[balance]
        helpers = [e for e in movable if e.role is spare] or [e for e in movable if e.role is Role.COLOCATED]
        if not helpers:
            return None
        chosen = min(helpers, key=lambda e: (e.tasks, e.queued_tokens, e.te_id))
        if chosen.role is Role.COLOCATED:
            others = [e for e in present if e.te_id != chosen.te_id and e.role is not wanted]
            if len(others) < self._policy.floor:
                return None
            role = wanted
        else:
            left = sum(e.role is spare for e in present) - 1
            role = wanted if left >= self._policy.floor else Role.COLOCATED
        return RoleChange(chosen.te_id, role, str(balance))

    def _go_home(self, movable: Sequence[ExecutorView]) -> RoleChange | None:
        for executor in sorted(movable, key=lambda e: e.te_id):
            home = self._home[executor.te_id]
            if executor.role is not home:
                return RoleChange(executor.te_id, home, "calm")
        return None


_HELPERS = {
    Balance.PREFILL_HOT: (Role.DECODE, Role.PREFILL),
    Balance.DECODE_HOT: (Role.PREFILL, Role.DECODE),
}


def prefill_score(executors: Sequence[ExecutorView], policy: RolePolicy) -> float:
    """Mean queue in front of the executors that prefill, in shares of the target. Nobody: 0 without work."""
    seconds = sum(e.queued_tokens / (e.prefill_tokens_per_second or DEFAULT_RATE) for e in executors)
    takers = sum(e.role is not Role.DECODE for e in executors)
    return seconds / max(takers, 1) / policy.prefill_target_seconds


def decode_score(executors: Sequence[ExecutorView], policy: RolePolicy) -> float:
    """Mean pressure of the executors that decode: the worst of KV, step time and task slots of each."""
    takers = [e for e in executors if e.role is not Role.PREFILL]
    total = 0.0
    for executor in takers:
        used = 0.0
        if executor.kv_blocks_total:
            used = 1 - executor.kv_blocks_free / executor.kv_blocks_total
        step = executor.decode_step_seconds / policy.step_target_seconds if executor.tasks else 0.0
        total += max(used, step, executor.tasks / max(executor.max_tasks, 1))
    return total / max(len(takers), 1)
