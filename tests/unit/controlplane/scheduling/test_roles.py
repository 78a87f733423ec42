"""Role control: it waits, helps with one executor at a time, never empties a side, and goes home."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.scheduling.roles import Balance, RoleController, RoleDecision, RolePolicy
from controlplane.scheduling.types import ExecutorView, Role


def executor(te_id: str, role: Role, **changes: object) -> ExecutorView:
    base = ExecutorView(te_id, "i", role, "m", kv_blocks_total=100, kv_blocks_free=100)
    return replace(base, **changes)  # type: ignore[arg-type]  # fields by name


def queued(view: ExecutorView, seconds: float) -> ExecutorView:
    return replace(view, queued_tokens=int(seconds * 1000), prefill_tokens_per_second=1000.0, tasks=4)


def full(view: ExecutorView) -> ExecutorView:
    return replace(view, kv_blocks_free=0, tasks=60, decode_step_seconds=0.5)


class Fleet:
    """Applies what the controller says."""

    def __init__(self, *roles: Role) -> None:
        self.roles = {f"te-{n}": role for n, role in enumerate(roles)}
        self.controller = RoleController()
        self.now = 0.0

    def turn(self, hot: Role | None, pinned: frozenset[str] = frozenset()) -> RoleDecision:
        self.now += 1
        views = [executor(te_id, role) for te_id, role in self.roles.items()]
        if hot is Role.PREFILL:
            views = [queued(v, 5) if v.role is not Role.DECODE else v for v in views]
        elif hot is Role.DECODE:
            views = [full(v) if v.role is not Role.PREFILL else v for v in views]
        decision = self.controller.step(views, self.now, pinned)
        for change in decision.changes:
            self.roles[change.te_id] = change.role
        return decision


P, D, C = Role.PREFILL, Role.DECODE, Role.COLOCATED


def test_a_burst_flips_nobody_and_a_lasting_one_does() -> None:
    fleet = Fleet(P, P, D, D)
    cycles = RolePolicy().cycles
    for _ in range(cycles - 1):
        assert not fleet.turn(P).changes
    assert fleet.turn(P).balance is Balance.PREFILL_HOT
    assert sorted(fleet.roles.values()) == [D, P, P, P]


def test_the_last_of_a_side_helps_without_leaving_it() -> None:
    fleet = Fleet(P, D)
    for _ in range(5):
        fleet.turn(P)
    assert fleet.roles == {"te-0": P, "te-1": C}
    fleet = Fleet(P, D)
    for _ in range(5):
        fleet.turn(D)
    assert fleet.roles == {"te-0": C, "te-1": D}


def test_once_calm_everyone_goes_home() -> None:
    fleet = Fleet(P, D)
    for _ in range(5):
        fleet.turn(P)
    for _ in range(60):
        fleet.turn(None)
    assert fleet.roles == {"te-0": P, "te-1": D}


def test_a_change_stays_for_its_dwell_time() -> None:
    fleet = Fleet(P, D)
    moved: list[float] = []
    for turn in range(200):
        hot = P if turn // 5 % 2 else D
        moved += [fleet.now for change in fleet.turn(hot).changes if change.te_id == "te-1"]
    gaps = [b - a for a, b in pairwise(moved)]
    assert all(gap >= RolePolicy().dwell_seconds for gap in gaps)


def test_a_pinned_executor_is_left_alone() -> None:
    fleet = Fleet(P, D)
    for _ in range(10):
        assert not fleet.turn(P, frozenset({"te-1"})).changes


def test_both_sides_hot_asks_for_executors() -> None:
    controller = RoleController()
    decision = controller.step([queued(executor("p", P), 9), full(executor("d", D))], 0.0)
    assert decision.wants_executors and not decision.changes


@settings(max_examples=60)
@given(
    st.lists(st.sampled_from(list(Role)), min_size=1, max_size=6),
    st.lists(st.sampled_from([P, D, None]), max_size=80),
)
def test_somebody_always_prefills_and_somebody_always_decodes(
    roles: list[Role], load: list[Role | None]
) -> None:
    if not any(r is not D for r in roles) or not any(r is not P for r in roles):
        return
    fleet = Fleet(*roles)
    for hot in load:
        assert len(fleet.turn(hot).changes) <= 1
        assert any(role is not D for role in fleet.roles.values())
        assert any(role is not P for role in fleet.roles.values())


def test_thresholds_that_contradict_are_refused() -> None:
    with pytest.raises(ValueError, match="idle"):
        RolePolicy(idle=2.0)
