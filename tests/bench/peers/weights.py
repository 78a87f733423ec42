"""One model file in the forms that the peers read, with equal values: bf16 rounded from the same numbers.

Called by `install`. vLLM gets a safetensors folder, llama.cpp GGUF files in bf16 and in 8-bit blocks
(`Q8_0`, the precision nearest to int8 weights). The file itself serves as the 4-bit one.
"""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import torch
from safetensors.torch import save_file

from controlplane.gateway.modelcard import ModelCard, build_card
from flowserve.models.config import ModelConfig
from flowserve.models.loader import open_model
from flowserve.models.safetensors_folder import _LAYER_NAMES, _NAMES
from flowserve.models.weights import WeightSource, parts

SAFETENSORS = "weights-bf16"
GGUF_KINDS = {
    "bf16": gguf.GGMLQuantizationType.BF16,
    "q8": gguf.GGMLQuantizationType.Q8_0,
}
FILE_TYPES = {"bf16": gguf.LlamaFileType.MOSTLY_BF16, "q8": gguf.LlamaFileType.MOSTLY_Q8_0}


def gguf_path(root: Path, precision: str) -> Path:
    return root / f"weights-{precision}.gguf"


def write_all(model: Path, root: Path) -> None:
    write_safetensors(model, root / SAFETENSORS)
    for precision in GGUF_KINDS:
        write_gguf(model, gguf_path(root, precision), precision)


def write_safetensors(model: Path, folder: Path) -> None:
    """A Hugging Face folder in bf16, with the tokenizer that this project builds from the file."""
    source = open_model(model)
    if source.config.family != "llama":
        raise ValueError(f"the peers' folder is written for Llama models, not for {source.config.family}")
    folder.mkdir(exist_ok=True)
    save_file(_tensors(source), folder / "model.safetensors", metadata={"format": "pt"})
    card = build_card(model)
    _write_json(folder / "config.json", _config(source.config, card))
    (folder / "tokenizer.json").write_bytes(card.tokenizer_json)
    names = {"eos_token": card.eos_token, "bos_token": card.bos_token, "chat_template": card.chat_template}
    _write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **names})
    print(f"wrote {folder}")


def _tensors(source: WeightSource) -> dict[str, torch.Tensor]:
    config = source.config
    names = {name: key for name, key in _NAMES.items() if name != "lm_head" or not config.tied}
    for index in range(config.layers):
        for part in parts(config):
            names[f"layers.{index}.{part}"] = f"model.layers.{index}.{_LAYER_NAMES[part]}"
    return {key: source.tensor(name).bfloat16().contiguous() for name, key in names.items()}


def _config(config: ModelConfig, card: ModelCard) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "num_hidden_layers": config.layers,
        "hidden_size": config.hidden,
        "intermediate_size": config.intermediate,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_len,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_theta,
        "hidden_act": "silu",
        "tie_word_embeddings": config.tied,
        "bos_token_id": card.bos_id,
        "eos_token_id": config.eos_token_ids[0],
    }


def _write_json(path: Path, data: dict[str, object]) -> None:
    path.write_text(json.dumps(data, indent=1))


def write_gguf(model: Path, path: Path, precision: str) -> None:
    """The file again with its matrices in another precision; metadata and small tensors stay."""
    reader = gguf.GGUFReader(model)
    writer = gguf.GGUFWriter(path, str(reader.fields["general.architecture"].contents()))
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        if field.name in ("general.file_type", "general.quantization_version"):
            continue
        inner = field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(field.name, field.contents(), field.types[0], inner)
    writer.add_file_type(FILE_TYPES[precision])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        kind = GGUF_KINDS[precision] if len(tensor.shape) > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    print(f"wrote {path}")
