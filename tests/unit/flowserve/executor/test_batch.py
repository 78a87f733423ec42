"""Slices flattened into arrays, and slices that must never reach a kernel."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowserve.engine.types import SamplingParams
from flowserve.executor.batch import flatten
from flowserve.executor.interface import SampleSpec, SequenceSlice

BLOCK, BLOCKS, MAX_LEN = 4, 50, 64
SPEC = SampleSpec(SamplingParams(), [1], [], 0)


@st.composite
def slices(draw: st.DrawFn) -> SequenceSlice:
    start, count = draw(st.integers(0, 20)), draw(st.integers(1, 9))
    least = -(-(start + count) // BLOCK)
    table = draw(st.lists(st.integers(0, BLOCKS - 1), min_size=least, max_size=least + 3))
    tokens = draw(st.lists(st.integers(0, 99), min_size=count, max_size=count))
    return SequenceSlice(tokens, start, table, sample=draw(st.sampled_from([None, SPEC])))


@given(st.lists(slices(), min_size=1, max_size=8))
def test_every_token_keeps_its_position_its_block_and_its_turn(batch: list[SequenceSlice]) -> None:
    ragged = flatten(batch, block_tokens=BLOCK, num_blocks=BLOCKS, max_len=MAX_LEN)
    at = 0
    rows = []
    for index, item in enumerate(batch):
        count = len(item.tokens)
        assert ragged.first[index] == at and ragged.count[index] == count
        assert ragged.ids[at : at + count].tolist() == list(item.tokens)
        assert ragged.positions[at : at + count].tolist() == list(range(item.start, item.start + count))
        width = len(item.block_table)
        assert ragged.tables[index, :width].tolist() == list(item.block_table)
        at += count
        rows += [at - 1] if item.sample is not None else []
    assert len(ragged.ids) == at and ragged.rows.tolist() == rows
    assert {part.dtype for part in (ragged.ids, ragged.positions, ragged.tables, ragged.rows)} == {
        np.dtype(np.int32)
    }


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (SequenceSlice([], 0, [1]), "slice 1 covers"),
        (SequenceSlice([1], -1, [1]), "slice 1 covers"),
        (SequenceSlice([1, 2], 3, [1]), "its 1 blocks hold 4"),
        (SequenceSlice([1], 0, []), "its 0 blocks"),
        (SequenceSlice([1], MAX_LEN, [1] * 20), "model length 64"),
        (SequenceSlice([1], 0, [BLOCKS]), "outside the pool of 50"),
        (SequenceSlice([1], 0, [-1]), "outside the pool"),
    ],
)
def test_slices_outside_their_blocks_are_refused(item: SequenceSlice, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        flatten([SequenceSlice([5], 0, [0]), item], block_tokens=BLOCK, num_blocks=BLOCKS, max_len=MAX_LEN)
