"""Runs and alignment, against brute force (needs nothing)."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.runs import Run, align, blocks_of, gather, runs_of, spelled

blocks = st.lists(st.integers(0, 30), max_size=40)


@given(blocks)
def test_runs_spell_their_blocks_and_are_maximal(ids: list[int]) -> None:
    runs = runs_of(ids)
    assert blocks_of(runs) == ids
    columns = np.array([(run.start, run.count) for run in runs], np.int64).reshape(-1, 2)
    assert spelled(columns[:, 0], columns[:, 1]) == ids
    assert all(a.start + a.count != b.start for a, b in itertools.pairwise(runs))


@given(st.permutations(range(24)), st.permutations(range(24)), st.integers(0, 24))
def test_moves_copy_every_pair_once_and_are_fewest(src: list[int], dst: list[int], size: int) -> None:
    src, dst = src[:size], dst[:size]
    moves = align(src, dst)
    copied = [(m.src + i, m.dst + i) for m in moves for i in range(m.count)]
    assert sorted(copied) == sorted(zip(src, dst, strict=True))
    # A move must end where the next pair of its diagonal is absent: the count of such ends is the minimum.
    pairs = set(zip(src, dst, strict=True))
    assert len(moves) == sum((s + 1, d + 1) not in pairs for s, d in pairs)


@given(blocks)
def test_one_source_may_feed_many_destinations(src: list[int]) -> None:
    dst = list(range(100, 100 + len(src)))
    copied = {m.dst + i: m.src + i for m in align(src, dst) for i in range(m.count)}
    assert copied == dict(zip(dst, src, strict=True))


def test_contiguous_on_both_sides_is_one_move() -> None:
    assert len(align(range(5, 500), range(1000, 1495))) == 1
    assert runs_of([4, 5, 6, 9]) == [Run(4, 3), Run(9, 1)]


def test_ambiguous_lists_are_refused() -> None:
    with pytest.raises(ValueError, match="twice"):
        align([1, 2], [3, 3])
    with pytest.raises(ValueError, match="2 source"):
        align([1, 2], [3])


@given(st.lists(st.integers(1, 40), min_size=1, max_size=9), st.floats(0, 50), st.floats(0, 5))
def test_gathering_takes_the_least_time_of_all_ways(counts: list[int], call: float, block: float) -> None:
    runs = [Run(100 * index, count) for index, count in enumerate(counts)]

    def seconds(plan: list[int]) -> float:
        total, at = 0.0, 0
        for part in plan:
            staged = sum(run.count for run in runs[at : at + part]) if part > 1 else 0
            total += call + staged * block
            at += part
        return total

    def plans(left: int) -> list[list[int]]:
        return [[first, *rest] for first in range(1, left + 1) for rest in plans(left - first)] or [[]]

    plan = gather(runs, call, block)
    assert sum(plan) == len(runs)
    assert seconds(plan) == pytest.approx(min(seconds(other) for other in plans(len(runs))))


def test_gathering_is_left_alone_where_copies_cost_more_than_calls() -> None:
    runs = [Run(0, 5), Run(10, 1), Run(20, 1), Run(30, 50)]
    assert gather(runs, call_seconds=1.0, block_seconds=10.0) == [1, 1, 1, 1]
    assert gather(runs, call_seconds=1.0, block_seconds=0.1) == [3, 1]
    assert gather(runs, call_seconds=1.0, block_seconds=0.0) == [4]
    assert gather([], 1.0, 1.0) == []
