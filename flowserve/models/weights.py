"""Weights by canonical name, whatever file they come from.

Canonical names: `embedding`, `final_norm`, `lm_head`, and per layer `layers.<i>.` + `attention_norm`,
`q`, `k`, `v`, `q_bias`, `k_bias`, `v_bias`, `q_norm`, `k_norm`, `output`, `ffn_norm`, `gate`, `up`,
`down`; where `config.rope_factors` says so, `rope_factors` [head_dim / 2] too. Matrices are `[out, in]`,
rotary halves in Hugging Face's order (first half, second half).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch

from flowserve.models.config import ModelConfig
from flowserve.models.errors import BadWeights, UnsupportedModel
from flowserve.models.rope import rotary_tables


class WeightSource(Protocol):
    """An open model file or folder. Reading a tensor may dequantize it; nothing is kept."""

    @property
    def config(self) -> ModelConfig: ...

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor of a canonical name, in the file's precision (dequantized ones in float32).

        Raises BadWeights where it is missing or torn.
        """
        ...


def checked(source: WeightSource, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of exactly `shape`, or BadWeights."""
    tensor = source.tensor(name)
    if tuple(tensor.shape) != shape:
        raise BadWeights(f"tensor {name} has shape {list(tensor.shape)}, {list(shape)} expected")
    return tensor


def rotary(source: WeightSource, max_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the model's positions, float32 `[max_len, head_dim / 2]` each."""
    config = source.config
    divisors = None
    if config.rope_factors:
        divisors = checked(source, "rope_factors", (config.head_dim // 2,)).float()
        if not bool((divisors > 0).all()):
            raise BadWeights("rope_factors must be positive")
    return rotary_tables(config, max_len, divisors)


def refuse_unused(source_name: str, present: Iterable[str], used: Iterable[str]) -> None:
    """Raises UnsupportedModel where a file holds weights that the model code would not use.

    A tensor that is left out changes what the model says, silently: better no answer than a wrong one.
    """
    unused = sorted(set(present) - set(used))
    if unused:
        more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
        raise UnsupportedModel(
            f"{source_name} holds tensors this architecture has no use for: {', '.join(unused[:3])}{more}"
        )


def parts(config: ModelConfig) -> list[str]:
    """Canonical names, without `layers.<i>.`, of the tensors every layer of the model has."""
    names = ["attention_norm", "q", "k", "v", "output", "ffn_norm", "gate", "up", "down"]
    names += ["q_bias", "k_bias", "v_bias"] if config.qkv_bias else []
    return names + (["q_norm", "k_norm"] if config.qk_norm else [])


def layer_weights(source: WeightSource, index: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """One layer, fused: `qkv` [(heads + 2 kv_heads) * head_dim, hidden], `gate_up` [2 * intermediate, hidden]
    (gate rows first), `output`, `down` in `dtype`; norms and `qkv_bias` in float32 (they are small and
    feed sums)."""
    config = source.config
    q_rows, kv_rows = config.heads * config.head_dim, config.kv_heads * config.head_dim
    hidden, wide = config.hidden, config.intermediate

    def get(name: str, *shape: int) -> torch.Tensor:
        return checked(source, f"layers.{index}.{name}", shape)

    def fuse(parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([part.to(dtype) for part in parts])

    weights = {
        "attention_norm": get("attention_norm", hidden).float(),
        "qkv": fuse([get("q", q_rows, hidden), get("k", kv_rows, hidden), get("v", kv_rows, hidden)]),
        "output": get("output", hidden, q_rows).to(dtype),
        "ffn_norm": get("ffn_norm", hidden).float(),
        "gate_up": fuse([get("gate", wide, hidden), get("up", wide, hidden)]),
        "down": get("down", hidden, wide).to(dtype),
    }
    if config.qkv_bias:
        biases = [get("q_bias", q_rows), get("k_bias", kv_rows), get("v_bias", kv_rows)]
        weights["qkv_bias"] = torch.cat([bias.float() for bias in biases])
    if config.qk_norm:
        weights["q_norm"] = get("q_norm", config.head_dim).float()
        weights["k_norm"] = get("k_norm", config.head_dim).float()
    return weights
