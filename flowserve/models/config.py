"""Shape of a model, read from GGUF metadata or a Hugging Face `config.json`.

One record for the Llama family: Llama 2/3.x and SmolLM2, Qwen2 (biased q/k/v), Qwen3 dense (normed q
and k). Their differences are fields, not classes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowserve.models.errors import BadWeights, ModelError, ModelNotFound, UnsupportedModel

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
"""Hugging Face class to family. Mistral is here for its full-attention releases; a window is refused."""

GGUF_ARCHITECTURES = ("llama", "qwen2", "qwen3")


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Stretching of the rotary frequencies; `kind` is "linear" or "llama3" (as released with Llama 3.1)."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_len: int = 8192  # tokens


@dataclass(frozen=True, slots=True)
class ModelConfig:
    family: str  # "llama" | "qwen2" | "qwen3"
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_len: int  # tokens
    norm_epsilon: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tied: bool  # lm_head is the embedding
    eos_token_ids: tuple[int, ...]
    rope_factors: bool = (
        False  # the weights hold a divisor for every rotary frequency (GGUF's Llama 3.1 scaling)
    )

    @property
    def qkv_bias(self) -> bool:
        return self.family == "qwen2"

    @property
    def qk_norm(self) -> bool:
        return self.family == "qwen3"

    def __post_init__(self) -> None:
        for name in (
            "layers",
            "hidden",
            "intermediate",
            "heads",
            "kv_heads",
            "head_dim",
            "vocab_size",
            "max_len",
        ):
            if getattr(self, name) < 1:
                raise BadWeights(f"{name} must be positive, is {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise BadWeights(f"{self.heads} query heads are no multiple of {self.kv_heads} KV heads")


def from_hf(folder: Path) -> ModelConfig:
    """Reads `config.json` (and `generation_config.json` for end tokens) of a model folder."""
    data = _read_json(folder / "config.json")
    names = data.get("architectures") or [str(data.get("model_type"))]
    family = next((ARCHITECTURES[name] for name in names if name in ARCHITECTURES), None)
    if family is None:
        known = ", ".join(sorted(ARCHITECTURES))
        raise UnsupportedModel(f"architecture {', '.join(names)} is not implemented; implemented are {known}")
    window = data.get("sliding_window")
    if window and data.get("use_sliding_window", family == "llama"):
        raise UnsupportedModel("sliding-window attention is not implemented")
    _refuse_options(data, family)
    try:
        heads = int(data["num_attention_heads"])
        hidden = int(data["hidden_size"])
        rope = data.get("rope_parameters") or data.get("rope_scaling") or {}
        return ModelConfig(
            family=family,
            layers=int(data["num_hidden_layers"]),
            hidden=hidden,
            intermediate=int(data["intermediate_size"]),
            heads=heads,
            kv_heads=int(data.get("num_key_value_heads") or heads),
            head_dim=int(data.get("head_dim") or hidden // heads),
            vocab_size=int(data["vocab_size"]),
            max_len=int(data["max_position_embeddings"]),
            norm_epsilon=float(data.get("rms_norm_eps", 1e-6)),
            rope_theta=float(rope.get("rope_theta") or data.get("rope_theta") or 10000.0),
            rope_scaling=_hf_scaling(rope),
            tied=bool(data.get("tie_word_embeddings", False)),
            eos_token_ids=_hf_end_tokens(folder, data),
        )
    except KeyError as error:
        raise BadWeights(f"{folder / 'config.json'} lacks {error}") from error
    except (TypeError, ValueError, ArithmeticError) as error:
        if isinstance(error, ModelError):
            raise
        raise BadWeights(f"{folder / 'config.json'} has a value of a wrong kind: {error}") from error


def _refuse_options(data: Mapping[str, Any], family: str) -> None:
    """Options that would change the computation and are not implemented: refused, never ignored."""
    if data.get("attention_bias") and family != "qwen2":
        raise UnsupportedModel("attention_bias is implemented for Qwen2 only")
    if data.get("mlp_bias"):
        raise UnsupportedModel("mlp_bias is not implemented")
    if data.get("hidden_act", "silu") != "silu":
        raise UnsupportedModel(f"activation {data['hidden_act']!r} is not implemented; implemented is silu")
    if data.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModel("rotary embedding over a part of the head is not implemented")
    if data.get("quantization_config"):
        kind = data["quantization_config"]
        method = kind.get("quant_method") if isinstance(kind, dict) else kind
        raise UnsupportedModel(f"weights quantized by {method!r} are not implemented: use the model in bf16")


def _hf_scaling(rope: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", float(rope["factor"]))
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            float(rope["factor"]),
            float(rope["low_freq_factor"]),
            float(rope["high_freq_factor"]),
            int(rope["original_max_position_embeddings"]),
        )
    raise UnsupportedModel(f"rope scaling {kind!r} is not implemented; implemented are linear and llama3")


def _hf_end_tokens(folder: Path, data: Mapping[str, Any]) -> tuple[int, ...]:
    """End tokens of `generation_config.json` where it has any (chat models end turns there)."""
    generation = folder / "generation_config.json"
    sources: list[Any] = [_read_json(generation).get("eos_token_id")] if generation.exists() else []
    for value in [*sources, data.get("eos_token_id")]:
        if value is not None:
            return tuple(dict.fromkeys(int(v) for v in (value if isinstance(value, list) else [value])))
    return ()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ModelNotFound(f"{path} does not exist") from error
    except ValueError as error:
        raise BadWeights(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise BadWeights(f"{path} is not a JSON object")
    return data


def from_gguf(fields: Mapping[str, Any], tensors: frozenset[str]) -> ModelConfig:
    """Reads GGUF metadata (`fields`: key to value). `tensors` are the names in the file."""
    family = str(fields.get("general.architecture"))
    if family not in GGUF_ARCHITECTURES:
        known = ", ".join(GGUF_ARCHITECTURES)
        raise UnsupportedModel(f"GGUF architecture {family!r} is not implemented; implemented are {known}")

    def get(name: str, default: Any = None) -> Any:
        value = fields.get(f"{family}.{name}", default)
        if value is None:
            raise BadWeights(f"GGUF metadata lacks {family}.{name}")
        if not isinstance(value, int | float):
            raise UnsupportedModel(f"GGUF metadata {family}.{name} is no number: layers of unequal shape?")
        return value

    if get("attention.sliding_window", 0):
        raise UnsupportedModel("sliding-window attention is not implemented")
    if get("expert_count", 0):
        raise UnsupportedModel("mixture-of-experts models are not implemented")
    heads = int(get("attention.head_count"))
    hidden = int(get("embedding_length"))
    head_dim = int(get("attention.key_length", hidden // max(heads, 1)))
    if int(get("rope.dimension_count", head_dim)) != head_dim:
        raise UnsupportedModel("rotary embedding over a part of the head is not implemented")
    return ModelConfig(
        family=family,
        layers=int(get("block_count")),
        hidden=hidden,
        intermediate=int(get("feed_forward_length")),
        heads=heads,
        kv_heads=int(get("attention.head_count_kv", heads)),
        head_dim=head_dim,
        vocab_size=int(get("vocab_size", len(fields.get("tokenizer.ggml.tokens", ())))),
        max_len=int(get("context_length")),
        norm_epsilon=float(get("attention.layer_norm_rms_epsilon")),
        rope_theta=float(get("rope.freq_base", 10000.0)),
        rope_scaling=_gguf_scaling(fields, family),
        tied="output.weight" not in tensors,
        eos_token_ids=_gguf_end_tokens(fields),
        rope_factors="rope_freqs.weight" in tensors,
    )


def _gguf_scaling(fields: Mapping[str, Any], family: str) -> RopeScaling | None:
    kind = str(fields.get(f"{family}.rope.scaling.type", "none"))
    if kind == "none":
        return None
    if kind == "linear":
        factor = fields.get(f"{family}.rope.scaling.factor")
        if not isinstance(factor, int | float) or factor <= 0:
            raise BadWeights(f"GGUF metadata {family}.rope.scaling.factor is {factor!r}")
        return RopeScaling("linear", float(factor))
    raise UnsupportedModel(f"GGUF rope scaling {kind!r} is not implemented")


def _gguf_end_tokens(fields: Mapping[str, Any]) -> tuple[int, ...]:
    """The file's end of sequence, end of turn and end of message tokens."""
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    values = [fields.get(f"tokenizer.ggml.{key}") for key in keys]
    return tuple(dict.fromkeys(int(value) for value in values if value is not None))
