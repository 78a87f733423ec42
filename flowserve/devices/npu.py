"""Ascend NPUs through torch-npu, the production target.

Written against torch-npu's documented API (`import torch_npu` registers the device type `npu` with
torch, `torch.npu.is_available`, `torch.npu.device_count`, `torch.npu.set_device`). It has not run on
Ascend hardware: no such device was at hand. Everything else of the path is the code that cuda runs.
"""

from __future__ import annotations

import torch

from flowserve.devices import DeviceUnavailable
from flowserve.devices.accelerator import AcceleratorDevice


class NpuDevice(AcceleratorDevice):
    def __init__(self, index: int) -> None:
        """Raises DeviceUnavailable, saying whether the package, CANN or the index is the problem."""
        try:
            import torch_npu  # noqa: F401  registers the device type
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
        super().__init__(f"npu:{index}", torch.device("npu", index))
