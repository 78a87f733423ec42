"""NVIDIA GPUs through torch's own CUDA support."""

from __future__ import annotations

import torch

from flowserve.devices import DeviceUnavailable
from flowserve.devices.accelerator import AcceleratorDevice


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
        super().__init__(f"cuda:{index}", torch.device("cuda", index))
