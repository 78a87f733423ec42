"""GGUF files: blocks expand as in the `gguf` package, q and k are put right, torn files are refused."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from flowserve.models.config import RopeScaling
from flowserve.models.errors import BadWeights, ModelNotFound, UnsupportedModel
from flowserve.models.gguf_file import GGUFSource
from flowserve.models.llama import TorchLlama
from flowserve.models.loader import open_model
from flowserve.models.rope import rotary_tables
from flowserve.models.weights import layer_weights, rotary

HIDDEN, WIDE, HEADS, KV_HEADS, DIM, VOCAB, LAYERS = 64, 96, 4, 2, 16, 40, 2
Edit = Callable[[gguf.GGUFWriter], None]
FIELDS: dict[str, int | float | str] = {
    "context_length": 128,
    "embedding_length": HIDDEN,
    "feed_forward_length": WIDE,
    "block_count": LAYERS,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 10000.0,
    "vocab_size": VOCAB,
}


def tensors() -> dict[str, np.ndarray[Any, Any]]:
    """Weights of a whole model, as llama.cpp's converter would have them."""
    random = np.random.default_rng(5)
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (VOCAB, HIDDEN),
        "output_norm.weight": (HIDDEN,),
        "output.weight": (VOCAB, HIDDEN),
    }
    for i in range(LAYERS):
        shapes |= {
            f"blk.{i}.attn_norm.weight": (HIDDEN,),
            f"blk.{i}.attn_q.weight": (HEADS * DIM, HIDDEN),
            f"blk.{i}.attn_k.weight": (KV_HEADS * DIM, HIDDEN),
            f"blk.{i}.attn_v.weight": (KV_HEADS * DIM, HIDDEN),
            f"blk.{i}.attn_output.weight": (HIDDEN, HEADS * DIM),
            f"blk.{i}.ffn_norm.weight": (HIDDEN,),
            f"blk.{i}.ffn_gate.weight": (WIDE, HIDDEN),
            f"blk.{i}.ffn_up.weight": (WIDE, HIDDEN),
            f"blk.{i}.ffn_down.weight": (HIDDEN, WIDE),
        }
    return {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def write(
    path: Path,
    *,
    family: str = "llama",
    fields: Mapping[str, Any] = {},  # over FIELDS; None leaves one out
    data: Mapping[str, np.ndarray[Any, Any]] | None = None,
    kinds: Mapping[str, gguf.GGMLQuantizationType] = {},
    edit: Edit = lambda writer: None,
) -> Path:
    writer = gguf.GGUFWriter(path, family)
    for name, value in {**FIELDS, **fields}.items():
        key = name if name.startswith(("tokenizer.", "general.")) else f"{family}.{name}"
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif value is not None:
            writer.add_float32(key, value)
    edit(writer)
    for name, tensor in (tensors() if data is None else data).items():
        kind = kinds.get(name)
        if kind is None:
            writer.add_tensor(name, tensor)
        else:
            writer.add_tensor(name, gguf.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_blocks_expand_to_the_bit_as_the_gguf_package_does(kind: str, tmp_path: Path) -> None:
    quantization = gguf.GGMLQuantizationType[kind]
    data = tensors()
    name = "blk.1.ffn_gate.weight"
    source = GGUFSource(write(tmp_path / "m.gguf", data=data, kinds={name: quantization}))
    raw = gguf.quantize(data[name], quantization)
    expected = gguf.dequantize(raw, quantization).reshape(data[name].shape)
    assert np.array_equal(source.tensor("layers.1.gate").numpy(), expected)


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "Q2_K", "IQ4_NL", "TQ1_0"])
def test_rarer_blocks_are_read_too(kind: str, tmp_path: Path) -> None:
    """The package cannot write most of these: bytes as they come, both read alike."""
    quantization = gguf.GGMLQuantizationType[kind]
    per_block, size = gguf.GGML_QUANT_SIZES[quantization]
    rows, columns = 4, per_block * 2
    raw = np.random.default_rng(1).integers(0, 60, (rows, columns // per_block * size), np.uint8)
    data = tensors()
    data["token_embd.weight"] = raw
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in FIELDS.items():
        if isinstance(value, float):
            writer.add_float32(f"llama.{name}", value)
        else:
            writer.add_uint32(f"llama.{name}", int(value))
    writer.add_tensor("token_embd.weight", raw, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    mine = GGUFSource(path).tensor("embedding").numpy()
    assert mine.shape == (rows, columns)
    assert np.array_equal(mine, gguf.dequantize(raw, quantization), equal_nan=True)


def _interleaved(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """What llama.cpp's converter does to q and k of the architecture llama."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def test_q_and_k_are_put_back_for_llama_and_left_alone_for_qwen(tmp_path: Path) -> None:
    data = tensors()
    q, k = data["blk.0.attn_q.weight"].copy(), data["blk.0.attn_k.weight"].copy()
    data["blk.0.attn_q.weight"], data["blk.0.attn_k.weight"] = (
        _interleaved(q, HEADS),
        _interleaved(k, KV_HEADS),
    )
    llama = GGUFSource(write(tmp_path / "llama.gguf", data=data))
    assert np.array_equal(llama.tensor("layers.0.q").numpy(), q)
    assert np.array_equal(llama.tensor("layers.0.k").numpy(), k)
    data = tensors()
    for i in range(LAYERS):
        data[f"blk.{i}.attn_q_norm.weight"] = np.ones(DIM, np.float32)
        data[f"blk.{i}.attn_k_norm.weight"] = np.ones(DIM, np.float32)
    qwen = GGUFSource(write(tmp_path / "qwen3.gguf", family="qwen3", data=data))
    assert np.array_equal(qwen.tensor("layers.0.q").numpy(), data["blk.0.attn_q.weight"])
    assert set(layer_weights(qwen, 0, torch.float32)) >= {"q_norm", "k_norm"}


def test_metadata_become_the_config(tmp_path: Path) -> None:
    ends = {
        "tokenizer.ggml.eos_token_id": 7,
        "tokenizer.ggml.eot_token_id": 9,
        "tokenizer.ggml.eom_token_id": 7,
    }
    config = open_model(write(tmp_path / "m.gguf", fields=ends)).config
    assert (config.family, config.layers, config.hidden, config.intermediate) == (
        "llama",
        LAYERS,
        HIDDEN,
        WIDE,
    )
    assert (config.heads, config.kv_heads, config.head_dim) == (HEADS, KV_HEADS, DIM)
    assert (config.vocab_size, config.max_len, config.rope_theta) == (VOCAB, 128, 10000.0)
    assert config.eos_token_ids == (7, 9) and not config.tied and config.rope_scaling is None
    tied = {name: tensor for name, tensor in tensors().items() if name != "output.weight"}
    scaled = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0, "vocab_size": None}
    path = write(
        tmp_path / "tied.gguf",
        data=tied,
        fields={**scaled, "tokenizer.ggml.tokens": [f"t{i}" for i in range(VOCAB)]},
    )
    config = open_model(path).config
    assert config.tied and config.rope_scaling == RopeScaling("linear", 4.0) and config.vocab_size == VOCAB


def test_rotary_divisors_of_the_file_are_llama_3_1_scaling(tmp_path: Path) -> None:
    """llama.cpp writes the scaling as one divisor a frequency; Hugging Face as four numbers."""
    factor, low, high, original = 8.0, 1.0, 4.0, 32
    divisors = []
    for i in range(DIM // 2):
        wavelength = 2 * math.pi * 10000.0 ** (2 * i / DIM)
        if wavelength < original / high:
            divisors.append(1.0)
        elif wavelength > original / low:
            divisors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    assert len(set(divisors)) > 2
    data = {**tensors(), "rope_freqs.weight": np.array(divisors, np.float32)}
    source = GGUFSource(write(tmp_path / "m.gguf", data=data))
    plain = GGUFSource(write(tmp_path / "plain.gguf")).config
    scaled = replace(plain, rope_scaling=RopeScaling("llama3", factor, low, high, original))
    for mine, theirs in zip(rotary(source, 128), rotary_tables(scaled, 128), strict=True):
        assert torch.allclose(mine, theirs, atol=2e-5)
    data["rope_freqs.weight"] = np.zeros(DIM // 2, np.float32)
    with pytest.raises(BadWeights, match="positive"):
        rotary(GGUFSource(write(tmp_path / "zero.gguf", data=data)), 128)


# -- what is refused --------------------------------------------------------------------------------


def test_a_missing_file_and_a_foreign_one_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="does not exist"):
        open_model(tmp_path / "none.gguf")
    other = tmp_path / "weights.bin"
    other.write_bytes(b"x")
    with pytest.raises(UnsupportedModel, match=r"neither a \.gguf file nor a folder"):
        open_model(other)
    for content in (b"", b"GG", b"PK\3\4 not a model"):
        (tmp_path / "fake.gguf").write_bytes(content)
        with pytest.raises(BadWeights):
            open_model(tmp_path / "fake.gguf")


@pytest.mark.parametrize("share", [0.001, 0.02, 0.3, 0.999])
def test_a_truncated_file_is_named_as_torn(share: float, tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(BadWeights, match=r"torn|truncated|not a GGUF|no tensor"):
        _read_all(path)


def test_any_single_broken_header_byte_is_a_typed_error_or_harmless(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf")
    whole = path.read_bytes()
    header = whole.index(b"output_norm.weight")
    refused = 0
    for position in range(0, header, 7):
        broken = bytearray(whole)
        broken[position] ^= 0xFF
        path.write_bytes(broken)
        try:
            _read_all(path)
        except (BadWeights, UnsupportedModel):
            refused += 1
    assert refused > 10


def _read_all(path: Path) -> None:
    source = open_model(path)
    for name in ("embedding", "final_norm", "lm_head"):
        source.tensor(name)
    for index in range(min(source.config.layers, LAYERS + 1)):
        layer_weights(source, index, torch.float32)


def test_a_version_and_an_architecture_that_are_not_known_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf")
    content = bytearray(path.read_bytes())
    content[4:8] = struct.pack("<I", 9)
    path.write_bytes(content)
    with pytest.raises(UnsupportedModel, match="version 9"):
        open_model(path)
    with pytest.raises(UnsupportedModel, match=r"'mamba' is not implemented; implemented are llama"):
        open_model(write(tmp_path / "mamba.gguf", family="mamba"))


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"block_count": None}, BadWeights, "lacks llama.block_count"),
        ({"block_count": 0}, BadWeights, "layers must be positive"),
        ({"attention.head_count": 0}, BadWeights, "must be positive"),
        ({"attention.head_count_kv": 3}, BadWeights, "no multiple"),
        ({"attention.head_count_kv": [2, 1]}, UnsupportedModel, "no number"),
        ({"expert_count": 8}, UnsupportedModel, "mixture-of-experts"),
        ({"attention.sliding_window": 64}, UnsupportedModel, "sliding-window"),
        ({"rope.dimension_count": 8}, UnsupportedModel, "part of the head"),
        ({"rope.scaling.type": "yarn"}, UnsupportedModel, "'yarn' is not implemented"),
        ({"rope.scaling.type": "linear"}, BadWeights, "scaling.factor"),
        ({"block_count": 1}, UnsupportedModel, r"no use for: blk\.1\."),
        ({"block_count": 3}, BadWeights, "no tensor blk.2"),
        ({"vocab_size": 41}, BadWeights, r"embedding has shape \[40, 64\], \[41, 64\] expected"),
        ({"feed_forward_length": 95}, BadWeights, "gate has shape"),
    ],
)
def test_metadata_that_do_not_fit_are_named(
    fields: dict[str, Any], error: type[Exception], words: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "m.gguf", fields=fields)
    with pytest.raises(error, match=words):
        TorchLlama(open_model(path), dtype=torch.float32, device=torch.device("cpu"), max_len=16)


def test_weights_that_would_be_left_out_are_refused(tmp_path: Path) -> None:
    data = {**tensors(), "blk.0.attn_q.bias": np.zeros(HEADS * DIM, np.float32)}
    with pytest.raises(UnsupportedModel, match=r"no use for: blk\.0\.attn_q\.bias"):
        open_model(write(tmp_path / "m.gguf", data=data))


def test_an_unknown_quantization_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf")
    content = bytearray(path.read_bytes())
    name = b"token_embd.weight"
    at = content.index(name) + len(name) + 4 + 2 * 8  # after its two dimensions
    content[at : at + 4] = struct.pack("<I", 777)
    path.write_bytes(content)
    with pytest.raises(UnsupportedModel, match="unknown type 777"):
        open_model(path).tensor("embedding")


def test_a_folder_with_one_gguf_file_is_that_file(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf")
    assert open_model(tmp_path).config.layers == LAYERS
