"""The same model files in Hugging Face transformers' code and in ours: weights, logits, every family."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from flowserve.devices.cpu import CpuDevice
from flowserve.devices.native.library import DISABLE_ENV, NativeLlama, library
from flowserve.executor.batch import RaggedBatch
from flowserve.models.llama import TorchLlama
from flowserve.models.loader import open_model
from flowserve.models.weights import WeightSource
from tests.support.reference import _PARTS

BLOCK = 16
TOLERANCE = 1e-3  # of float32 logits whose range is some tens
# "The library of Alexandria was one of the largest of the ancient world. Its scrolls held what was known
# of geometry, of medicine and of the stars, and"
PROMPT = [504, 4971, 282, 23472, 436, 582, 282, 260, 3995, 282, 260, 3201, 905, 30, 4781, 44091, 3408, 732]
PROMPT += [436, 1343, 282, 11572, 28, 282, 4513, 284, 282, 260, 5703, 28, 284]
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SIZES: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 200,
    "max_position_embeddings": 512,
}
TINY = {
    "llama": ("LlamaConfig", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    "llama3 scaling": ("LlamaConfig", {"rope_parameters": LLAMA3_ROPE}),
    "linear scaling": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"hidden_size": 96, "tie_word_embeddings": False}),  # heads wider than hidden
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def whole(ids: list[int]) -> RaggedBatch:
    """One sequence from its start, logits of every token."""
    count = len(ids)
    return RaggedBatch(
        ids=np.array(ids, np.int32),
        positions=np.arange(count, dtype=np.int32),
        first=np.zeros(1, np.int32),
        count=np.array([count], np.int32),
        tables=np.arange(-(-count // BLOCK), dtype=np.int32)[::-1].copy()[None],  # blocks in no special order
        rows=np.arange(count, dtype=np.int32),
    )


def logits_of(model: TorchLlama | NativeLlama, ids: list[int]) -> torch.Tensor:
    config = model.config
    blocks = -(-len(ids) // BLOCK)
    pages = torch.zeros(blocks, config.layers, 2, config.kv_heads, BLOCK, config.head_dim)
    return model.forward(whole(ids), pages)


def ours(source: WeightSource) -> list[TorchLlama | NativeLlama]:
    """Both ways the CPU computes: plain torch and, where it is built, the compiled step."""
    models: list[TorchLlama | NativeLlama] = [
        TorchLlama(source, dtype=torch.float32, device=torch.device("cpu"), max_len=512)
    ]
    if library():
        models.append(NativeLlama(source, dtype=torch.float32, max_len=512, block_tokens=BLOCK, threads=2))
    return models


@pytest.fixture(scope="module")
def small(small_model_path: Path) -> Any:
    """transformers' own reading of the GGUF file, float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        small_model_path.parent, gguf_file=small_model_path.name, dtype=torch.float32
    ).eval()


@pytest.mark.model
def test_gguf_weights_are_those_that_transformers_reads(small: Any, small_model_path: Path) -> None:
    source = open_model(small_model_path)
    theirs = small.state_dict()
    for index in range(source.config.layers):
        for part, name in _PARTS.items():
            mine = source.tensor(f"layers.{index}.{part}")
            assert torch.equal(mine, theirs[f"model.layers.{index}.{name}.weight"]), f"{index} {part}"
    assert torch.equal(source.tensor("embedding"), theirs["model.embed_tokens.weight"])
    assert torch.equal(source.tensor("final_norm"), theirs["model.norm.weight"])
    assert source.config.tied
    assert source.config.rope_theta == small.config.rope_parameters["rope_theta"]


@pytest.mark.model
def test_small_models_logits_equal_transformers(small: Any, small_model_path: Path) -> None:
    with torch.inference_mode():
        theirs = small(torch.tensor([PROMPT])).logits[0]
    for model in ours(open_model(small_model_path)):
        mine = logits_of(model, PROMPT)
        assert (mine - theirs).abs().max() < TOLERANCE, type(model).__name__
        assert torch.equal(mine.argmax(-1), theirs.argmax(-1))
        model.close()


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
def test_tiny_models_logits_equal_transformers(kind: str, sharded: bool, tmp_path: Path) -> None:
    name, options = TINY[kind]
    torch.manual_seed(7)
    config = getattr(transformers, name)(**{**SIZES, **options}, eos_token_id=[3, 5], bos_token_id=1)
    theirs = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter_name, parameter in theirs.named_parameters():
        if parameter.ndim == 1:  # norms start as ones and biases as zeros, which would hide their misuse
            torch.nn.init.normal_(parameter, 1.0 if "norm" in parameter_name else 0.0, 0.3)
    theirs.save_pretrained(tmp_path, max_shard_size="100KB" if sharded else "5GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == sharded
    ids = torch.randint(6, 200, (150,)).tolist()
    with torch.inference_mode():
        expected = theirs(torch.tensor([ids])).logits[0]
    source = open_model(tmp_path)
    assert source.config.eos_token_ids == (3, 5)
    for model in ours(source):
        assert (logits_of(model, ids) - expected).abs().max() < TOLERANCE, type(model).__name__
        model.close()


def test_without_the_compiled_step_the_cpu_computes_in_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = transformers.LlamaConfig(**SIZES)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    monkeypatch.setenv(DISABLE_ENV, "0")
    library.cache_clear()
    try:
        model = CpuDevice().make_model(
            open_model(tmp_path), dtype=torch.float32, max_len=64, block_tokens=BLOCK, threads=1
        )
    finally:
        monkeypatch.undo()
        library.cache_clear()
    assert isinstance(model, TorchLlama)
