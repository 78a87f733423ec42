"""Placement and eviction against brute force and a naive account of every block. Needs nothing."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowserve.rtc import placement as rules
from flowserve.rtc.placement import Placement
from kvtransfer.runs import runs_of


class Account:
    """A Placement with sets beside it that say where each block is."""

    def __init__(self, size: int, run_price: float = rules.RUN_PRICE) -> None:
        self.real = Placement(size, self.evict, run_price=run_price)
        self.size = size
        self.free, self.idle = set(range(size)), set[int]()
        self.tables: list[list[int]] = []
        self.evicted: set[int] = set()

    def evict(self, blocks: list[int]) -> None:
        assert set(blocks) <= self.idle, "only cached blocks that nobody refers to are evicted"
        self.evicted |= set(blocks)

    def _got(self, blocks: list[int]) -> None:
        assert len(blocks) == len(set(blocks)) and set(blocks) <= self.free | self.idle
        assert self.evicted == set(blocks) & self.idle, "exactly what is handed out is evicted"
        self.evicted.clear()
        self.free -= set(blocks)
        self.idle -= set(blocks)

    def longest_usable(self) -> int:
        return max((run.count for run in runs_of(sorted(self.free | self.idle))), default=0)

    def step(self, what: str, first: int, second: int) -> None:
        if what == "take":
            count = first % (self.size // 2 + 2)
            if count > len(self.free) + len(self.idle):
                with pytest.raises(ValueError, match="available"):
                    self.real.take(count)
                return
            table = self.real.take(count)
            assert len(table) == count
            self._got(table)
            if table:
                self.tables.append(table)
        elif what == "grow" and self.tables:
            table = self.tables[first % len(self.tables)]
            if not self.free | self.idle:
                with pytest.raises(ValueError, match="available"):
                    self.real.take_after(table[-1])
                return
            block = self.real.take_after(table[-1])
            self._got([block])
            table.append(block)
        elif what == "leave" and self.tables:
            table = self.tables.pop(first % len(self.tables))
            cached = second % (len(table) + 1)
            self.real.rest(table[:cached])
            self.real.release(table[cached:])
            self.idle |= set(table[:cached])
            self.free |= set(table[cached:])
        elif what == "revive" and self.idle:
            block = sorted(self.idle)[first % len(self.idle)]
            self.real.revive(block)
            self.idle.discard(block)
            self.tables.append([block])
        elif what == "forget" and self.idle:
            block = sorted(self.idle)[first % len(self.idle)]
            self.real.forget(block)
            self.idle.discard(block)
            self.free.add(block)

    def compare(self) -> None:
        assert self.real.idle_blocks() == sorted(self.idle) and self.real.idle == len(self.idle)
        assert [b for b in range(self.size) if self.real.is_free(b)] == sorted(self.free)
        assert self.real.free == len(self.free)
        assert self.real.available == len(self.free) + len(self.idle)
        for block in range(self.size):
            assert self.real.is_idle(block) == (block in self.idle)


STEPS = ("take", "grow", "leave", "revive", "forget")


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 120),
    st.lists(
        st.tuples(st.sampled_from(STEPS), st.integers(0, 999), st.integers(0, 999)), min_size=1, max_size=60
    ),
)
def test_every_block_is_in_one_state_and_only_what_is_handed_out_is_evicted(
    size: int, steps: list[tuple[str, int, int]]
) -> None:
    account = Account(size)
    for what, first, second in steps:
        account.step(what, first, second)
        account.compare()


@pytest.mark.parametrize(("size", "steps"), [(90, 3_000), pytest.param(400, 300_000, marks=pytest.mark.slow)])
@pytest.mark.timeout(2400)
def test_long_random_use_loses_no_block(size: int, steps: int) -> None:
    draw = random.Random(size)
    account = Account(size)
    for step in range(steps):
        what = draw.choices(STEPS, (4, 6, 4, 1, 0.2))[0]
        number = draw.randrange(size // 8) if what == "take" else draw.randrange(10**6)
        account.step(what, number, draw.randrange(10**6))
        if step % 500 == 0:
            account.compare()
    account.compare()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 30))
def test_one_run_is_found_wherever_there_is_one_if_calls_are_dear(seed: int, count: int) -> None:
    draw = random.Random(seed)
    account = Account(100, run_price=1e9)
    for _ in range(60):
        account.step(draw.choices(STEPS, (4, 6, 4, 1, 0.2))[0], draw.randrange(13), draw.randrange(10**6))
    possible = account.longest_usable() >= count
    if count <= account.real.available:
        assert (len(runs_of(account.real.take(count))) == 1) == possible


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 20))
def test_the_window_is_the_cheapest_one(seed: int, count: int) -> None:
    draw = random.Random(seed)
    account = Account(80)
    for _ in range(80):
        account.step(draw.choices(STEPS, (4, 6, 6, 1, 0.2))[0], draw.randrange(13), draw.randrange(10**6))
    real = account.real
    usable = account.free | account.idle
    costs = [
        sum(real._values[block] for block in range(start, start + count))
        for start in range(80 - count + 1)
        if set(range(start, start + count)) <= usable
    ]
    found = rules._View(real, 0, 80).window(count, fit_price=0.0)
    assert (found is None) == (not costs)
    if found is not None:
        assert found[0] == pytest.approx(min(costs), abs=1e-9)
        assert set(range(found[1].start, found[1].start + count)) <= usable


def fill(placement: Placement, count: int) -> list[int]:
    """Blocks computed, cached and let go."""
    table = placement.take(count)
    placement.rest(table)
    return table


def use(placement: Placement, table: list[int]) -> None:
    for block in table:
        placement.revive(block)
    placement.rest(table)


def quiet(blocks: list[int]) -> None:
    """Evictions that a test does not look at."""


def test_what_was_used_again_outlives_what_was_not() -> None:
    placement = Placement(60, quiet)
    popular = fill(placement, 20)
    use(placement, popular)
    fresh = [*fill(placement, 20), *fill(placement, 20)]
    assert set(placement.take(20)) | set(placement.take(20)) == set(fresh), "younger, but never used again"


def test_old_blocks_go_before_young_ones_and_tails_before_heads() -> None:
    placement = Placement(40, quiet, run_price=0.001)
    old, young = fill(placement, 20), fill(placement, 20)
    assert placement.take(10) == old[10:]
    assert placement.take(10) == old[:10]
    assert placement.take(10) == young[10:]


@pytest.mark.parametrize(("run_price", "runs"), [(0.05, 2), (5.0, 1)])
def test_a_second_run_is_weighed_against_the_hot_block_between(run_price: float, runs: int) -> None:
    placement = Placement(21, quiet, run_price=run_price)
    blocks = placement.take(21)
    placement.rest(blocks[10:11])
    use(placement, blocks[10:11])
    placement.rest(blocks[:10])
    placement.rest(blocks[11:])
    taken = placement.take(20)
    assert len(runs_of(sorted(taken))) == runs and (blocks[10] in taken) == (runs == 1)


def test_growth_of_many_tables_goes_into_one_small_gap() -> None:
    placement = Placement(64, quiet)
    table = placement.take(64)
    for start, count in ((10, 4), (30, 20)):
        placement.rest(table[start : start + count])
    assert [placement.take_after(block) for block in (0, 1, 2, 3)] == [10, 11, 12, 13]
    assert placement.take(20) == list(range(30, 50)), "the long gap stayed whole"


def test_large_pools_are_searched_in_parts_and_used_to_the_last_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rules, "SEARCH_BLOCKS", 64)
    account = Account(300)
    draw = random.Random(5)
    for _ in range(600):
        account.step(draw.choices(STEPS, (4, 6, 4, 1, 0.2))[0], draw.randrange(13), draw.randrange(10**6))
    account.compare()
    left = account.real.available
    account._got(account.real.take(left))
    assert account.real.available == 0 and not account.free | account.idle


def test_values_survive_any_number_of_blocks_handed_out() -> None:
    placement = Placement(8, quiet)
    for _ in range(2_000):
        fill(placement, 4)
    values = [value for value in placement._values if value]
    assert values and all(0 < value < float("inf") for value in values)
