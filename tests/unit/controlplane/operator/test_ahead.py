"""Which weights warm pods hold ahead: chances, shares, and that nobody changes without need."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.operator.plan.ahead import HALF_LIFE_SECONDS, KEPT, SERVED, Outlook, assign, chance

KEYS = [("n", name) for name in "abcd"]


def outlook(name: str, **given: object) -> Outlook:
    return Outlook(**{"key": ("n", name), "room": 9, **given})  # type: ignore[arg-type]  # passed through


def test_chances_follow_use_schedules_and_names() -> None:
    assert chance(outlook("a")) == 0.0
    assert chance(outlook("a", idle=0.0)) == 1.0
    assert chance(outlook("a", idle=HALF_LIFE_SECONDS)) == pytest.approx(0.5)
    assert chance(outlook("a", idle=100 * HALF_LIFE_SECONDS)) == 0.0
    assert chance(outlook("a", idle=100 * HALF_LIFE_SECONDS, kept=True)) == KEPT
    assert chance(outlook("a", opens=True, idle=1e9)) == 1.0
    assert chance(outlook("a", idle=0.0, served=True)) == SERVED
    assert chance(outlook("a", idle=0.0, room=0)) == 0.0  # it has all the executors it may have
    assert chance(outlook("a", idle=-5.0)) == 1.0  # clocks differ


def test_pods_are_shared_out_by_chance() -> None:
    pods = [f"u{number}" for number in range(6)]
    found = assign([outlook("a", idle=0.0), outlook("b", idle=HALF_LIFE_SECONDS)], pods, {})
    assert Counter(found.values()) == {("n", "a"): 4, ("n", "b"): 2}
    assert found["u0"] == ("n", "a")  # the oldest pod is claimed first: it holds the likeliest
    assert assign([outlook("a", idle=0.0, room=1)], pods, {}) == {"u0": ("n", "a")}
    assert assign([], pods, {}) == assign([outlook("a")], pods, {}) == {}


outlooks = st.lists(
    st.builds(
        Outlook,
        key=st.sampled_from(KEYS),
        room=st.integers(0, 4),
        idle=st.none() | st.floats(0, 30_000),
        opens=st.booleans(),
        kept=st.booleans(),
        served=st.booleans(),
    ),
    max_size=4,
    unique_by=lambda one: one.key,
)
uids = st.lists(st.sampled_from([f"u{number}" for number in range(8)]), unique=True, max_size=8)


@given(outlooks, uids, st.dictionaries(st.sampled_from([f"u{n}" for n in range(8)]), st.sampled_from(KEYS)))
def test_nobody_changes_without_need_and_nobody_gets_more_than_it_may(
    told: list[Outlook], pods: list[str], held: dict[str, tuple[str, str]]
) -> None:
    found = assign(told, pods, held)
    counts = Counter(found.values())
    room = {one.key: one.room for one in told}
    assert set(found) <= set(pods)
    assert all(count <= room[key] for key, count in counts.items())
    possible = sum(one.room for one in told if chance(one) > 0)
    assert len(found) == min(len(pods), possible)
    assert assign(told, pods, found) == found
    for key, count in counts.items():  # as many as may keep what they hold do
        holders = sum(held.get(uid) == key for uid in pods)
        assert sum(held.get(uid) == key and found.get(uid) == key for uid in pods) == min(holders, count)
