"""Tensor parallel over real processes: tokens, scores and KV as of one rank, and what losing one does."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from flowserve.devices import rank_device
from flowserve.executor.interface import ExecutorLost, SequenceSlice
from flowserve.executor.local import LocalExecutor, open_executor
from flowserve.executor.ranks import RankModel
from flowserve.models.errors import UnsupportedModel
from flowserve.models.shard import ShardedSource, shard_head
from tests.unit.flowserve.executor.test_local import PROMPTS, Run, alone, drive, runs, same

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],  # with biases
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 301,  # odd: the last rank's part of the head is filled up
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}


def random_model(folder: Path, **changes: Any) -> Path:
    """A folder with a model of CONFIG's shape and random weights."""
    config = {**CONFIG, **changes}
    hidden, wide, vocab = (config[name] for name in ("hidden_size", "intermediate_size", "vocab_size"))
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
    }
    layer = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.q_proj.bias": (hidden,),
        "self_attn.k_proj.bias": (kv,),
        "self_attn.v_proj.bias": (kv,),
        "self_attn.o_proj.weight": (hidden, hidden),
        "mlp.gate_proj.weight": (wide, hidden),
        "mlp.up_proj.weight": (wide, hidden),
        "mlp.down_proj.weight": (hidden, wide),
    }
    for index in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    generator = torch.Generator().manual_seed(5)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    data = {name: torch.randn(shape, generator=generator) / 4 for name, shape in shapes.items()}
    save_file(data, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def random_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(tmp_path_factory.mktemp("random") / "model")


def open_ranked(path: Path, ranks: int, kv_cache_bytes: int = 64 << 20, device: str = "cpu") -> LocalExecutor:
    return open_executor(
        path,
        revision="m@1",
        device=device,
        dtype="float32",
        kv_cache_bytes=kv_cache_bytes,
        threads=ranks,
        tensor_parallel=ranks,
    )


def rank_pids(executor: LocalExecutor) -> list[int]:
    assert isinstance(executor._model, RankModel)
    return [rank.pid for rank in executor._model._ranks]


def generate(executor: LocalExecutor, prompt: list[int]) -> Run:
    run = Run(prompt, range(8))
    drive(executor, [run], 11)
    return run


def kv_of(executor: LocalExecutor, blocks: int) -> np.ndarray[Any, Any]:
    return np.frombuffer(executor.store.load(0, blocks), np.float32)


# -- two ranks of a random model ----------------------------------------------------------------------


@pytest.fixture(scope="class")
def two(random_path: Path) -> Iterator[LocalExecutor]:
    opened = open_ranked(random_path, 2, 1 << 20)
    yield opened
    opened.close()


class TestTwoRanks:
    """One executor for the class: a process is in one group of ranks at a time."""

    def test_two_ranks_of_a_random_model_are_one(self, two: LocalExecutor, random_path: Path) -> None:
        one = open_ranked(random_path, 1, 1 << 20)
        try:
            prompts = [[(7 * i * i + 3 * i + k) % 301 for i in range(n)] for k, n in enumerate((1, 16, 50))]
            for prompt in prompts:
                same([generate(two, prompt)], [generate(one, prompt)])
            # All heads where one rank puts them: peers of any degree read these bytes.
            assert two.store.layout == one.store.layout and two.store.num_blocks == one.store.num_blocks
            np.testing.assert_allclose(kv_of(two, 3), kv_of(one, 3), atol=1e-4)
        finally:
            one.close()

    def test_pages_that_a_transfer_stores_reach_every_rank(
        self, two: LocalExecutor, random_path: Path
    ) -> None:
        """A prompt's KV, moved to other blocks through the store, gives the same next tokens."""
        prompt = [(11 * i) % 301 for i in range(40)]
        whole = generate(two, prompt)
        two.store.store(20, bytes(two.store.load(0, 3)))
        moved = Run(prompt, [20, 21, 22, 23])
        moved.done = 39
        drive(two, [moved], 11)
        same([moved], [whole])
        block = two.store.layout.block_bytes
        with pytest.raises(ValueError, match="not whole blocks"):
            two.store.store(0, bytes(block - 1))
        for start, count in ((-1, 1), (two.store.num_blocks, 1)):
            with pytest.raises(IndexError, match="outside a pool"):
                two.store.load(start, count)
            with pytest.raises(IndexError, match="outside a pool"):
                two.store.store(start, bytes(block * count))
        before = two.store.generation(4)
        two.store.bump(4)
        assert two.store.generation(4) == before + 1 and two.store.view(0, 1) is None

    def test_a_bad_batch_reaches_no_rank(self, two: LocalExecutor) -> None:
        with pytest.raises(ValueError, match="outside the pool"):
            two.execute([SequenceSlice([1], 0, [10**6])])
        assert len(generate(two, [1, 2, 3]).output) == 8


def test_a_killed_rank_is_an_executor_lost_not_a_hang(random_path: Path) -> None:
    executor = open_ranked(random_path, 2, 1 << 20)
    [pid] = rank_pids(executor)
    os.kill(pid, signal.SIGKILL)
    started = time.monotonic()
    for _ in range(2):
        with pytest.raises(ExecutorLost):
            generate(executor, [1, 2, 3])
    with pytest.raises(ExecutorLost):
        executor.store.load(0, 1)
    executor.close()
    executor.close()
    assert time.monotonic() - started < 30  # not the minute a collective would wait


def test_closing_ends_the_ranks(random_path: Path) -> None:
    executor = open_ranked(random_path, 2, 1 << 20)
    [pid] = rank_pids(executor)
    executor.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_what_cannot_be_shared_out_is_named(random_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"4 query heads, 2 KV heads cannot be shared out over 3"):
        open_ranked(random_path, 3)
    with pytest.raises(ValueError, match="2 to 64 are possible"):
        open_ranked(random_path, 65)


def test_a_rank_that_cannot_load_says_why_and_leaves_nobody(
    random_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the ranks' device is not there, as on a host with fewer devices than ranks."""
    monkeypatch.setattr("flowserve.executor.ranks.rank_device", lambda name, rank: "cuda:9")
    with pytest.raises(ValueError, match="CUDA"):
        open_ranked(random_path, 2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_are_one(random_path: Path) -> None:
    two, one = open_ranked(random_path, 2, 1 << 20, "cuda"), open_ranked(random_path, 1, 1 << 20)
    try:
        for length in (1, 16, 50):
            prompt = [(7 * i * i + 3 * i) % 301 for i in range(length)]
            same([generate(two, prompt)], [generate(one, prompt)])
    finally:
        two.close()
        one.close()


def test_accelerators_are_counted_up_from_the_named_one() -> None:
    assert [rank_device("cuda:2", rank) for rank in range(3)] == ["cuda:2", "cuda:3", "cuda:4"]
    assert [rank_device("npu", rank) for rank in range(2)] == ["npu:0", "npu:1"]
    assert rank_device("cpu", 3) == "cpu"


def test_shards_put_together_are_the_model(random_path: Path) -> None:
    from flowserve.models.loader import open_model

    source = open_model(random_path)
    shards = [ShardedSource(source, rank, 2) for rank in range(2)]
    for name, axis in (("q", 0), ("v_bias", 0), ("gate", 0), ("output", 1), ("down", 1)):
        parts = [shard.tensor(f"layers.1.{name}") for shard in shards]
        assert torch.equal(torch.cat(parts, axis), source.tensor(f"layers.1.{name}"))
    assert torch.equal(shards[1].tensor("final_norm"), source.tensor("final_norm"))
    head = source.tensor("lm_head")
    parts = [shard_head(head, rank, 4) for rank in range(4)]
    assert {part.shape for part in parts} == {(76, 64)}
    assert torch.equal(torch.cat(parts)[:301], head) and not torch.cat(parts)[301:].any()


# -- three ranks of the real model --------------------------------------------------------------------


@pytest.mark.model
def test_three_ranks_of_the_small_model_are_one(small_model_path: Path) -> None:
    """9 query and 3 KV heads: alone, batched and cut; greedy tokens, log-probabilities, prompt scores, KV."""
    three, one = open_ranked(small_model_path, 3), open_ranked(small_model_path, 1)
    try:
        together, reference = runs(three), alone(one)
        drive(three, together, 17)
        same(together, reference)
        piece = [SequenceSlice(PROMPTS[2], 0, range(10), prompt_logprobs=2)]
        mine, theirs = (executor.execute(piece)[0].prompt_logprobs for executor in (three, one))
        assert mine is not None and theirs is not None and len(mine) == len(PROMPTS[2]) - 1
        for a, b in zip(mine, theirs, strict=True):
            assert a.token == b.token and a.logprob == pytest.approx(b.logprob, abs=1e-3)
        np.testing.assert_allclose(kv_of(three, 9), kv_of(one, 9), atol=1e-2)
    finally:
        three.close()
        one.close()
