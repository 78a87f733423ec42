"""Small random models for the compiled CPU step, each beside the same model in plain torch."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from torch.nn import functional

from flowserve.devices.native import library as native
from flowserve.devices.native.library import NativeLlama
from flowserve.engine.types import SamplingParams
from flowserve.executor.batch import flatten
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


def packed_and_back(matrix: torch.Tensor, form: int) -> torch.Tensor:
    """The matrix as the compiled step keeps it in a format."""
    rows, width = matrix.shape
    memory = native.PrivateMemory(native.packed_bytes(form, rows, width))
    native.pack(form, memory.base, matrix)
    values = native.unpack(form, memory.base, rows, width)
    memory.close()
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
                setattr(layer, name, packed_and_back(getattr(layer, name), self.native.layout.layers_format))
        self.torch._lm_head = packed_and_back(self.torch._lm_head, self.native.layout.head_format)
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
