"""KV memory that nobody names: what the device has room for, less a step's need, which is measured once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flowserve.devices import cpu
from flowserve.devices.accelerator import MEMORY_CALLS, ROOM_SHARE, AcceleratorDevice
from flowserve.executor import capacity
from flowserve.executor.local import open_executor
from flowserve.models.weight_cache import WeightCache
from kvtransfer.pool import PoolError

ROOM = 96 << 20


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Needs that were measured, in order."""
    found: list[int] = []
    real = capacity.step_bytes

    def measure(*given: object) -> int:
        found.append(real(*given))  # type: ignore[arg-type]  # passed through
        return found[-1]

    monkeypatch.setattr(capacity, "step_bytes", measure)
    monkeypatch.setattr(cpu.CpuDevice, "room", lambda self: ROOM)
    return found


@pytest.mark.model
def test_what_a_step_needs_is_measured_once_and_noted_beside_the_model(
    measured: list[int], small_model_path: Path, tmp_path: Path
) -> None:
    cache = WeightCache(tmp_path / "weights", 1 << 30)

    def blocks(tokens: int = 512, weights: WeightCache | None = cache) -> int:
        executor = open_executor(
            small_model_path, revision="m@1", dtype="bfloat16", kv_cache_bytes=0, max_batch_tokens=tokens,
            weights=weights,
        )  # fmt: skip
        count, size = executor.store.num_blocks, executor.store.layout.block_bytes
        executor.close()
        assert count == (ROOM - int(capacity.MARGIN * measured[-1])) // size
        return count

    first = blocks()
    assert len(measured) == 1 and measured[0] > 0
    assert blocks() == first and len(measured) == 1  # noted
    blocks(tokens=64)
    assert len(measured) == 2 and measured[1] < measured[0]  # a smaller step needs less, and has its own note
    blocks(weights=None)
    assert len(measured) == 3  # nowhere to note it


@pytest.mark.model
def test_no_room_is_an_error_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, small_model_path: Path
) -> None:
    monkeypatch.setattr(cpu.CpuDevice, "room", lambda self: 1000)
    with pytest.raises(PoolError, match="no memory for KV"):
        open_executor(small_model_path, revision="m@1", dtype="bfloat16", kv_cache_bytes=0)


@pytest.mark.model
def test_ranks_need_a_size(small_model_path: Path) -> None:
    with pytest.raises(PoolError, match="3 ranks"):
        open_executor(small_model_path, revision="m@1", kv_cache_bytes=0, tensor_parallel=3)


def test_an_accelerators_memory_is_asked_of_its_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for torch.cuda: no device is at hand. It answers as the documentation says."""

    class Memory:
        held = height = 100

        def mem_get_info(self, device: object) -> tuple[int, int]:
            return 1000, 5000

        def memory_allocated(self, device: object) -> int:
            return self.held

        def max_memory_allocated(self, device: object) -> int:
            return self.height

        def reset_peak_memory_stats(self, device: object) -> None:
            self.height = self.held

        def synchronize(self) -> None:
            pass

        def empty_cache(self) -> None:
            pass

    memory = Memory()
    assert all(hasattr(memory, name) for name in MEMORY_CALLS)
    monkeypatch.setattr(torch, "get_device_module", lambda device: memory)
    device = AcceleratorDevice("cuda:0", torch.device("cpu"), "nccl")
    assert device.room() == int(ROOM_SHARE * 1000)

    def step() -> torch.Tensor:
        memory.height = 350
        return torch.zeros(0)

    assert device.peak(step) == 250


def test_the_height_of_a_step_on_a_cpu_is_its_own() -> None:
    device = cpu.CpuDevice()

    def taking(size: int) -> Callable[[], torch.Tensor]:
        return lambda: torch.ones(size, dtype=torch.uint8)

    device.peak(taking(256 << 20))
    assert 0.8 * (64 << 20) < device.peak(taking(64 << 20)) < 1.5 * (64 << 20)
