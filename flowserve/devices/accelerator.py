"""What cuda and npu share: a pool in device memory that transfers reach through host copies."""

from __future__ import annotations

import threading

import torch

from flowserve.models.errors import UnsupportedModel
from flowserve.models.llama import TorchLlama
from flowserve.models.loader import DTYPES
from flowserve.models.weights import WeightSource
from kvtransfer.layout import KVLayout
from kvtransfer.pool import PoolError


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
    """A torch device with memory of its own. Subclasses check that it is there."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.name = name
        self._device = device

    def set_threads(self, threads: int) -> None:
        torch.set_num_threads(threads)  # sampling's host side and weight conversion

    def make_model(
        self,
        source: WeightSource,
        *,
        dtype: torch.dtype,
        max_len: int,
        block_tokens: int,
        threads: int,
        quantization: str = "",
    ) -> TorchLlama:
        if quantization:
            raise UnsupportedModel(f"quantization {quantization} is not implemented on {self.name}")
        return TorchLlama(source, dtype=dtype, device=self._device, max_len=max_len)

    def make_pool(self, layout: KVLayout, num_blocks: int) -> DevicePool:
        return DevicePool(layout, num_blocks, self._device)
