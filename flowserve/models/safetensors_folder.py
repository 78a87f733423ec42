"""Folders of safetensors files in Hugging Face's layout as a weight source (memory-mapped)."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from flowserve.models.config import ModelConfig, from_hf
from flowserve.models.errors import BadWeights, ModelNotFound, UnsupportedModel
from flowserve.models.weights import parts, refuse_unused

_LAYER_NAMES = {
    "attention_norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "output": "self_attn.o_proj.weight",
    "ffn_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}
_NAMES = {
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "lm_head": "lm_head.weight",
}


class SafetensorsSource:
    """A model folder: one `model.safetensors`, or shards with their index."""

    def __init__(self, folder: Path) -> None:
        """Raises ModelNotFound without weight files, BadWeights for torn ones."""
        self.folder = folder
        self._config = from_hf(folder)
        index = folder / "model.safetensors.index.json"
        if index.exists():
            try:
                names = set(json.loads(index.read_text())["weight_map"].values())
            except (ValueError, KeyError, AttributeError) as error:
                raise BadWeights(f"{index} is not a weight index: {error}") from error
            files = [folder / name for name in sorted(names)]
        else:
            files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ModelNotFound(f"{folder} holds no .safetensors file")
        self._where = {}
        for file in files:
            try:
                opened = safe_open(file, framework="pt")
            except FileNotFoundError as error:
                raise BadWeights(f"{file.name} is named in the weight index and missing") from error
            except (SafetensorError, OSError) as error:
                raise BadWeights(f"{file} is torn: {error}") from error
            for key in opened.keys():  # type: ignore[no-untyped-call]  # noqa: SIM118  # untyped package
                self._where[key] = opened
        layers = range(self._config.layers)
        used = {f"model.layers.{i}.{_LAYER_NAMES[part]}" for i in layers for part in parts(self._config)}
        # Old exports carry the rotary frequencies, which are computed here; tied models may carry both ends.
        present = [key for key in self._where if not key.endswith("rotary_emb.inv_freq")]
        refuse_unused(str(folder), present, used.union(_NAMES.values()))

    @property
    def config(self) -> ModelConfig:
        return self._config

    def tensor(self, name: str) -> torch.Tensor:
        if name in _NAMES:
            key = _NAMES[name]
        else:
            _, index, part = name.split(".")
            key = f"model.layers.{index}.{_LAYER_NAMES[part]}"
        holder = self._where.get(key)
        if holder is None:
            raise BadWeights(f"{self.folder} has no tensor {key}")
        try:
            tensor: torch.Tensor = holder.get_tensor(key)  # type: ignore[no-untyped-call]  # untyped package
        except SafetensorError as error:
            raise BadWeights(f"{self.folder}: tensor {key} cannot be read: {error}") from error
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise UnsupportedModel(
                f"tensor {key} is of type {tensor.dtype}: quantized weights are not implemented"
            )
        return tensor
