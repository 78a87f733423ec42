"""GGUF files as a weight source.

Block formats follow ggml; the common ones are expanded here in a few vectorised steps, the others by
the `gguf` package. llama.cpp's converter interleaves the rotary halves of q and k for the
architecture `llama`; that is undone here, so that every model rotates halves.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from pathlib import Path

import gguf
import torch

from flowserve.models.config import ModelConfig, from_gguf
from flowserve.models.errors import BadWeights, UnsupportedModel
from flowserve.models.gguf_header import TensorEntry, read_header
from flowserve.models.weights import parts, refuse_unused

_LAYER_NAMES = {
    "attention_norm": "attn_norm.weight",
    "q": "attn_q.weight",
    "k": "attn_k.weight",
    "v": "attn_v.weight",
    "q_bias": "attn_q.bias",
    "k_bias": "attn_k.bias",
    "v_bias": "attn_v.bias",
    "q_norm": "attn_q_norm.weight",
    "k_norm": "attn_k_norm.weight",
    "output": "attn_output.weight",
    "ffn_norm": "ffn_norm.weight",
    "gate": "ffn_gate.weight",
    "up": "ffn_up.weight",
    "down": "ffn_down.weight",
}
_NAMES = {
    "embedding": "token_embd.weight",
    "final_norm": "output_norm.weight",
    "lm_head": "output.weight",
    "rope_factors": "rope_freqs.weight",
}


class GGUFSource:
    """An open GGUF file, memory-mapped; opening reads the header only."""

    def __init__(self, path: Path) -> None:
        """Raises BadWeights for a torn file, UnsupportedModel for a model that is not implemented."""
        self.path = path
        try:
            with path.open("rb") as file:
                self._file = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise BadWeights(f"{path} cannot be read: {error}") from error
        try:
            header = read_header(memoryview(self._file))
        except (BadWeights, UnsupportedModel) as error:
            raise type(error)(f"{path}: {error}") from error
        self._tensors = header.tensors
        self._config = from_gguf(header.fields, frozenset(header.tensors))
        layers = range(self._config.layers)
        used = {f"blk.{i}.{_LAYER_NAMES[part]}" for i in layers for part in parts(self._config)}
        refuse_unused(str(path), self._tensors, used.union(_NAMES.values()))

    @property
    def config(self) -> ModelConfig:
        return self._config

    def tensor(self, name: str) -> torch.Tensor:
        if name in _NAMES:
            key, part = _NAMES[name], name
        else:
            _, index, part = name.split(".")
            key = f"blk.{index}.{_LAYER_NAMES[part]}"
        entry = self._tensors.get(key)
        if entry is None:
            raise BadWeights(f"{self.path} has no tensor {key}")
        tensor = self._expand(entry)
        if self._config.family == "llama" and part in ("q", "k"):
            tensor = _unpermute(tensor, self._config.heads if part == "q" else self._config.kv_heads)
        return tensor

    def _expand(self, entry: TensorEntry) -> torch.Tensor:
        """The tensor as float32 of its own: nothing refers to the mapped file afterwards."""
        try:
            kind = gguf.GGMLQuantizationType(entry.kind)
            per_block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError) as error:
            raise UnsupportedModel(f"{entry.name} has the unknown type {entry.kind}") from error
        count = 1
        for size in entry.shape:
            count *= size
        size = count // per_block * block_bytes
        if count % per_block or entry.offset + size > len(self._file):
            raise BadWeights(f"{self.path} is truncated: {entry.name} ends beyond the file")
        raw = torch.frombuffer(bytearray(self._file[entry.offset : entry.offset + size]), dtype=torch.uint8)
        expand = _EXPAND.get(kind.name)
        if expand is not None:
            return expand(raw.view(-1, block_bytes)).reshape(entry.shape)
        try:
            rows = raw.numpy().reshape(*entry.shape[:-1], -1)
            return torch.from_numpy(gguf.dequantize(rows, kind)).float().reshape(entry.shape)
        except NotImplementedError as error:
            raise UnsupportedModel(
                f"{entry.name} is quantized as {kind.name}, which cannot be read"
            ) from error


def _plain(dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda blocks: blocks.view(dtype).float()


def _halves(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """The float16 at byte `at` of each block, as a float32 column."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(blocks: torch.Tensor) -> torch.Tensor:
    """16 bytes to 32 values: low nibbles first."""
    values = torch.empty(len(blocks), 32)
    values[:, :16] = blocks & 15
    values[:, 16:] = blocks >> 4
    return values


_EXPAND: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "F32": _plain(torch.float32),
    "F16": _plain(torch.float16),
    "BF16": _plain(torch.bfloat16),
    "Q8_0": lambda b: b[:, 2:].view(torch.int8).float().mul_(_halves(b, 0)),
    "Q4_0": lambda b: _nibbles(b[:, 2:]).sub_(8).mul_(_halves(b, 0)),
    "Q4_1": lambda b: _nibbles(b[:, 4:]).mul_(_halves(b, 0)).add_(_halves(b, 2)),
}


def _unpermute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head from interleaved pairs back to two halves."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)
