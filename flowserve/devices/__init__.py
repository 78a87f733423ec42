"""Devices behind one small interface: nothing outside this folder names a device type.

A device makes the KV pool (a tensor and the BlockStore that transfers see) and the model that computes
in it. `open_device("cpu" | "cuda" | "cuda:1" | "npu")` is the only way in.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from flowserve.executor.batch import Ints, RaggedBatch
from flowserve.models.config import ModelConfig
from flowserve.models.weights import WeightSource
from kvtransfer.layout import KVLayout
from kvtransfer.pool import BlockStore

if TYPE_CHECKING:  # loads torch.distributed: only ranks need it
    from flowserve.devices.collective import Group


class DeviceUnavailable(ValueError):
    """The named device is unknown or not there; the message says what is missing."""


class Model(Protocol):
    """A model on one device (`TorchLlama`, `NativeLlama`)."""

    @property
    def config(self) -> ModelConfig: ...

    def forward(self, batch: RaggedBatch, pages: torch.Tensor) -> torch.Tensor:
        """Float32 logits [rows, vocab]; KV goes to pages [blocks, layers, 2, kv_heads, block_tokens, dim]."""
        ...

    def logits(self, rows: Ints) -> torch.Tensor:
        """Float32 logits [len(rows), vocab] of tokens of the last `forward`, numbered as in its batch."""
        ...

    def sleep(self) -> None:
        """Gives the device's memory back: weights wait in the host's. No `forward` until `wake`."""
        ...

    def wake(self) -> None:
        """After `sleep`: weights are on the device again. What was recorded is gone: `Device.prepare` comes
        anew."""
        ...

    def close(self) -> None: ...


class Pool(Protocol):
    """KV memory of one executor: `pages` for kernels, `store` for transfers, over the same bytes."""

    @property
    def pages(self) -> torch.Tensor: ...

    @property
    def store(self) -> BlockStore: ...

    def close(self) -> None: ...


class Device(Protocol):
    @property
    def name(self) -> str: ...

    def set_threads(self, threads: int) -> None:
        """CPU threads for this process's kernels; meaningless where kernels run elsewhere."""
        ...

    def join(self, rank: int, size: int, meeting_file: Path) -> Group:
        """Meets the other ranks of a tensor-parallel executor; blocks until all are there."""
        ...

    def make_model(
        self,
        source: WeightSource,
        *,
        dtype: torch.dtype,
        max_len: int,
        block_tokens: int,
        threads: int,
        quantization: str = "",
        group: Group | None = None,
    ) -> Model:
        """With `group`, this rank's part of the model; without, all of it.

        Raises UnsupportedModel for one of executor.interface.QUANTIZATIONS that the device lacks.
        """
        ...

    def preload(
        self,
        source: WeightSource,
        *,
        dtype: torch.dtype,
        max_len: int,
        block_tokens: int,
        quantization: str = "",
    ) -> None:
        """Puts the weights where `make_model` finds them, if `source` knows a cache; no device memory is
        taken. Raises what `make_model` raises."""
        ...

    def prepare(self, model: Model, pool: Pool, max_len: int) -> None:
        """Once after both are made, before the first step: what is to be recorded is recorded."""
        ...

    def room(self) -> int:
        """Bytes that a KV pool may take where nobody says how many."""
        ...

    def peak(self, step: Callable[[], torch.Tensor]) -> int:
        """Bytes of the device's memory that `step` takes at its height."""
        ...

    def make_pool(self, layout: KVLayout, num_blocks: int) -> Pool:
        """Raises kvtransfer.pool.PoolError where the memory cannot be had."""
        ...


def _cpu(index: int) -> Device:
    from flowserve.devices.cpu import CpuDevice

    return CpuDevice()


def _cuda(index: int) -> Device:
    from flowserve.devices.cuda import CudaDevice

    return CudaDevice(index)


def _npu(index: int) -> Device:
    from flowserve.devices.npu import NpuDevice

    return NpuDevice(index)


_DEVICES: dict[str, Callable[[int], Device]] = {"cpu": _cpu, "cuda": _cuda, "npu": _npu}


def rank_device(name: str, rank: int) -> str:
    """The device of a rank whose executor was given `name`: cores are shared, accelerators are counted up
    from the named one."""
    kind, _, index = name.partition(":")
    return name if kind == "cpu" else f"{kind}:{int(index or 0) + rank}"


def open_device(name: str) -> Device:
    """Raises DeviceUnavailable for an unknown name or a device that is not there."""
    kind, _, index = name.partition(":")
    if kind not in _DEVICES or (index and not index.isdecimal()):
        known = ", ".join(_DEVICES)
        raise DeviceUnavailable(f"device {name!r} is unknown; known are {known}, with :N for the N-th")
    return _DEVICES[kind](int(index or 0))
