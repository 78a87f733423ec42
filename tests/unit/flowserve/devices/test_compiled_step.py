"""The compiled CPU step against plain torch: ragged batches, threads, long contexts, every family, dtypes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flowserve.devices.native import library as native
from flowserve.devices.native.library import NativeLlama
from flowserve.executor.batch import RaggedBatch, flatten
from flowserve.executor.interface import SequenceSlice
from tests.support.compiled_step import BLOCK, KINDS, SPEC, Pair, Random


def built() -> bool:
    try:
        return native.library() is not None
    except native.NativeUnavailable:
        return False


pytestmark = pytest.mark.skipif(not built(), reason="the compiled step is not built here")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "source",
    [
        Random("llama"),
        Random("qwen2", heads=4, kv_heads=4),
        Random("qwen3", heads=7, kv_heads=1),
        Random("llama", heads=24, kv_heads=1),
    ],
    ids=["llama", "qwen2, no groups", "qwen3, odd group", "one KV head"],
)
def test_ragged_batches_are_what_torch_computes(source: Random, kind: str, threads: int) -> None:
    """Random mixes of first chunks, later chunks and decodes, step after step on growing sequences."""
    pair = Pair(source, kind, threads, blocks=60)

    @given(st.lists(st.lists(st.integers(0, 23), min_size=5, max_size=5), min_size=1, max_size=5))
    @settings(max_examples=8, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    def play(plan: list[list[int]]) -> None:
        done = [0] * 5
        for counts in plan:
            batch = []
            for sequence, count in enumerate(counts):
                if count == 0:
                    continue
                tokens = [
                    (sequence * 31 + position * 7) % 100
                    for position in range(done[sequence], done[sequence] + count)
                ]
                table = [sequence + 5 * i for i in range(12)]
                batch.append(SequenceSlice(tokens, done[sequence], table, sample=SPEC if count % 3 else None))
                done[sequence] += count
            if batch:
                pair.step(batch)

    play()
    pair.close()


@pytest.mark.parametrize("kind", KINDS)
def test_one_token_is_computed_exactly(kind: str) -> None:
    pair = Pair(Random("llama"), kind, 1, blocks=2)
    pair.tolerance = min(pair.tolerance, 0.02)
    for token in range(20):
        pair.step([SequenceSlice([token], 0, [token % 2], sample=SPEC)])
    pair.close()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_tokens_numbers_do_not_depend_on_its_batch(kind: str, threads: int) -> None:
    """Every height of a tile and every number of tiles gives the same bits."""
    dtype, quantization = KINDS[kind]
    model = NativeLlama(
        Random("llama"),
        dtype=dtype,
        max_len=64,
        block_tokens=BLOCK,
        threads=threads,
        quantization=quantization,
    )

    def logits(tokens: list[int]) -> torch.Tensor:
        pages = torch.zeros(40, 2, 2, 2, BLOCK, 32, dtype=dtype)
        batch = [SequenceSlice([token], 0, [index], sample=SPEC) for index, token in enumerate(tokens)]
        return model.forward(flatten(batch, block_tokens=BLOCK, num_blocks=40, max_len=64), pages)

    alone = torch.cat([logits([token]) for token in range(32)])
    for count in (2, 3, 4, 5, 6, 7, 9, 11, 13, 25, 32):
        assert torch.equal(logits(list(range(count))), alone[:count])
    model.close()


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_long_contexts_split_over_threads_are_merged_exactly(threads: int) -> None:
    """Few sequences, thousands of keys: every thread takes a part of the keys."""
    pair = Pair(Random("llama"), "float32", threads, blocks=2 * 160)
    lengths = [2400, 511]
    tables = [list(range(160)), list(range(319, 159, -1))]
    tokens = [[(i * 13 + s) % 100 for i in range(length + 8)] for s, length in enumerate(lengths)]
    pair.step([SequenceSlice(tokens[s][: lengths[s]], 0, tables[s], sample=SPEC) for s in range(2)])
    for step in range(4):  # 511 becomes 512 and 513: the edge of a part
        pair.step(
            [
                SequenceSlice(
                    tokens[s][lengths[s] + step : lengths[s] + step + 1],
                    lengths[s] + step,
                    tables[s],
                    sample=SPEC,
                )
                for s in range(2)
            ]
        )
    pair.step([SequenceSlice(tokens[0][2404:2408], 2404, tables[0], sample=SPEC)])
    pair.close()


@pytest.mark.parametrize("kind", KINDS)
def test_an_untied_head_is_its_own_matrix(kind: str) -> None:
    pair = Pair(Random("llama", tied=False), kind, 2, blocks=4)
    pair.step([SequenceSlice(list(range(40)), 0, range(4), sample=SPEC)])
    pair.close()


def test_what_would_read_outside_of_memory_is_refused() -> None:
    model = NativeLlama(Random("llama"), dtype=torch.float32, max_len=64, block_tokens=BLOCK, threads=1)
    pages = torch.zeros(2, 2, 2, 2, BLOCK, 32)

    def batch(token: int) -> RaggedBatch:
        return flatten(
            [SequenceSlice([token], 0, [0], sample=SPEC)], block_tokens=BLOCK, num_blocks=2, max_len=64
        )

    with pytest.raises(ValueError, match="rows beyond the 0 tokens"):
        model.logits(np.zeros(1, np.int32))
    for token in (-1, 100):
        with pytest.raises(ValueError, match="outside the vocabulary"):
            model.forward(batch(token), pages)
    model.forward(batch(99), pages)
    with pytest.raises(ValueError, match="rows beyond the 1 tokens"):
        model.logits(np.array([1], np.int32))
    # More rows than the step had tokens: in turns.
    many = model.logits(np.zeros(5, np.int32))
    assert torch.equal(many[0], many[4])
    model.close()
    model.close()
    with pytest.raises(RuntimeError, match="closed"):
        model.forward(batch(1), pages)
    with pytest.raises(RuntimeError, match="closed"):
        model.logits(np.zeros(1, np.int32))
