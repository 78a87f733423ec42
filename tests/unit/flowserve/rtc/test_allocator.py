"""The free list against a naive set. Needs nothing."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowserve.rtc.allocator import BlockAllocator


def naive_runs(free: set[int]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for block in sorted(free):
        if runs and block == sum(runs[-1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((block, 1))
    return runs


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 40),
    st.lists(st.tuples(st.sampled_from(["take", "after", "give"]), st.integers(0, 50)), max_size=60),
)
def test_allocator_hands_out_each_block_once_and_keeps_runs_merged(
    size: int, steps: list[tuple[str, int]]
) -> None:
    allocator = BlockAllocator(size)
    free = set(range(size))
    used: list[int] = []
    for what, number in steps:
        if what == "take":
            got = allocator.take(number)
            assert (got is None) == (number > len(free))
            if got is not None:
                longest = max((length for _, length in naive_runs(free)), default=0)
                assert len(got) == len(set(got)) == number and set(got) <= free
                if 0 < number <= longest:
                    assert got == list(range(got[0], got[0] + number)), "one run would have held them"
                free -= set(got)
                used += got
        elif what == "after":
            before = used[number % len(used)] if used else -1
            block = allocator.take_after(before)
            assert (block is None) == (not free)
            if block is not None:
                assert block in free and (block == before + 1 or before + 1 not in free)
                free.discard(block)
                used.append(block)
        elif used:
            count = number % len(used) + 1
            back, used = used[:count], used[count:]
            allocator.give(back)
            free |= set(back)
        assert allocator.free == len(free)
        assert allocator.runs() == naive_runs(free)


def test_best_fit_takes_the_shortest_run_that_suffices() -> None:
    allocator = BlockAllocator(20)
    blocks = allocator.take(20)
    assert blocks is not None
    allocator.give([2, 3, 10, 11, 12, 16, 17, 18, 19])
    assert allocator.take(3) == [10, 11, 12]
    assert allocator.take(6) == [16, 17, 18, 19, 2, 3]
    assert allocator.take(1) is None


@pytest.mark.parametrize("block", [-1, 0, 4])
def test_freeing_what_is_free_or_foreign_is_refused(block: int) -> None:
    allocator = BlockAllocator(4)
    with pytest.raises(ValueError, match="not in use"):
        allocator.give([block])
