"""What waits goes by band, share and deadline; what is dropped is the most of the lowest, with its reason."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.scheduling.admission import DropReason, FairQueue, Waiting

INF = float("inf")


def waiting(
    key: str, tenant: str = "a", band: int = 0, cost: float = 10, size: int = 1, **more: float
) -> Waiting:
    number = int(more.get("number", int(key[1:]) if key[1:].isdigit() else 0))
    return Waiting(key, tenant, band, cost, size, more.get("deadline", INF), number)


def order(queue: FairQueue) -> list[str]:
    return [item.key for item in queue]


def served(queue: FairQueue) -> list[Waiting]:
    """Serves everything, one after the other."""
    out = []
    while (head := queue.head()) is not None:
        queue.serve(head.key)
        out.append(head)
    return out


def test_higher_bands_go_first_and_deadlines_order_a_tenants_own() -> None:
    queue = FairQueue(10, 100)
    queue.push(waiting("k1"))
    queue.push(waiting("k2", deadline=5))
    queue.push(waiting("k3", deadline=3))
    queue.push(waiting("k4", band=1))
    assert order(queue) == ["k4", "k3", "k2", "k1"]


def test_tenants_share_by_cost_and_weight_not_by_requests() -> None:
    queue = FairQueue(1000, 10**6, weights={"heavy": 2.0})
    number = 0
    for tenant, cost, count in (("long", 100, 40), ("short", 10, 400), ("heavy", 50, 160)):
        for _ in range(count):
            number += 1
            queue.push(waiting(f"k{number}", tenant, cost=cost))
    got = dict.fromkeys(("long", "short", "heavy"), 0.0)
    while sum(got.values()) < 8000:
        head = queue.head()
        assert head is not None
        queue.serve(head.key)
        got[head.tenant] += head.cost
    assert got["long"] == pytest.approx(2000, rel=0.1)
    assert got["short"] == pytest.approx(2000, rel=0.1)
    assert got["heavy"] == pytest.approx(4000, rel=0.1)


def test_who_was_idle_has_saved_nothing_and_who_took_more_waits_longer() -> None:
    queue = FairQueue(100, 100)
    for _ in range(50):
        queue.charge("busy", 0, 10)
    for number in range(4):
        queue.push(waiting(f"k{number}", "busy" if number < 2 else "idle"))
    assert [item.tenant for item in served(queue)] in (
        ["idle", "busy", "idle", "busy"], ["idle", "idle", "busy", "busy"],
    )  # fmt: skip


def test_a_full_queue_drops_the_lowest_band_then_who_waits_with_most() -> None:
    queue = FairQueue(3, 100)
    for number, (tenant, band) in enumerate((("flood", 0), ("flood", 0), ("calm", 1))):
        assert queue.push(waiting(f"k{number}", tenant, band)).refused is None
    more = queue.push(waiting("k3", "flood"))
    assert (more.refused, more.evicted) == (DropReason.REJECTED_QUEUE_FULL, ())
    other = queue.push(waiting("k4", "quiet"))
    assert [(item.key, why) for item, why in other.evicted] == [("k1", DropReason.EVICTED_FOR_SHARE)]
    high = queue.push(waiting("k5", "flood", band=2))
    assert [why for _, why in high.evicted] == [DropReason.EVICTED_FOR_PRIORITY]
    assert len(queue) == 3


def test_bytes_bound_it_too_and_nobody_leaves_for_nothing() -> None:
    queue = FairQueue(10, 100)
    queue.push(waiting("k1", size=60, band=1))
    queue.push(waiting("k2", size=30))
    assert queue.push(waiting("k3", size=101, band=9)).refused is DropReason.REJECTED_QUEUE_BYTES
    refused = queue.push(waiting("k4", size=50, band=1))  # k2's room is not enough, and k1 is its equal
    assert refused.refused is DropReason.REJECTED_QUEUE_BYTES
    assert order(queue) == ["k1", "k2"]
    queue.put_back(waiting("k5", size=50))  # what was let in once is not lost
    assert queue.bytes == 140
    with pytest.raises(ValueError, match="already"):
        queue.push(waiting("k5"))


def test_weights_and_bounds_that_make_no_sense_are_refused() -> None:
    for bounds, weights in (((0, 1), None), ((1, 0), None), ((1, 1), {"a": 0.0})):
        with pytest.raises(ValueError):
            FairQueue(*bounds, weights)


items = st.tuples(
    st.sampled_from("abc"), st.integers(0, 2), st.integers(1, 50), st.integers(1, 30), st.integers(0, 5)
)


@given(st.lists(items, max_size=60), st.lists(st.integers(0, 2), max_size=120))
def test_everything_is_served_refused_or_evicted_once_within_the_bounds(
    arrivals: list[tuple[str, int, int, int, int]], moves: list[int]
) -> None:
    queue = FairQueue(8, 100)
    came, ended = 0, []
    turn = iter(moves)
    for tenant, band, cost, size, deadline in arrivals:
        came += 1
        item = Waiting(f"k{came}", tenant, band, cost, size, deadline, came)
        first = queue.head()
        behind = queue.before(item)
        pushed = queue.push(item)
        if pushed.refused is not None:
            ended.append(item.key)
        ended += [gone.key for gone, _ in pushed.evicted]
        assert all(gone.band <= item.band for gone, _ in pushed.evicted)
        if pushed.refused is None and not pushed.evicted and first is not None:
            assert (queue.head() is not item) == behind
        move = next(turn, 0)
        if move == 1 and (head := queue.head()) is not None:
            assert head.band == max(i.band for i in queue)
            queue.serve(head.key)
            ended.append(head.key)
        elif move == 2 and len(queue):
            last = order(queue)[-1]
            assert queue.remove(last) is not None
            assert queue.remove(last) is None
            ended.append(last)
        assert len(queue) <= 8 and queue.bytes <= 100
        assert queue.bytes == sum(i.size for i in queue)
    ended += [item.key for item in served(queue)]
    assert sorted(ended) == sorted(f"k{n + 1}" for n in range(came))
    assert queue.bytes == 0


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 100)), min_size=1, max_size=80))
def test_backlogged_tenants_never_drift_apart_by_more_than_two_requests(work: list[tuple[str, int]]) -> None:
    """Start-time fair queueing's bound: while both wait, what two got differs by a largest cost of each."""
    queue = FairQueue(100, 10**6)
    for number, (tenant, cost) in enumerate(work):
        queue.push(waiting(f"k{number}", tenant, cost=cost))
    most = max(cost for _, cost in work)
    got = dict.fromkeys("abcd", 0.0)
    left = {tenant: sum(1 for t, _ in work if t == tenant) for tenant in "abcd"}
    while (head := queue.head()) is not None:
        queue.serve(head.key)
        got[head.tenant] += head.cost
        left[head.tenant] -= 1
        waits = [got[tenant] for tenant, count in left.items() if count]
        if waits:
            assert max(waits) - min(waits) <= 2 * most


@given(st.lists(items, max_size=30))
def test_the_order_told_is_the_order_served(arrivals: list[tuple[str, int, int, int, int]]) -> None:
    queue = FairQueue(100, 10**6)
    for number, (tenant, band, cost, size, deadline) in enumerate(arrivals):
        queue.push(Waiting(f"k{number}", tenant, band, cost, size, deadline, number))
    told = order(queue)
    assert told == [item.key for item in served(queue)]
