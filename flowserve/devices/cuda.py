"""NVIDIA GPUs through torch's own CUDA support: Triton attention over the paged pool, CUDA graphs, NCCL."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from flowserve.devices import DeviceUnavailable
from flowserve.devices.accelerator import AcceleratorDevice
from flowserve.models.llama import DecodeAttention, Elementwise

log = logging.getLogger(__name__)

WARM_UPS = 2
"""Runs before a recording: libraries choose kernels and take workspaces, Triton compiles (ours)."""


class CudaGraph:
    """A recorded step."""

    def __init__(self, step: Callable[[], torch.Tensor], pool: Any) -> None:
        """`pool` is the memory that recordings share: only one replays at a time."""
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # as recording does: nothing is left to the default stream
            for _ in range(WARM_UPS):
                step()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads of an executor (transfers) may use the device meanwhile.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self.logits = step()

    def replay(self, lengths: Sequence[int]) -> None:
        self._graph.replay()


class CudaDevice(AcceleratorDevice):
    def __init__(self, index: int) -> None:
        """Raises DeviceUnavailable, saying whether the build, the driver or the index is the problem."""
        if not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]  # torch
            raise DeviceUnavailable(
                "this torch is built without CUDA: install a CUDA build of torch (extra `cuda`)"
            )
        if not torch.cuda.is_available():
            raise DeviceUnavailable("torch sees no CUDA device: check the driver and CUDA_VISIBLE_DEVICES")
        if index >= torch.cuda.device_count():
            raise DeviceUnavailable(
                f"cuda:{index} does not exist: {torch.cuda.device_count()} device(s) are visible"
            )
        super().__init__(f"cuda:{index}", torch.device("cuda", index), "nccl")
        self._pool: Any = None

    def attention(self, dtype: torch.dtype, block_tokens: int) -> DecodeAttention | None:
        if block_tokens < 16 or block_tokens & (block_tokens - 1):
            return None
        try:
            from flowserve.devices.paged_attention import paged_attention
        except ImportError as error:
            log.warning("Triton is not there (%s): decodes gather their KV, and run without graphs", error)
            return None
        return paged_attention

    def elementwise(self) -> Elementwise | None:
        try:
            from flowserve.devices.fused import FUSED
        except ImportError:  # told above
            return None
        return FUSED

    def capture(self, step: Callable[[], torch.Tensor]) -> CudaGraph:
        with torch.cuda.device(self._device):  # the thread's own need not be ours
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            return CudaGraph(step, self._pool)
