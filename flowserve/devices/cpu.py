"""CPU cores: the KV pool is a memory file that peers can map, the step is compiled where that is built."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from flowserve.devices import Model, Pool
from flowserve.devices.native.library import NativeLlama, NativeUnavailable
from flowserve.models.errors import UnsupportedModel
from flowserve.models.llama import TorchLlama
from flowserve.models.loader import DTYPES
from flowserve.models.weights import WeightSource
from kvtransfer.layout import KVLayout
from kvtransfer.pool import HostPool, available_memory

if TYPE_CHECKING:
    from flowserve.devices.collective import Group

PREFAULT_FIRST_BYTES = 64 << 20
"""A pool up to here is taken at once: 20 ms (ours)."""

ROOM_SHARE = 0.5
"""Of the memory that is free to the process, for KV whose size nobody says (ours)."""

log = logging.getLogger(__name__)


class CpuPool:
    """A tensor over a HostPool's pages, without a copy.

    A large pool's memory is taken beside the first requests: they find the first blocks' pages one by one.
    """

    def __init__(self, layout: KVLayout, num_blocks: int) -> None:
        large = num_blocks * layout.block_bytes > PREFAULT_FIRST_BYTES
        self.store = HostPool.create(layout, num_blocks, prefault=not large)
        self._closing = threading.Event()
        self._prefault = threading.Thread(target=self._take_memory, name="kv-prefault", daemon=True)
        if large:
            self._prefault.start()
        flat = torch.frombuffer(self.store.pages, dtype=DTYPES[layout.dtype])
        self.pages = flat.view(num_blocks, *layout.shape)

    def _take_memory(self) -> None:
        if not self.store.prefault(self._closing.is_set):
            log.info("the KV pool's memory is taken as it is used")

    def close(self) -> None:
        self._closing.set()
        if self._prefault.is_alive():
            self._prefault.join()
        self.pages = torch.empty(0)
        self.store.close()


class CpuDevice:
    name = "cpu"

    def set_threads(self, threads: int) -> None:
        torch.set_num_threads(threads)

    def join(self, rank: int, size: int, meeting_file: Path) -> Group:
        from flowserve.devices.collective import Group

        return Group("gloo", rank, size, meeting_file)

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
        if group is not None:  # the compiled step has no place for sums over ranks
            return TorchLlama(
                source, dtype=matmul_dtype(dtype), device=torch.device("cpu"), max_len=max_len, group=group
            )
        try:
            model = NativeLlama(
                source,
                dtype=dtype,
                max_len=max_len,
                block_tokens=block_tokens,
                threads=threads,
                quantization=quantization,
            )
        except NativeUnavailable as reason:
            if quantization:
                raise UnsupportedModel(
                    f"quantization {quantization} needs the compiled CPU step: {reason}"
                ) from reason
            log.warning("compiled CPU step not used: %s; falling back to torch", reason)
            return TorchLlama(source, dtype=matmul_dtype(dtype), device=torch.device("cpu"), max_len=max_len)
        # The step has threads of its own, and what is left to torch (sampling) is small: its OpenMP
        # threads would only spin after each operation on the cores that the next step needs.
        torch.set_num_threads(1)
        return model

    def preload(
        self,
        source: WeightSource,
        *,
        dtype: torch.dtype,
        max_len: int,
        block_tokens: int,
        quantization: str = "",
    ) -> None:
        threads = torch.get_num_threads()
        self.make_model(
            source,
            dtype=dtype,
            max_len=max_len,
            block_tokens=block_tokens,
            threads=1,
            quantization=quantization,
        ).close()
        torch.set_num_threads(threads)

    def prepare(self, model: Model, pool: Pool, max_len: int) -> None:
        """Nothing is recorded."""

    def room(self) -> int:
        """A share of what is free: others of the node want some of it too."""
        return int(ROOM_SHARE * available_memory())

    def peak(self, step: Callable[[], torch.Tensor]) -> int:
        """0 where the system does not tell."""
        try:
            _give_back()
            Path("/proc/self/clear_refs").write_text("5")  # the height of before is forgotten
            before = _resident()
            step()
            return max(0, _resident("VmHWM") - before)
        except OSError:
            return 0

    def make_pool(self, layout: KVLayout, num_blocks: int) -> CpuPool:
        return CpuPool(layout, num_blocks)


def _give_back() -> None:
    """What was freed goes back to the system, so that it counts when it is taken again."""
    gc.collect()
    with contextlib.suppress(AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def _resident(line: str = "VmRSS") -> int:
    """Bytes. Raises OSError where the system does not tell."""
    for found in Path("/proc/self/status").read_text().splitlines():
        if found.startswith(f"{line}:"):
            return int(found.split()[1]) << 10
    raise OSError(f"no {line} in /proc/self/status")


def matmul_dtype(dtype: torch.dtype) -> torch.dtype:
    """What torch should multiply in for weights of `dtype`.

    Without AVX-512 BF16 (or AMX, or Arm's equivalent) torch multiplies bf16 at a tenth of float32's
    rate, and float16 always: such weights are widened, which is exact; KV pages keep their dtype.
    """
    if dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return dtype
    return torch.float32
