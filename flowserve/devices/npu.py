"""Ascend NPUs through torch-npu, the production target: fused paged attention, NPU graphs, HCCL.

Everything else of the path is the code that cuda runs. It has not run on Ascend hardware: no such device
was at hand. What it asks of torch-npu is checked against the published wheel's own schemas, meta
functions and sources (`tests/unit/flowserve/devices/test_npu_signatures.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from flowserve.devices import DeviceUnavailable
from flowserve.devices.accelerator import AcceleratorDevice
from flowserve.models.llama import DecodeAttention, Spans

WARM_UPS = 2
"""Runs before a recording (ours)."""


def paged_attention(q: torch.Tensor, pages: torch.Tensor, layer: int, spans: Spans) -> torch.Tensor:
    """A `flowserve.models.llama.DecodeAttention` by `npu_fused_infer_attention_score`, for float16, bfloat16
    and blocks of a multiple of 16 tokens.

    The operator takes keys and values as tensors of the same shape, without strides, and one table for
    both. Seen as single planes [kv_heads, tokens, dim], the pool has the keys of (block, layer) at number
    (block * layers + layer) * 2 and the values one further on: the same table, in the pool less its first
    plane.
    """
    import torch_npu

    n, heads, dim = q.shape
    _, layers, _, kv_heads, block_tokens, _ = pages.shape
    planes = pages.view(-1, kv_heads, block_tokens, dim)
    out, _ = torch_npu.npu_fused_infer_attention_score(
        q.view(n, heads, 1, dim),
        planes[:-1],
        planes[1:],
        actual_seq_lengths_kv=list(spans.lengths),
        block_table=(spans.tables * layers + layer) * 2,
        num_heads=heads,
        scale=dim**-0.5,
        input_layout="BNSD",
        num_key_value_heads=kv_heads,
        block_size=block_tokens,
    )
    return out.view(n, heads, dim)  # type: ignore[no-any-return]  # torch-npu has no types


class NpuGraph:
    """A recorded step. The lengths of `paged_attention` are arguments on the host, so a recording holds those
    of its time: they are given anew to each replay, as one update for the calls of all layers."""

    def __init__(self, step: Callable[[], torch.Tensor], pool: Any) -> None:
        """`pool` is the memory that recordings share: only one replays at a time."""
        npu = torch.npu  # type: ignore[attr-defined]  # added by torch_npu
        for _ in range(WARM_UPS):
            step()
        npu.synchronize()
        self._graph = npu.NPUGraph()
        with npu.graph(self._graph, pool=pool, auto_dispatch_capture=True, capture_error_mode="thread_local"):
            self.logits = step()

    def replay(self, lengths: Sequence[int]) -> None:
        self._graph.update(cpu_update_input=[{"actual_seq_lengths_kv": list(lengths)}])
        self._graph.replay()


class NpuDevice(AcceleratorDevice):
    def __init__(self, index: int) -> None:
        """Raises DeviceUnavailable, saying whether the package, CANN or the index is the problem."""
        try:
            import torch_npu  # noqa: F401  registers the device type, and HCCL
        except ImportError as error:
            raise DeviceUnavailable(
                f"torch-npu cannot be imported ({error}): install the extra `npu` and Ascend's CANN runtime"
            ) from error
        npu = torch.npu  # type: ignore[attr-defined]  # added by torch_npu
        if not npu.is_available():
            raise DeviceUnavailable("torch-npu sees no NPU: check the driver and ASCEND_RT_VISIBLE_DEVICES")
        if index >= npu.device_count():
            raise DeviceUnavailable(f"npu:{index} does not exist: {npu.device_count()} device(s) are visible")
        npu.set_device(index)
        super().__init__(f"npu:{index}", torch.device("npu", index), "hccl")
        self._pool: Any = None

    def attention(self, dtype: torch.dtype, block_tokens: int) -> DecodeAttention | None:
        half = dtype in (torch.float16, torch.bfloat16)
        return paged_attention if half and block_tokens % 16 == 0 else None

    def capture(self, step: Callable[[], torch.Tensor]) -> NpuGraph:
        npu = torch.npu  # type: ignore[attr-defined]  # added by torch_npu
        self._pool = self._pool or npu.graph_pool_handle()
        return NpuGraph(step, self._pool)
