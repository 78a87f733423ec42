"""Recorded decode steps, with torch's CPU in the device's place: the recording runs the step again over its
own buffers, as a graph does, so what is read from anywhere else is stale and shows in the tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from flowserve.devices.accelerator import AcceleratorDevice, DevicePool
from flowserve.devices.graphs import BUCKETS, GRAPHS_ENV, GraphedLlama
from flowserve.executor import local
from flowserve.executor.batch import RaggedBatch
from flowserve.executor.local import LocalExecutor, open_executor
from flowserve.models.llama import DecodeAttention, TorchLlama, gathered_attention
from flowserve.models.loader import open_model
from kvtransfer.layout import KVLayout
from tests.unit.flowserve.executor.test_local import Run, drive
from tests.unit.flowserve.executor.test_ranks import random_model

BLOCK = 16
MAX_LEN = 128


class Replayed:
    """In place of a graph: replays by running the step over the same buffers into the same output."""

    def __init__(self, step: Callable[[], torch.Tensor]) -> None:
        self._step = step
        self.logits = step()
        self.replays: list[list[int]] = []  # lengths of each

    def replay(self, lengths: Sequence[int]) -> None:
        self.replays.append(list(lengths))
        self.logits.copy_(self._step())


class HostDevice(AcceleratorDevice):
    """An accelerator whose memory and kernels are the CPU's."""

    def __init__(self) -> None:
        super().__init__("host", torch.device("cpu"), "gloo")
        self.captured: list[Replayed] = []

    def attention(self, dtype: torch.dtype, block_tokens: int) -> DecodeAttention:
        return gathered_attention

    def capture(self, step: Callable[[], torch.Tensor]) -> Replayed:
        self.captured.append(Replayed(step))
        return self.captured[-1]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(tmp_path_factory.mktemp("graphs") / "model")


@pytest.fixture
def device() -> HostDevice:
    return HostDevice()


def opened(path: Path, device: HostDevice, monkeypatch: pytest.MonkeyPatch) -> LocalExecutor:
    monkeypatch.setattr(local, "open_device", lambda name: device)
    return open_executor(
        path, revision="m@1", dtype="float32", kv_cache_bytes=1 << 20, max_model_len=MAX_LEN, threads=1
    )


def sequences() -> list[Run]:
    """Five of unequal lengths, in interleaved blocks."""
    made = []
    for index, length in enumerate((1, 15, 16, 40, 70)):
        prompt = [(7 * i * i + 3 * i + index) % 301 for i in range(length)]
        made.append(Run(prompt, [60 - index - 5 * i for i in range(6)]))
    return made


def test_replayed_decodes_give_the_tokens_of_the_plain_step(
    path: Path, device: HostDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = opened(path, device, monkeypatch)
    recorded, plain = sequences(), sequences()
    drive(executor, recorded, 11)  # mixed steps, and decodes of five down to one
    used = [len(step.logits) for step in device.captured if step.replays]
    assert [len(step.logits) for step in device.captured] == list(reversed(BUCKETS))
    assert set(used) >= {1, 8}, "five sequences take the bucket of eight, one its own"
    executor.close()
    monkeypatch.setenv(GRAPHS_ENV, "0")
    without = HostDevice()
    executor = opened(path, without, monkeypatch)
    drive(executor, plain, 11)
    executor.close()
    assert not without.captured
    for mine, theirs in zip(recorded, plain, strict=True):
        assert mine.output == theirs.output
        assert [s.logprob for s in mine.scores] == pytest.approx([s.logprob for s in theirs.scores], abs=1e-4)


def test_a_model_that_slept_is_recorded_anew_over_its_new_weights_and_pages(
    path: Path, device: HostDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = opened(path, device, monkeypatch)
    before, after = sequences(), sequences()
    drive(executor, before, 11)
    executor.sleep()
    graphed = executor._model
    assert isinstance(graphed, GraphedLlama)
    inner = graphed._model
    old = inner._placed
    inner._take({name: tensor.clone() for name, tensor in old.items()})  # as a way to host memory and back
    for tensor in old.values():
        tensor.zero_()  # whoever still reads there gives other tokens
    executor.wake()
    assert len(device.captured) == 2 * len(BUCKETS)
    drive(executor, after, 11)
    assert [run.output for run in after] == [run.output for run in before]
    assert any(step.replays for step in device.captured[len(BUCKETS) :])
    executor.close()


def decode_batch(count: int, tables: Sequence[Sequence[int]], positions: Sequence[int]) -> RaggedBatch:
    each = np.arange(count, dtype=np.int32)
    return RaggedBatch(
        ids=each + 3,
        positions=np.array(positions, np.int32),
        first=each,
        count=np.ones(count, np.int32),
        tables=np.array(tables, np.int32),
        rows=each,
    )


@pytest.mark.parametrize("count", [1, 3, 9, 64, 65])
def test_a_bucket_writes_the_slots_of_its_sequences_and_no_other(
    path: Path, device: HostDevice, count: int
) -> None:
    """Padding included: pages, bit for bit outside of the slots, and logits of the plain step."""
    source = open_model(path)
    model = TorchLlama(source, dtype=torch.float32, device=torch.device("cpu"), max_len=MAX_LEN)
    config = model.config
    layout = KVLayout("m@1", "float32", BLOCK, config.layers, config.kv_heads, config.head_dim)
    pool = DevicePool(layout, 2 * count + 3, torch.device("cpu"))
    graphed = GraphedLlama(model, device.capture)
    graphed.prepare(pool.pages, MAX_LEN)
    generator = torch.Generator().manual_seed(count)
    pool.pages.copy_(torch.randn(pool.pages.shape, generator=generator))
    before = pool.pages.clone()
    tables = [[2 + 2 * i, 3 + 2 * i] for i in range(count)]
    positions = [(5 * i) % 30 for i in range(count)]
    batch = decode_batch(count, tables, positions)
    logits = graphed.forward(batch, pool.pages)
    assert logits.shape == (count, 301)
    [step] = [step for step in device.captured if step.replays]
    [lengths] = step.replays
    assert lengths[:count] == [p + 1 for p in positions] and set(lengths[count:]) <= {positions[0] + 1}
    expected_pages = before.clone()
    expected = model.forward(batch, expected_pages)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(pool.pages, expected_pages, atol=1e-4, rtol=1e-4)
    touched = torch.zeros(pool.pages.shape[0], BLOCK, dtype=torch.bool)
    for table, position in zip(tables, positions, strict=True):
        touched[table[position // BLOCK], position % BLOCK] = True
    changed = (pool.pages != before).any(dim=(1, 2, 3, 5))
    assert torch.equal(changed, touched)
    # Rows may be asked for again, and the next step does not reach what this one returned.
    kept = logits.clone()
    assert torch.equal(graphed.logits(np.array([count - 1], np.int32)), kept[-1:])
    graphed.forward(decode_batch(count, tables, [p + 1 for p in positions]), pool.pages)
    assert torch.equal(logits, kept)
    graphed.close()


def test_what_no_bucket_holds_runs_plain(path: Path, device: HostDevice) -> None:
    source = open_model(path)
    model = TorchLlama(source, dtype=torch.float32, device=torch.device("cpu"), max_len=MAX_LEN)
    config = model.config
    count = BUCKETS[-1] + 1
    pages = torch.zeros(count + 1, config.layers, 2, config.kv_heads, BLOCK, config.head_dim)
    graphed = GraphedLlama(model, device.capture)
    graphed.prepare(pages, BLOCK)
    large = decode_batch(count, [[i] for i in range(count)], [0] * count)
    assert graphed.forward(large, pages).shape == (count, 301)
    one = decode_batch(1, [[0]], [4])
    silent = RaggedBatch(one.ids, one.positions, one.first, one.count, one.tables, one.rows[:0])
    assert graphed.forward(silent, pages).shape == (0, 301)  # a prompt's piece of one token: nothing is drawn
    assert graphed.logits(one.rows).shape == (1, 301)
    assert not any(step.replays for step in device.captured)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: torch sees none")
def test_a_gpu_with_graphs_gives_the_tokens_of_the_cpu(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = []
    for device, graphs in (("cpu", "1"), ("cuda", "1"), ("cuda", "0")):
        monkeypatch.setenv(GRAPHS_ENV, graphs)
        executor = open_executor(
            path,
            revision="m@1",
            device=device,
            dtype="float32",
            kv_cache_bytes=1 << 20,
            max_model_len=MAX_LEN,
        )
        runs = sequences()
        drive(executor, runs, 11)
        executor.close()
        outputs.append([run.output for run in runs])
    assert outputs[1] == outputs[0] and outputs[2] == outputs[0]
