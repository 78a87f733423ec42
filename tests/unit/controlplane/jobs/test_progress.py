"""Each index once, whatever deltas arrive in whatever order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.jobs.progress import Gap, Progress

TRUTH = list(range(500, 540))


@given(
    deltas=st.lists(st.tuples(st.integers(1, 3), st.integers(0, len(TRUTH)), st.integers(0, 6)), max_size=80),
    switches=st.lists(st.integers(0, 79), max_size=3),
)
def test_the_output_is_always_a_prefix_of_the_truth(
    deltas: list[tuple[int, int, int]], switches: list[int]
) -> None:
    progress = Progress()
    progress.attempt = 1
    delivered: list[int] = []
    for number, (attempt, start, count) in enumerate(deltas):
        if number in switches:
            progress.attempt = min(progress.attempt + 1, 3)
        try:
            fresh = progress.accept(attempt, start, TRUTH[start : start + count])
        except Gap:
            assert start > len(delivered)
            continue
        if fresh is not None:
            assert attempt == progress.attempt
            delivered += fresh.tokens
        assert delivered == progress.output == TRUTH[: len(delivered)]


def test_overlaps_are_cut_and_counted() -> None:
    progress = Progress()
    progress.attempt = 1
    progress.accept(1, 0, [1, 2, 3])
    fresh = progress.accept(1, 1, [2, 3, 4])
    assert fresh is not None and (fresh.skip, fresh.tokens) == (2, [4])


def test_without_a_current_attempt_nothing_is_taken() -> None:
    progress = Progress()
    assert progress.accept(0, 0, [1]) is None
    assert progress.output == []


def test_a_gap_takes_nothing_with_or_without_tokens() -> None:
    progress = Progress()
    progress.attempt = 1
    with pytest.raises(Gap):
        progress.accept(1, 2, [3])
    with pytest.raises(Gap):  # a finish: the tokens before it were lost
        progress.accept(1, 7, [])
    assert progress.output == []
    assert progress.accept(1, 0, []) is not None
