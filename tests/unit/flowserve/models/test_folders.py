"""Model folders: config.json's options, safetensors in one file or shards, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from flowserve.models.config import RopeScaling, from_hf
from flowserve.models.errors import BadWeights, ModelNotFound, UnsupportedModel
from flowserve.models.llama import TorchLlama
from flowserve.models.loader import open_model, parse_dtype
from flowserve.models.weights import layer_weights

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
}


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (40, 32),
        "model.norm.weight": (32,),
        "lm_head.weight": (40, 32),
    }
    for i in range(2):
        prefix = f"model.layers.{i}."
        shapes |= {
            prefix + "input_layernorm.weight": (32,),
            prefix + "post_attention_layernorm.weight": (32,),
            prefix + "self_attn.q_proj.weight": (32, 32),
            prefix + "self_attn.k_proj.weight": (16, 32),
            prefix + "self_attn.v_proj.weight": (16, 32),
            prefix + "self_attn.o_proj.weight": (32, 32),
            prefix + "mlp.gate_proj.weight": (48, 32),
            prefix + "mlp.up_proj.weight": (48, 32),
            prefix + "mlp.down_proj.weight": (32, 48),
        }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def folder(path: Path, data: dict[str, torch.Tensor] | None = None, shards: int = 1, **options: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({**CONFIG, **options}))
    data = weights() if data is None else data
    if shards == 1:
        save_file(data, path / "model.safetensors")
        return path
    index = {}
    for number in range(shards):
        part = {name: data[name] for name in sorted(data)[number::shards]}
        file = f"model-{number}.safetensors"
        save_file(part, path / file)
        index.update(dict.fromkeys(part, file))
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return path


def load(path: Path) -> TorchLlama:
    return TorchLlama(open_model(path), dtype=torch.float32, device=torch.device("cpu"), max_len=16)


def test_shards_and_one_file_are_the_same_weights(tmp_path: Path) -> None:
    one, many = open_model(folder(tmp_path / "a")), open_model(folder(tmp_path / "b", shards=3))
    for index in range(2):
        first, second = (layer_weights(source, index, torch.float32) for source in (one, many))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_fused_matrices_keep_their_parts_in_order(tmp_path: Path) -> None:
    data = weights()
    fused = layer_weights(open_model(folder(tmp_path / "m", data)), 1, torch.bfloat16)
    prefix = "model.layers.1."
    q, k, v = (data[f"{prefix}self_attn.{name}_proj.weight"] for name in "qkv")
    gate, up = data[prefix + "mlp.gate_proj.weight"], data[prefix + "mlp.up_proj.weight"]
    assert torch.equal(fused["qkv"], torch.cat([q, k, v]).bfloat16())
    assert torch.equal(fused["gate_up"], torch.cat([gate, up]).bfloat16())
    assert fused["attention_norm"].dtype == torch.float32


def test_end_tokens_of_the_generation_config_come_first(tmp_path: Path) -> None:
    path = folder(tmp_path / "m")
    assert from_hf(path).eos_token_ids == (2,)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6, 5]}))
    assert from_hf(path).eos_token_ids == (5, 6)
    (path / "generation_config.json").write_text("{}")
    assert from_hf(path).eos_token_ids == (2,)


def test_the_released_forms_of_rope_scaling_are_read(tmp_path: Path) -> None:
    llama31 = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    expected = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    assert from_hf(folder(tmp_path / "a", rope_scaling=llama31, rope_theta=5e5)).rope_scaling == expected
    newer = from_hf(folder(tmp_path / "b", rope_parameters={**llama31, "rope_theta": 5e5}))
    assert newer.rope_scaling == expected and newer.rope_theta == 5e5
    older = from_hf(folder(tmp_path / "c", rope_scaling={"type": "linear", "factor": 2.0}))
    assert older.rope_scaling == RopeScaling("linear", 2.0)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, UnsupportedModel, "GPT2LMHeadModel is not implemented"),
        ({"architectures": None, "model_type": "t5"}, UnsupportedModel, "t5 is not implemented"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, UnsupportedModel, "rope scaling 'yarn'"),
        ({"attention_bias": True}, UnsupportedModel, "attention_bias"),
        ({"mlp_bias": True}, UnsupportedModel, "mlp_bias"),
        ({"hidden_act": "gelu"}, UnsupportedModel, "'gelu'"),
        ({"sliding_window": 128}, UnsupportedModel, "sliding-window"),
        ({"partial_rotary_factor": 0.5}, UnsupportedModel, "part of the head"),
        ({"quantization_config": {"quant_method": "gptq"}}, UnsupportedModel, "quantized by 'gptq'"),
        ({"num_hidden_layers": 3}, BadWeights, r"no tensor model\.layers\.2"),
        ({"num_hidden_layers": 1}, UnsupportedModel, r"no use for: model\.layers\.1.* and 6 more"),
        ({"vocab_size": 41}, BadWeights, r"shape \[40, 32\], \[41, 32\] expected"),
        ({"num_key_value_heads": 4}, BadWeights, "k has shape"),
        ({"num_key_value_heads": 3}, BadWeights, "no multiple"),
        ({"hidden_size": "wide"}, BadWeights, "wrong kind"),
        ({"num_attention_heads": 0}, BadWeights, "wrong kind|positive"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, BadWeights, "lacks 'low_freq_factor'"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(
    options: dict[str, Any], error: type[Exception], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        load(folder(tmp_path / "m", **options))


def test_missing_and_torn_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"config\.json does not exist"):
        open_model(tmp_path)
    path = folder(tmp_path / "m")
    (path / "model.safetensors").unlink()
    with pytest.raises(ModelNotFound, match=r"no \.safetensors file"):
        open_model(path)
    path = folder(tmp_path / "shards", shards=2)
    (path / "model-1.safetensors").unlink()
    with pytest.raises(BadWeights, match=r"model-1\.safetensors"):
        open_model(path)
    path = folder(tmp_path / "torn")
    content = (path / "model.safetensors").read_bytes()
    for size in (0, 5, 200, len(content) - 1):
        (path / "model.safetensors").write_bytes(content[:size])
        with pytest.raises(BadWeights, match="torn"):
            open_model(path)
    path = folder(tmp_path / "json")
    (path / "config.json").write_text("{")
    with pytest.raises(BadWeights, match="is not JSON"):
        open_model(path)
    (path / "config.json").write_text("[]")
    with pytest.raises(BadWeights, match="not a JSON object"):
        open_model(path)
    path = folder(tmp_path / "index", shards=2)
    (path / "model.safetensors.index.json").write_text('{"weights": 1}')
    with pytest.raises(BadWeights, match="not a weight index"):
        open_model(path)


def test_quantized_tensors_are_refused_even_without_a_word_in_the_config(tmp_path: Path) -> None:
    data = weights()
    data["model.layers.0.mlp.up_proj.weight"] = torch.zeros(48, 32, dtype=torch.int8)
    with pytest.raises(UnsupportedModel, match=r"up_proj\.weight is of type torch\.int8"):
        load(folder(tmp_path / "m", data))


def test_old_exports_with_their_rotary_frequencies_load(tmp_path: Path) -> None:
    data = weights()
    data["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    load(folder(tmp_path / "m", data))


def test_dtypes_by_name() -> None:
    assert parse_dtype("auto") is torch.bfloat16 and parse_dtype("float32") is torch.float32
    with pytest.raises(UnsupportedModel, match="'int4' is not implemented"):
        parse_dtype("int4")
