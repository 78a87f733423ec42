"""What cuda and npu share: a pool in device memory that transfers reach through host copies, and models
whose decodes are recorded graphs."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from flowserve.devices import Model, Pool
from flowserve.devices.collective import Group
from flowserve.devices.graphs import GRAPHS_ENV, Captured, GraphedLlama
from flowserve.models.errors import UnsupportedModel
from flowserve.models.layout import TorchLayout
from flowserve.models.llama import DecodeAttention, Elementwise, TorchLlama
from flowserve.models.loader import DTYPES
from flowserve.models.weights import WeightSource
from kvtransfer.layout import KVLayout
from kvtransfer.pool import PoolError

ROOM_SHARE = 0.92
"""Of the memory that is free once weights lie there, for KV whose size nobody says (vLLM's default share)."""
MEMORY_CALLS = (
    "mem_get_info", "memory_allocated", "max_memory_allocated", "reset_peak_memory_stats", "synchronize",
    "empty_cache",
)  # fmt: skip
"""What is asked of a device's module of torch, here and in TorchLlama.sleep."""


class DeviceStore:
    """A BlockStore over device pages: `view` is None, so transfers use `load` and `store` on worker threads.

    Copies are synchronous: when `store` returns, the pages hold the data for every later kernel of the
    device's default stream.
    """

    def __init__(self, layout: KVLayout, pages: torch.Tensor) -> None:
        self._layout = layout
        self._pages = pages
        self._generations = [0] * len(pages)
        self._lock = threading.Lock()

    @property
    def layout(self) -> KVLayout:
        return self._layout

    @property
    def num_blocks(self) -> int:
        return len(self._generations)

    def generation(self, block: int) -> int:
        return self._generations[block]

    def bump(self, block: int) -> None:
        with self._lock:
            self._generations[block] += 1

    def view(self, start: int, count: int) -> None:
        return None

    @property
    def device_pages(self) -> torch.Tensor:
        """`[blocks, *layout.shape]` where they lie, for `kvtransfer.transports.pair`."""
        return self._pages

    def load(self, start: int, count: int) -> memoryview:
        host = self._pages[start : start + count].cpu().contiguous()
        return host.view(-1).view(torch.uint8).numpy().data

    def store(self, start: int, data: bytes | bytearray | memoryview) -> None:
        count, rest = divmod(len(data), self._layout.block_bytes)
        if rest or start < 0 or start + count > self.num_blocks:
            raise ValueError(f"{len(data)} bytes from block {start} are not whole blocks of the pool")
        host = torch.frombuffer(bytearray(data), dtype=self._pages.dtype)
        self._pages[start : start + count].copy_(host.view(count, *self._layout.shape))


class DevicePool:
    def __init__(self, layout: KVLayout, num_blocks: int, device: torch.device) -> None:
        try:
            self.pages = torch.zeros(num_blocks, *layout.shape, dtype=DTYPES[layout.dtype], device=device)
        except torch.OutOfMemoryError as error:
            raise PoolError(
                f"cannot allocate a KV pool of {num_blocks} blocks on {device}: {error}"
            ) from error
        self.store = DeviceStore(layout, self.pages)

    def close(self) -> None:
        self.pages = torch.empty(0)


class AcceleratorDevice:
    """A torch device with memory of its own. Subclasses check that it is there, and know its attention kernel
    and how its graphs are recorded."""

    def __init__(self, name: str, device: torch.device, backend: str) -> None:
        """`backend` is torch.distributed's name of the device's collectives."""
        self.name = name
        self._device = device
        self._backend = backend

    def attention(self, dtype: torch.dtype, block_tokens: int) -> DecodeAttention | None:
        """The kernel for decodes over the paged pool; None: plain torch, which gathers first."""
        raise NotImplementedError

    def elementwise(self) -> Elementwise | None:
        """The device's kernels for what stands between matrices; None: plain torch."""
        return None

    def capture(self, step: Callable[[], torch.Tensor]) -> Captured:
        """Runs `step` to warm up, then records it."""
        raise NotImplementedError

    def set_threads(self, threads: int) -> None:
        torch.set_num_threads(threads)  # sampling's host side and weight conversion

    def join(self, rank: int, size: int, meeting_file: Path) -> Group:
        return Group(self._backend, rank, size, meeting_file)

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
        if quantization:
            raise UnsupportedModel(f"quantization {quantization} is not implemented on {self.name}")
        attention = self.attention(dtype, block_tokens)
        model = TorchLlama(
            source,
            dtype=dtype,
            device=self._device,
            max_len=max_len,
            attention=attention,
            elementwise=self.elementwise(),
            group=group,
        )
        # Without a kernel a recorded step would gather whole block tables, used or not.
        if attention is None or os.environ.get(GRAPHS_ENV) == "0":
            return model
        return GraphedLlama(model, self.capture)

    def preload(
        self,
        source: WeightSource,
        *,
        dtype: torch.dtype,
        max_len: int,
        block_tokens: int,
        quantization: str = "",
    ) -> None:
        if quantization:
            raise UnsupportedModel(f"quantization {quantization} is not implemented on {self.name}")
        _, image = TorchLayout(source.config, dtype, max_len).load(source)
        if image is not None:
            image.close()

    def prepare(self, model: Model, pool: Pool, max_len: int) -> None:
        if isinstance(model, GraphedLlama):
            model.prepare(pool.pages, max_len)

    def room(self) -> int:
        """What is free on the device but for a margin."""
        free, _ = self._memory.mem_get_info(self._device)
        return int(ROOM_SHARE * free)

    def peak(self, step: Callable[[], torch.Tensor]) -> int:
        memory = self._memory
        memory.reset_peak_memory_stats(self._device)
        before = memory.memory_allocated(self._device)
        step()
        memory.synchronize()
        height = int(memory.max_memory_allocated(self._device)) - int(before)
        memory.empty_cache()  # or the free memory would lack it
        return height

    @property
    def _memory(self) -> Any:
        """`torch.cuda`, `torch.npu`: of it MEMORY_CALLS are used."""
        return torch.get_device_module(self._device)

    def make_pool(self, layout: KVLayout, num_blocks: int) -> DevicePool:
        return DevicePool(layout, num_blocks, self._device)
