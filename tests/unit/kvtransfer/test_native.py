"""The compiled copy against numpy's, piece by piece, at every size and alignment that matters."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer import native
from kvtransfer.native import Stop, copy_pieces, populate_read

SIZE = 3 << 20


@pytest.fixture(params=["compiled", "numpy"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "numpy":
        monkeypatch.setattr(native, "_library", lambda: None)
    elif not native.available():
        pytest.skip("no compiled copy here")
    return str(request.param)


@given(
    st.lists(
        st.tuples(
            st.integers(0, SIZE - 1),
            st.integers(0, SIZE - 1),
            st.one_of(st.integers(0, 200), st.integers(4000, 70_000), st.just(1 << 20)),
        ),
        max_size=12,
    )
)
@settings(max_examples=60, deadline=None)
def test_pieces_land_where_they_should_and_nowhere_else(pieces: list[tuple[int, int, int]]) -> None:
    source = np.random.default_rng(1).integers(0, 256, SIZE, np.uint8)
    rows = [(a, b, min(n, SIZE - a, SIZE - b)) for a, b, n in pieces]
    expected = np.zeros(SIZE, np.uint8)
    for a, b, n in rows:
        expected[b : b + n] = source[a : a + n]
    target = np.zeros(SIZE, np.uint8)
    copied = copy_pieces(target.data, source.data, np.array(rows, np.int64).reshape(-1, 3), Stop())
    assert copied == sum(n for _, _, n in rows)
    assert (target == expected).all()


def test_a_copy_that_is_stopped_ends_early(way: str) -> None:
    source, target = np.ones(32 << 20, np.uint8), np.zeros(32 << 20, np.uint8)
    stop = Stop()
    stop.set()
    copied = copy_pieces(target.data, source.data, np.array([[0, 0, 32 << 20]], np.int64), stop)
    assert copied <= 8 << 20
    assert not target[copied:].any()


@pytest.mark.parametrize("piece", [(0, 1, 100), (1, 0, 100), (-1, 0, 10), (0, 0, -1), (0, 0, 1 << 62)])
def test_a_piece_outside_its_buffer_is_refused(way: str, piece: tuple[int, int, int]) -> None:
    source, target = np.ones(100, np.uint8), np.zeros(100, np.uint8)
    with pytest.raises(ValueError, match="outside"):
        copy_pieces(target.data, source.data, np.array([piece], np.int64), Stop())
    assert not target.any()


def test_memory_that_is_mapped_in_reads_as_before() -> None:
    data = np.arange(100_000, dtype=np.uint8)
    populate_read(data.data)
    populate_read(data[:0].data)
    assert (data == np.arange(100_000, dtype=np.uint8)).all()
