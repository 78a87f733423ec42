"""The ranks of one executor, each a process with a device of its own, joined by torch.distributed.

One host: ranks meet through a file in a folder that only this user can open. Backends are the devices'
own: gloo on cpu, NCCL on cuda, HCCL on npu. Every rank makes the same calls in the same order.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

TIMEOUT = timedelta(seconds=60)
"""Of meeting and of one collective (ours): a step is bounded to half a second."""


class Group:
    """This process's membership. `close` ends it; one per process at a time."""

    def __init__(self, backend: str, rank: int, size: int, meeting_file: Path) -> None:
        """Blocks until all `size` ranks are there. Raises RuntimeError after TIMEOUT."""
        if sys.platform == "linux":  # gloo would ask the resolver for this host's address, and listen there
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        self.rank, self.size = rank, size
        dist.init_process_group(
            backend, init_method=f"file://{meeting_file}", rank=rank, world_size=size, timeout=TIMEOUT
        )

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in place."""
        dist.all_reduce(values)
        return values

    def join_columns(self, values: torch.Tensor) -> torch.Tensor:
        """`[rows, n]` of every rank side by side: `[rows, size * n]`."""
        rows, columns = values.shape
        if not rows:  # known to all ranks: nothing to wait for
            return values.new_empty(0, self.size * columns)
        parts = values.new_empty(self.size, rows, columns)
        dist.all_gather(list(parts.unbind()), values.contiguous())
        return parts.transpose(0, 1).reshape(rows, -1)

    def close(self) -> None:
        dist.destroy_process_group()
