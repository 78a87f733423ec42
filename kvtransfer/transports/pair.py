"""Two processes joined by torch.distributed: the group that `collective` and `collective_serve` send through.

Loads torch, so both load it late, on a worker thread. A pair is its own process group: it needs no default
group, and leaves that of a tensor-parallel rank alone. gloo moves host memory, NCCL and HCCL a device's.
"""

from __future__ import annotations

import importlib
import os
import time
import zlib
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from kvtransfer.pool import BlockStore

MEET_SECONDS = 10.0
"""Bound of joining and of the first byte: a device's library takes seconds, loopback milliseconds (ours)."""
POLL_SECONDS = 0.002
"""Between two looks at the board, and at work of a device."""

SENDER, RECEIVER = 0, 1
DEVICES = {"gloo": "cpu", "nccl": "cuda", "hccl": "npu"}
"""Device type whose memory a backend moves."""


class MeetingStore(Store):
    """What torch's rendezvous writes and reads, on a board that both ends reach over their own authenticated
    channel: no store of torch's listens anywhere."""

    def __init__(self, put: Callable[[str, bytes], None], look: Callable[[str], bytes | None]) -> None:
        super().__init__()
        self._put = put
        self._look = look

    def set(self, key: str, value: str | bytes) -> None:
        self._put(key, value.encode() if isinstance(value, str) else bytes(value))

    def get(self, key: str) -> bytes:
        deadline = time.monotonic() + MEET_SECONDS
        while (value := self._look(key)) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the other end did not join within {MEET_SECONDS:g} s")
            time.sleep(POLL_SECONDS)
        return value

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        for key in keys:
            self.get(key)

    def check(self, keys: list[str]) -> bool:
        return all(self._look(key) is not None for key in keys)


class Pair:
    """One end. Methods block, one at a time, on one thread."""

    def __init__(self, backend: str, rank: int, board: MeetingStore, host: str, pool: BlockStore) -> None:
        """`host` is this executor's address, for a backend that listens. `pool` is this end's.

        Returns when a first byte went through. Raises OSError.
        """
        pages = device_pages(pool)
        self.device = torch.device("cpu") if backend == "gloo" or pages is None else pages.device
        self._other = 1 - rank
        try:
            self._group = _MAKERS[backend](board, rank, host)
        except (RuntimeError, ImportError, AttributeError) as error:
            raise OSError(f"{backend}: {_first_line(error)}") from error
        byte = torch.zeros(1, dtype=torch.uint8, device=self.device)
        (self.send if rank == SENDER else self.receive)(byte, MEET_SECONDS)

    def send(self, data: torch.Tensor, seconds: float) -> None:
        """Returns when `data` may change. Raises OSError, TimeoutError where `seconds` passed: then the pair
        is of no more use."""
        self._complete(self._group.send, data, seconds)

    def receive(self, data: torch.Tensor, seconds: float) -> None:
        """Fills `data`. Raises as `send`."""
        self._complete(self._group.recv, data, seconds)

    def close(self) -> None:
        """Ends what still waits, where the backend can."""
        if self.device.type != "cpu":  # gloo's wait has its own bound, and its sockets close with it
            self._group.abort()

    def _complete(
        self, call: Callable[[list[torch.Tensor], int, int], Any], data: torch.Tensor, seconds: float
    ) -> None:
        deadline = time.monotonic() + seconds
        try:
            work = call([data], self._other, 0)
            if self.device.type == "cpu":
                work.wait(timedelta(seconds=max(seconds, POLL_SECONDS)))
                return
            while not work.is_completed():  # wait() would only order streams, and knows no bound
                if time.monotonic() > deadline:
                    self._group.abort()
                    raise TimeoutError(f"no end within {seconds:g} s")
                time.sleep(POLL_SECONDS)
            work.wait()
        except RuntimeError as error:
            raise (TimeoutError if time.monotonic() > deadline else ConnectionError)(
                _first_line(error)
            ) from error


class DevicePages(Protocol):
    """A BlockStore whose pages a device's library reaches where they lie (`flowserve.devices`)."""

    @property
    def device_pages(self) -> torch.Tensor:
        """`[blocks, *layout.shape]`; announced blocks are complete for the default stream."""
        ...


def device_pages(store: BlockStore) -> torch.Tensor | None:
    """None for host memory, and for a store that is reached by copies only."""
    pages = getattr(store, "device_pages", None)
    return pages if isinstance(pages, torch.Tensor) else None


def backends(store: BlockStore) -> list[str]:
    """Those that can move this pool's blocks here, best first: the device's own, then gloo through host
    memory. Empty where torch has none."""
    pages = device_pages(store)
    there = {
        "gloo": dist.is_available() and dist.is_gloo_available(),
        "nccl": dist.is_available() and dist.is_nccl_available(),
        "hccl": hasattr(dist, "is_hccl_available"),  # torch_npu adds it when the device is opened
    }
    own = [name for name, device in DEVICES.items() if pages is not None and pages.device.type == device]
    return [name for name in dict.fromkeys([*own, "gloo"]) if there[name]]


def as_bytes(pages: torch.Tensor) -> torch.Tensor:
    """`[blocks, bytes of a block]` over the same memory."""
    return pages.view(len(pages), -1).view(torch.uint8)


def gathered(pages: torch.Tensor, blocks: Sequence[int], heads: tuple[int, int]) -> torch.Tensor:
    """Bytes of those blocks one after the other, of the heads `(first, count)` alone; count 0 is all."""
    some = pages[torch.tensor(blocks, device=pages.device)]
    first, count = heads
    if count:
        some = some[:, :, :, first : first + count].contiguous()
    return some.view(-1).view(torch.uint8)


def put(pages: torch.Tensor, blocks: Sequence[int], data: torch.Tensor) -> None:
    """The inverse of `gathered`, of whole blocks. Returns when later work of the device sees them."""
    rows = data.to(pages.device).view(len(blocks), -1)
    as_bytes(pages).index_copy_(0, torch.tensor(blocks, device=pages.device), rows)


def from_views(buffers: Sequence[memoryview]) -> torch.Tensor:
    """The buffers' bytes as one tensor: over the same memory for one writable buffer, else copied."""
    one = len(buffers) == 1 and not buffers[0].readonly
    return torch.frombuffer(buffers[0] if one else bytearray().join(buffers), dtype=torch.uint8)


def view_of(data: torch.Tensor) -> memoryview:
    """The bytes in host memory: copied there from a device's."""
    return data.cpu().numpy().data


def crc32(data: torch.Tensor) -> int:
    return zlib.crc32(view_of(data))


def _gloo(board: MeetingStore, rank: int, host: str) -> Any:
    options: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # torch's stub lacks it
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
    options._timeout = timedelta(seconds=MEET_SECONDS)
    options._threads = 1
    return dist.ProcessGroupGloo(board, rank, 2, options)


def _nccl(board: MeetingStore, rank: int, host: str) -> Any:
    # By default a lost peer ends the whole process; ours are noticed by `_complete`.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=MEET_SECONDS)
    return dist.ProcessGroupNCCL(board, rank, 2, options)


def _hccl(board: MeetingStore, rank: int, host: str) -> Any:
    # Where torch_npu's own backend hook makes them (torch_npu 2.7).
    group = importlib.import_module("torch_npu._C._distributed_c10d").ProcessGroupHCCL
    options = group.Options()
    options._timeout = timedelta(seconds=MEET_SECONDS)
    return group(board, rank, 2, options)


_MAKERS: dict[str, Callable[[MeetingStore, int, str], Any]] = {"gloo": _gloo, "nccl": _nccl, "hccl": _hccl}


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
