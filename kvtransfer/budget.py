"""A bound on the bytes that are being copied at once, served in order.

The receiver's back-pressure: a burst of late pulls would otherwise have every pool's worth of sockets,
buffers and memory traffic in flight together, and all of them would end late. One asyncio loop.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator


class ByteBudget:
    """First come, first served: a large copy is not overtaken for ever by small ones."""

    def __init__(self, limit: int) -> None:
        if limit < 1:
            raise ValueError(f"the limit must be positive, is {limit}")
        self._limit = limit
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self.used = 0

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @contextlib.asynccontextmanager
    async def hold(self, size: int) -> AsyncIterator[None]:
        """`size` bytes of the budget for the time of the context; a copy above the limit runs alone."""
        size = min(size, self._limit)
        if self._waiting or self.used + size > self._limit:
            await self._turn(size)
        else:
            self.used += size
        try:
            yield
        finally:
            self.used -= size
            self._serve()

    async def _turn(self, size: int) -> None:
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((size, future))
        try:
            await future
        except asyncio.CancelledError:
            if not future.cancelled():
                self.used -= size  # granted in the same turn of the loop as cancelled
            self._serve()  # it may have stood before one that fits
            raise

    def _serve(self) -> None:
        while self._waiting:
            size, future = self._waiting[0]
            if not future.cancelled():
                if self.used + size > self._limit:
                    return
                self.used += size
                future.set_result(None)
            self._waiting.popleft()
