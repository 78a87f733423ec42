"""The host tier: pages of evicted blocks in host memory, bounded in bytes.

Called by `flowserve.rtc.cache` alone, on the engine's thread. Pages are immutable once put here, so
a match may hold one while the tier drops it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from flowserve.rtc.pagefile import Page


class HostTier:
    """Identity -> page, least recently used out first. Capacity 0 = the tier is off."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self._pages: OrderedDict[bytes, Page] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._pages)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._pages)

    def __contains__(self, identity: bytes) -> bool:
        return identity in self._pages

    @property
    def used_bytes(self) -> int:
        return self._bytes

    def takes(self, size: int) -> bool:
        """Whether a page of `size` bytes could be kept at all."""
        return size <= self.capacity_bytes

    def items(self) -> list[tuple[bytes, Page]]:
        """Least recently used first."""
        return list(self._pages.items())

    def get(self, identity: bytes) -> Page | None:
        page = self._pages.get(identity)
        if page is not None:
            self._pages.move_to_end(identity)
        return page

    def put(self, identity: bytes, page: Page) -> list[tuple[bytes, Page]]:
        """Keeps a page; returns the pages dropped for it (itself, if it is too large)."""
        size = len(page)
        if not self.takes(size):
            return [(identity, page)]
        self.drop(identity)
        dropped: list[tuple[bytes, Page]] = []
        while self._bytes + size > self.capacity_bytes:
            old, gone = self._pages.popitem(last=False)
            self._bytes -= len(gone)
            dropped.append((old, gone))
        self._pages[identity] = page
        self._bytes += size
        return dropped

    def drop(self, identity: bytes) -> bool:
        page = self._pages.pop(identity, None)
        if page is None:
            return False
        self._bytes -= len(page)
        return True
