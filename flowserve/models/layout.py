"""Where each weight of a model lies in one stretch of memory, from its shape alone.

Whoever writes the memory and whoever maps it agree without a table. `TorchLayout` is that of fused
matrices as torch multiplies them (`flowserve.models.llama`); the compiled CPU step has one of its own.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import torch

from flowserve.models.config import ModelConfig
from flowserve.models.weight_cache import CachedSource, Image
from flowserve.models.weights import WeightSource, checked, layer_weights, rotary

LINE = 64
"""Bytes of a cache line: where every weight begins."""


class Layout:
    """Names to offsets, in the order they are added."""

    def __init__(self) -> None:
        self.offsets: dict[str, int] = {}
        self.size = 0  # bytes

    def add(self, name: str, size: int) -> None:
        self.offsets[name] = self.size
        self.size += -(-size // LINE) * LINE


def copy_to(address: int, tensor: torch.Tensor) -> None:
    """The tensor's values to memory of at least its size."""
    data = tensor.contiguous()
    ctypes.memmove(address, data.data_ptr(), data.nbytes)


class TorchLayout(Layout):
    """Fused weights of one model and dtype: the names of `layer_weights` after `layers.<i>.`, `embedding`,
    `final_norm`, `lm_head` where it is another, and the rotary tables `cosines` and `sines`."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, max_len: int) -> None:
        super().__init__()
        self.config, self.dtype, self.max_len = config, dtype, max_len
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
        hidden, wide, vocab = config.hidden, config.intermediate, config.vocab_size
        for index in range(config.layers):
            layer = f"layers.{index}."
            self._tensor(layer + "attention_norm", torch.float32, hidden)
            self._tensor(layer + "qkv", dtype, q + 2 * kv, hidden)
            self._tensor(layer + "output", dtype, hidden, q)
            self._tensor(layer + "ffn_norm", torch.float32, hidden)
            self._tensor(layer + "gate_up", dtype, 2 * wide, hidden)
            self._tensor(layer + "down", dtype, hidden, wide)
            if config.qkv_bias:
                self._tensor(layer + "qkv_bias", torch.float32, q + 2 * kv)
            for name in ("q_norm", "k_norm") if config.qk_norm else ():
                self._tensor(layer + name, torch.float32, config.head_dim)
        self._tensor("embedding", dtype, vocab, hidden)
        self._tensor("final_norm", torch.float32, hidden)
        if not config.tied:
            self._tensor("lm_head", dtype, vocab, hidden)
        for name in ("cosines", "sines"):
            self._tensor(name, torch.float32, max_len, config.head_dim // 2)

    @property
    def form(self) -> str:
        """Names the bytes: two layouts of a model with the same name are the same."""
        return f"torch1-{str(self.dtype).removeprefix('torch.')}-{self.max_len}"

    def _tensor(self, name: str, dtype: torch.dtype, *shape: int) -> None:
        self.shapes[name], self.dtypes[name] = shape, dtype
        self.add(name, dtype.itemsize * torch.Size(shape).numel())

    def tensors(self, source: WeightSource) -> Iterator[tuple[str, torch.Tensor]]:
        """Every weight by name, one layer at a time. Raises BadWeights."""
        for index in range(self.config.layers):
            for name, tensor in layer_weights(source, index, self.dtype).items():
                yield f"layers.{index}.{name}", tensor
        for name in ("embedding", "final_norm", "lm_head"):
            if name in self.shapes:
                yield name, checked(source, name, self.shapes[name]).to(self.dtypes[name])
        yield from zip(("cosines", "sines"), rotary(source, self.max_len), strict=True)

    def fill(self, base: int, source: WeightSource) -> None:
        """Writes every weight to memory at `base`. Raises BadWeights."""
        for name, tensor in self.tensors(source):
            copy_to(base + self.offsets[name], tensor)

    def load(self, source: WeightSource) -> tuple[Iterator[tuple[str, torch.Tensor]], Image | None]:
        """Every weight by name, read as it is asked for, and the node's image that they are views of, where
        there is one: nobody may write to them, nor use them after it is closed. Raises BadWeights."""
        image = None
        if isinstance(source, CachedSource):
            image = source.image(self.form, self.size, lambda base: self.fill(base, source))
        if image is None:
            return self.tensors(source), None
        return (
            (name, image.tensor(self.offsets[name], shape, self.dtypes[name]))
            for name, shape in self.shapes.items()
        ), image
