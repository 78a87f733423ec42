"""The compiled CPU step against plain torch: ragged batches, threads, long contexts, every family, dtypes."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from flowserve.devices.native import library as native
from flowserve.devices.native.library import NativeLlama
from flowserve.engine.types import SamplingParams
from flowserve.executor.batch import RaggedBatch, flatten
from flowserve.executor.interface import SampleSpec, SequenceSlice
from flowserve.models.config import ModelConfig
from flowserve.models.llama import TorchLlama

BLOCK, MAX_LEN = 16, 4096
SPEC = SampleSpec(SamplingParams(), [1], [], 0)
KINDS: dict[str, tuple[torch.dtype, str]] = {
    "float32": (torch.float32, ""),
    "bfloat16": (torch.bfloat16, ""),
    "int8": (torch.float32, "int8"),
    "int4": (torch.float32, "int4"),
}
TOLERANCE = {"float32": 2e-4, "bfloat16": 0.1, "int8": 0.35, "int4": 0.35}
"""Logits of these models range over some units. In integer formats a value between two steps may fall to
either side, and whatever follows with it; one token alone is compared exactly below."""


class Random:
    """Weights from a name's hash: whole models without files."""

    def __init__(self, family: str, *, heads: int = 6, kv_heads: int = 2, tied: bool = True) -> None:
        self.config = ModelConfig(
            family=family,
            layers=2,
            hidden=96,
            intermediate=160,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=32,
            vocab_size=100,
            max_len=MAX_LEN,
            norm_epsilon=1e-6,
            rope_theta=1e4,
            rope_scaling=None,
            tied=tied,
            eos_token_ids=(2,),
        )
        q, kv, hidden, wide = heads * 32, kv_heads * 32, 96, 160
        self._shapes: dict[str, tuple[int, ...]] = {
            **dict.fromkeys(("attention_norm", "ffn_norm", "final_norm"), (hidden,)),
            **dict.fromkeys(("q_norm", "k_norm"), (32,)),
            **dict.fromkeys(("k", "v"), (kv, hidden)),
            **dict.fromkeys(("k_bias", "v_bias"), (kv,)),
            **dict.fromkeys(("embedding", "lm_head"), (100, hidden)),
            **dict.fromkeys(("gate", "up"), (wide, hidden)),
            "q": (q, hidden),
            "q_bias": (q,),
            "output": (hidden, q),
            "down": (hidden, wide),
        }

    def tensor(self, name: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        shape = self._shapes[name.rsplit(".", 1)[-1]]
        values = torch.randn(shape, generator=generator)
        return values / shape[-1] ** 0.5 if len(shape) > 1 else 1 + 0.2 * values


@contextmanager
def rounded_inputs() -> Iterator[None]:
    """Torch multiplies what integer formats do: activations in steps of a 127th of their block's peak."""
    multiply = functional.linear

    def linear(data: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        blocks = data.unflatten(-1, (-1, native.BLOCK))
        peak = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-30)
        return multiply((torch.round(blocks * (127 / peak)) * (peak / 127)).flatten(-2), weight)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "linear", linear)
        yield


def kept(matrix: torch.Tensor, form: int) -> torch.Tensor:
    """The matrix as the compiled step keeps it in a format."""
    rows, width = matrix.shape
    packed = native.PackedWeights(native.PackedWeights.bytes_for(form, rows, width))
    values = packed.unpacked(form, packed.add(form, matrix), rows, width)
    packed.release()
    return values


class Pair:
    """The same model twice, each with a pool of its own."""

    def __init__(self, source: Random, kind: str, threads: int, blocks: int) -> None:
        dtype, quantization = KINDS[kind]
        self.config = source.config
        self.native = NativeLlama(
            source,
            dtype=dtype,
            max_len=MAX_LEN,
            block_tokens=BLOCK,
            threads=threads,
            quantization=quantization,
        )
        self.torch = TorchLlama(source, dtype=torch.float32, device=torch.device("cpu"), max_len=MAX_LEN)
        for layer in self.torch._layers:  # the same rounded weights, multiplied in float32
            for name in ("qkv", "output", "gate_up", "down"):
                setattr(layer, name, kept(getattr(layer, name), self.native.weights_format))
        self.torch._lm_head = kept(self.torch._lm_head, self.native.head_format)
        if source.config.tied:
            self.torch._embedding = self.torch._lm_head
        else:
            self.torch._embedding = self.torch._embedding.to(dtype).float()
        shape = (blocks, source.config.layers, 2, source.config.kv_heads, BLOCK, 32)
        self.pages = [torch.zeros(shape, dtype=dtype) for _ in range(2)]
        self.tolerance = TOLERANCE[kind]
        self.quantized = bool(quantization)

    def step(self, batch: list[SequenceSlice]) -> None:
        ragged = flatten(batch, block_tokens=BLOCK, num_blocks=len(self.pages[0]), max_len=MAX_LEN)
        mine = self.native.forward(ragged, self.pages[0])
        with rounded_inputs() if self.quantized else nullcontext():
            theirs = self.torch.forward(ragged, self.pages[1])
        assert mine.shape == theirs.shape == (len(ragged.rows), self.config.vocab_size)
        if len(ragged.rows):
            assert (mine - theirs).abs().max() < self.tolerance
        rows = np.arange(len(ragged.ids), dtype=np.int32)[::3]
        with rounded_inputs() if self.quantized else nullcontext():
            later = (self.native.logits(rows) - self.torch.logits(rows)).abs().max()
        assert later < self.tolerance
        assert (self.pages[0].float() - self.pages[1].float()).abs().max() < self.tolerance

    def close(self) -> None:
        self.native.close()


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
