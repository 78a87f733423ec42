"""The segment allocator against a naive set. Needs nothing."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowserve.rtc.allocator import SegmentAllocator
from kvtransfer.runs import Run, blocks_of, runs_of


class Naive:
    """The same rules over a set, by looking at everything each time."""

    def __init__(self, size: int) -> None:
        self.free = set(range(size))

    def runs(self) -> list[Run]:
        return runs_of(sorted(self.free))

    def best_fit(self, count: int) -> Run | None:
        fitting = [run for run in self.runs() if run.count >= max(1, count)]
        return min(fitting, key=lambda run: (run.count, run.start), default=None)

    def take(self, count: int) -> list[Run] | None:
        if count > len(self.free):
            return None
        taken: list[Run] = []
        while count > 0:
            segment = self.best_fit(count) or max(self.runs(), key=lambda run: (run.count, -run.start))
            cut = Run(segment.start, min(segment.count, count))
            self.free -= set(blocks_of([cut]))
            taken.append(cut)
            count -= cut.count
        return taken


class Pair:
    """Both, in step, with what is taken."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.real, self.naive = SegmentAllocator(size), Naive(size)
        self.used: list[Run] = []

    def step(self, what: str, first: int, second: int) -> None:
        if what == "take":
            count = first % (self.size // 2 + 2)
            taken = self.real.take(count)
            assert taken == self.naive.take(count)
            self.used += taken or []
        elif what == "take_at":
            wanted = Run(first % self.size, second % 9 + 1)
            blocks = set(blocks_of([wanted]))
            if blocks <= self.naive.free:
                self.real.take_at(wanted.start, wanted.count)
                self.naive.free -= blocks
                self.used.append(wanted)
            else:
                with pytest.raises(ValueError, match="not all free"):
                    self.real.take_at(wanted.start, wanted.count)
        elif self.used:
            run = self.used.pop(first % len(self.used))
            cut = second % run.count + 1  # in two parts, so that neighbours merge from both sides
            for part in (Run(run.start + cut, run.count - cut), Run(run.start, cut)):
                if part.count:
                    self.real.give(part.start, part.count)
            self.naive.free |= set(blocks_of([run]))

    def compare(self) -> None:
        assert self.real.runs() == self.naive.runs()
        assert self.real.free == len(self.naive.free)
        assert self.real.longest == max((run.count for run in self.naive.runs()), default=0)
        assert sorted(blocks_of(self.used)) == sorted(set(range(self.size)) - self.naive.free)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 200),
    st.lists(
        st.tuples(st.sampled_from(["take", "take_at", "give"]), st.integers(0, 999), st.integers(0, 999)),
        max_size=60,
    ),
)
def test_no_block_is_lost_or_handed_out_twice_and_neighbours_are_merged(
    size: int, steps: list[tuple[str, int, int]]
) -> None:
    pair = Pair(size)
    for what, first, second in steps:
        pair.step(what, first, second)
        pair.compare()


@pytest.mark.parametrize(
    ("size", "steps", "seed"),
    [(70, 4_000, 1), (5_000, 400, 2), pytest.param(300, 2_000_000, 3, marks=pytest.mark.slow)],
)
@pytest.mark.timeout(1800)
def test_long_random_use_equals_the_naive_allocator(size: int, steps: int, seed: int) -> None:
    draw = random.Random(seed)
    pair = Pair(size)
    for step in range(steps):
        what = draw.choices(("take", "take_at", "give"), (2, 1, 3))[0]
        number = draw.randrange(12) if what == "take" else draw.randrange(10**6)
        pair.step(what, number, draw.randrange(10**6))
        if step % 500 == 0:
            pair.compare()
    pair.compare()


def test_best_fit_takes_the_shortest_segment_that_suffices() -> None:
    allocator = SegmentAllocator(20)
    assert allocator.take(20) == [Run(0, 20)]
    for start, count in ((2, 2), (10, 3), (16, 4)):
        allocator.give(start, count)
    assert allocator.take(3) == [Run(10, 3)]
    assert allocator.take(6) == [Run(16, 4), Run(2, 2)]
    assert allocator.take(1) is None and allocator.take(0) == []


@pytest.mark.parametrize(("start", "count"), [(-1, 1), (0, 1), (4, 1), (1, 2), (3, 2), (1, 0)])
def test_freeing_what_is_free_or_foreign_is_refused(start: int, count: int) -> None:
    allocator = SegmentAllocator(4)
    allocator.take_at(1, 1)
    with pytest.raises(ValueError, match="not in use"):
        allocator.give(start, count)
    assert allocator.runs() == [Run(0, 1), Run(2, 2)]


def test_stale_heap_entries_stay_bounded() -> None:
    allocator = SegmentAllocator(64)
    for _ in range(5_000):
        (run,) = allocator.take(2) or []
        allocator.give(run.start, run.count)
    assert sum(len(heap) for heap in allocator._starts.values()) < 200
