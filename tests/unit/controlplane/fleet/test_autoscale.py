"""The autoscaler: what raises and lowers counts, bounds that always hold, and schedules."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.fleet import cron
from controlplane.fleet.autoscale import (
    Autoscaler,
    Bounds,
    Cause,
    Decision,
    ScalePolicy,
    Signals,
    Window,
)
from controlplane.fleet.demand import bucket_of
from controlplane.scheduling.types import Role

C, P, D = Role.COLOCATED, Role.PREFILL, Role.DECODE
ONE = ScalePolicy(bounds={C: Bounds(1, 10)})


def look(now: float, count: int, score: float | None, **more: Any) -> Signals:
    ready = more.pop("ready", count)
    return Signals(
        now=now, replicas={C: count}, ready={C: ready}, score={} if score is None else {C: score}, **more
    )


def play(
    policy: ScalePolicy, seconds: int, score: Any, count: int = 1, **more: Any
) -> tuple[int, list[Decision]]:
    """Looks every 2 s and follows each decision at once; work is shared among the executors."""
    scaler, seen = Autoscaler(), []
    for now in range(0, seconds, 2):
        load = score(now) if callable(score) else score
        decision = scaler.step(policy, look(float(now), count, load / max(count, 1), idle=0.0, **more))
        count = decision.wanted[C]
        seen.append(decision)
    return count, seen


def test_load_worth_four_executors_gets_four() -> None:
    count, _ = play(ONE, 200, 3.6)
    assert count == 4


def test_a_burst_is_met_within_the_panic_window_and_not_given_back_at_once() -> None:
    count, seen = play(ONE, 80, lambda now: 6.0 if 60 <= now < 70 else 0.5)
    assert max(d.wanted[C] for d in seen) >= 4 and any(d.panic for d in seen)
    assert count == max(d.wanted[C] for d in seen)


def test_fewer_only_after_they_have_sufficed_for_the_delay() -> None:
    policy = ScalePolicy(bounds={C: Bounds(1, 10)}, scale_down_delay=60, stable_window=20)
    _, seen = play(policy, 200, lambda now: 5.0 if now < 40 else 0.2)
    counts = [d.wanted[C] for d in seen]
    assert counts[19] >= 5 and counts[45] >= 5  # at 90 s still
    assert counts[-1] == 1


def test_a_starting_executor_is_not_idle() -> None:
    scaler = Autoscaler()
    for now in range(0, 600, 2):
        decision = scaler.step(ONE, look(float(now), 3, 0.0, ready=2, idle=0.0))
        assert decision.wanted[C] == 3


def test_missed_first_tokens_add_prefill_and_missed_tokens_add_decode() -> None:
    policy = ScalePolicy(bounds={P: Bounds(1, 4), D: Bounds(1, 4)}, ttft=0.5, tpot=0.05)
    slow, fast = {bucket_of(2.0): 20}, {bucket_of(0.01): 20}
    for ttft, tpot, grown, kept in ((slow, fast, P, D), (fast, {bucket_of(0.2): 20}, D, P)):
        signals = Signals(now=0.0, replicas={P: 1, D: 1}, ready={P: 1, D: 1}, score={P: 0.1, D: 0.1},
                          ttft=ttft, tpot=tpot, idle=0.0)  # fmt: skip
        decision = Autoscaler().step(policy, signals)
        assert decision.wanted[grown] == 2 and decision.wanted[kept] == 1
        assert decision.changes[0].cause is Cause.SLO


def slow_machine(tasks: Mapping[Role, int], **more: Any) -> Signals:
    """Steps four times as long as they should be, prompts that take seconds, every answer late."""
    late = {"ttft": {bucket_of(5.0): 5}, "tpot": {bucket_of(0.8): 5}}
    count = more.pop("replicas", {P: 1, D: 1})
    return Signals(replicas=count, ready=count, score={P: 6.0, D: 4.0}, tasks=tasks, idle=0.0, **late, **more)


def test_one_request_at_a_time_gets_no_second_executor_however_slow_it_is() -> None:
    policy = ScalePolicy(bounds={P: Bounds(1, 4), D: Bounds(1, 4)}, ttft=0.5, tpot=0.1)
    scaler = Autoscaler()
    for turn in range(120):  # it is in one, then in the other, and now and then two overlap
        tasks = {P: int(turn % 5 == 0), D: 1 + int(turn % 4 == 3)}
        decision = scaler.step(policy, slow_machine(tasks, now=2.0 * turn))
        assert decision.changes == ()


def test_as_many_executors_as_there_are_tasks_to_share() -> None:
    policy = ScalePolicy(bounds={P: Bounds(1, 8), D: Bounds(1, 8)}, ttft=0.5, tpot=0.1)
    scaler, counts = Autoscaler(), {P: 1, D: 1}
    for turn in range(60):
        decision = scaler.step(policy, slow_machine({P: 2, D: 3}, now=2.0 * turn, replicas=counts))
        counts = dict(decision.wanted)
    assert counts == {P: 2, D: 3}


def test_executors_that_late_answers_do_not_need_stay_and_others_go() -> None:
    policy = ScalePolicy(bounds={P: Bounds(1, 4), D: Bounds(1, 4)}, scale_down_delay=20, stable_window=10)
    for slo, left in ((0.1, 4), (None, 1)):
        scaler, counts = Autoscaler(), {P: 1, D: 4}
        for turn in range(60):
            signals = slow_machine({P: 0, D: 1}, now=2.0 * turn, replicas=counts)
            counts = dict(scaler.step(dataclasses.replace(policy, tpot=slo), signals).wanted)
        assert counts[D] == left


def test_a_full_cache_adds_executors_for_few_tasks_too() -> None:
    policy = ScalePolicy(bounds={D: Bounds(1, 4), P: Bounds(1, 4)})
    signals = Signals(now=0.0, replicas={P: 1, D: 1}, ready={P: 1, D: 1}, score={P: 0.0, D: 1.3},
                      tasks={D: 1}, kv={D: 1.3}, idle=0.0)  # fmt: skip
    assert Autoscaler().step(policy, signals).wanted == {P: 1, D: 2}


def test_few_answers_say_nothing_about_a_share() -> None:
    policy = ScalePolicy(bounds={C: Bounds(1, 4)}, ttft=0.5)
    decision = Autoscaler().step(policy, look(0.0, 1, 0.1, ttft={bucket_of(2.0): 3}, idle=0.0))
    assert decision.changes == ()


def test_idle_long_enough_goes_to_zero_unless_somebody_waits_or_runs() -> None:
    policy = ScalePolicy(bounds={C: Bounds(0, 4)}, scale_to_zero_after=300)
    assert Autoscaler().step(policy, look(0.0, 2, 0.0, idle=301.0)).wanted == {C: 0}
    for more in ({"idle": 299.0}, {"idle": 400.0, "held": 1}, {"idle": 400.0, "running": 1}, {"idle": None}):
        assert Autoscaler().step(policy, look(0.0, 2, 0.0, **more)).wanted[C] >= 1
    assert Autoscaler().step(policy, look(0.0, 0, None, idle=1.0)).changes == ()  # 0 -> 1 is the activator's


def test_zero_load_is_a_signal() -> None:
    policy = ScalePolicy(bounds={C: Bounds(1, 10)}, scale_down_delay=20, stable_window=10)
    count, seen = play(policy, 100, 0.0, count=5)
    assert count == 1 and all(d.signals for d in seen)


def test_without_reports_nothing_changes() -> None:
    scaler = Autoscaler()
    for now in range(0, 400, 2):
        decision = scaler.step(ONE, look(float(now), 3, None, idle=0.0))
        assert decision.changes == () and not decision.signals


def test_a_schedule_raises_the_minimum_while_it_lasts() -> None:
    monday = datetime(2026, 3, 2, 9, 30, tzinfo=UTC).timestamp()
    window = Window("office", cron.parse("0 9 * * mon-fri"), 3600.0, {C: 3})
    policy = ScalePolicy(bounds={C: Bounds(0, 5)}, schedules=(window,))
    assert Autoscaler().step(policy, look(monday, 0, None, idle=None)).wanted == {C: 3}
    assert Autoscaler().step(policy, look(monday + 7200, 0, None, idle=None)).wanted == {C: 0}


roles = st.sampled_from([(C,), (P, D), (C, P, D)])


@settings(max_examples=200, deadline=None)
@given(
    roles,
    st.lists(
        st.tuples(st.floats(0, 20), st.floats(0, 20), st.integers(0, 40), st.booleans(), st.integers(0, 3)),
        min_size=1, max_size=30,
    ),
    st.integers(0, 3), st.integers(1, 9), st.floats(0.2, 1.0), st.floats(1.0, 5.0),
    st.sampled_from([0.0, 10.0]),
)  # fmt: skip
def test_counts_stay_within_bounds_and_ratio_whatever_happens(
    shape: tuple[Role, ...],
    looks: list[tuple[float, float, int, bool, int]],
    least: int,
    most: int,
    low: float,
    high: float,
    zero: float,
) -> None:
    most = max(least, most)
    policy = ScalePolicy(
        bounds={role: Bounds(0 if zero else least, most) for role in shape},
        ttft=0.5, tpot=0.05, ratio_min=low, ratio_max=high, scale_to_zero_after=zero, scale_down_delay=10,
        stable_window=20,
    )  # fmt: skip
    scaler = Autoscaler()
    counts: Mapping[Role, int] = {role: max(least, 1) for role in shape}
    for number, (first, second, missed, starting, idle) in enumerate(looks):
        signals = Signals(
            now=2.0 * number, replicas=counts,
            ready={role: max(0, count - starting) for role, count in counts.items()},
            score={role: first if role is not D else second for role in shape},
            ttft={bucket_of(2.0): missed}, tpot={bucket_of(0.2): missed}, idle=10.0 * idle,
        )  # fmt: skip
        decision = scaler.step(policy, signals)
        for role, count in decision.wanted.items():
            assert 0 <= count <= most
            assert count >= (0 if zero else max(least, 1)) or count >= counts[role]
            rate = max(counts[role] + 1, int(counts[role] * policy.max_scale_up_rate), least)
            partner = max(decision.wanted.values())
            assert count <= max(rate, int(partner / low) + 1, int(partner * high) + 1)
        assert {c.role for c in decision.changes} == {r for r in shape if decision.wanted[r] != counts[r]}
        zeros = {count == 0 for count in decision.wanted.values()}
        assert len(zeros) == 1 or not zero or 0 in counts.values()
        counts = decision.wanted


@pytest.mark.parametrize(
    ("text", "when", "open_"),
    [
        ("0 9 * * *", (2026, 3, 3, 9, 0), True),
        ("0 9 * * *", (2026, 3, 3, 8, 59), False),
        ("0 9 * * *", (2026, 3, 3, 10, 0), False),
        ("*/15 8-9 * * *", (2026, 3, 3, 7, 59), False),
        ("0 23 * * sun", (2026, 3, 2, 0, 0), False),  # its hour is over at midnight
        ("30 23 * * sun", (2026, 3, 2, 0, 15), True),  # and reaches into Monday
        ("0 9 1 * mon", (2026, 3, 2, 9, 10), True),  # a Monday, or the first
        ("0 9 1 * mon", (2026, 4, 1, 9, 10), True),
        ("0 9 1 * mon", (2026, 4, 2, 9, 10), False),
        ("0 9 * jan-feb *", (2026, 3, 3, 9, 10), False),
        ("0 9 * * 7", (2026, 3, 1, 9, 10), True),
    ],
)
def test_a_window_is_open_for_its_duration(text: str, when: tuple[int, ...], open_: bool) -> None:
    now = datetime(*when, tzinfo=UTC).timestamp()  # type: ignore[arg-type,misc]  # five numbers
    assert (cron.parse(text).open_since(now, 3600.0) is not None) is open_


def test_zones_and_summer_time() -> None:
    berlin = cron.parse("30 2 * * *", "Europe/Berlin")  # left out on 29 March 2026
    assert berlin.open_since(datetime(2026, 3, 29, 0, 45, tzinfo=UTC).timestamp(), 3600.0) is None
    assert berlin.open_since(datetime(2026, 3, 28, 1, 45, tzinfo=UTC).timestamp(), 3600.0) is not None


@pytest.mark.parametrize(
    "text", ["* * * *", "60 * * * *", "* 24 * * *", "a * * * *", "*/0 * * * *", "5-1 * * * *"]
)
def test_what_is_no_cron_is_refused(text: str) -> None:
    with pytest.raises(cron.BadCron):
        cron.parse(text)


def test_an_unknown_zone_is_refused() -> None:
    with pytest.raises(cron.BadCron, match="time zone"):
        cron.parse("0 9 * * *", "Mars/Olympus")
