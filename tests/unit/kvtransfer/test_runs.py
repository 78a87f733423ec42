"""Runs and alignment, against brute force (needs nothing)."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.runs import Run, align, blocks_of, runs_of

blocks = st.lists(st.integers(0, 30), max_size=40)


@given(blocks)
def test_runs_spell_their_blocks_and_are_maximal(ids: list[int]) -> None:
    runs = runs_of(ids)
    assert blocks_of(runs) == ids
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
