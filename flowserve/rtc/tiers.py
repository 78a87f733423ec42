"""The tiers behind the device as one: host memory first, what that lets go on the disk.

Called by `flowserve.rtc.cache` on the engine's thread. An identity is *behind* while one of them holds its
page; where it is looked up they are asked in the order in which they are fast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from flowserve.rtc import metrics
from flowserve.rtc.costs import TierCosts
from flowserve.rtc.disk import DiskTier, OnDisk
from flowserve.rtc.host import HostTier
from flowserve.rtc.pagefile import Page

Stored = Page | OnDisk
"""A page in memory, or one to be read."""
Load = Callable[[], Page]


class Tiers:
    """Host tier, disk tier, and what bringing a page back from each costs."""

    def __init__(self, page_bytes: int, host_bytes: int, disk: DiskTier | None) -> None:
        self.host = HostTier(host_bytes)
        self.costs = TierCosts(page_bytes)
        self._disk = disk
        self._page_bytes = page_bytes

    def __contains__(self, identity: bytes) -> bool:
        return identity in self.host or (self._disk is not None and identity in self._disk)

    def __iter__(self) -> Iterator[bytes]:
        return iter(set(self.host).union(self._disk or ()))

    def page(self, identity: bytes) -> Stored | None:
        page = self.host.get(identity)
        return page if page is not None or self._disk is None else self._disk.get(identity)

    def keep(self, identity: bytes, load: Load) -> list[bytes]:
        """An evicted block's page goes to the first tier that takes it; `load` copies it.

        Returns the identities that are behind no longer, because their pages had to give way.
        """
        if self.host.get(identity) is not None:
            return []
        if not self.host.takes(self._page_bytes):
            self._write(identity, load)
            return []
        pushed = self.host.put(identity, load())
        for dropped, page in pushed:
            self._write(dropped, _constant(page))
        return [dropped for dropped, _ in pushed if dropped not in self]

    def forget(self, identity: bytes) -> bool:
        """Its page cannot be used. False if there was none."""
        on_host = self.host.drop(identity)
        on_disk = self._disk is not None and self._disk.drop(identity)
        return on_host or on_disk

    def clear_host(self) -> list[bytes]:
        """Empties host memory; the disk is other executors' too. Returns what is behind no longer."""
        dropped = list(self.host)
        for identity in dropped:
            self.host.drop(identity)
        return [identity for identity in dropped if identity not in self]

    def collect(self) -> tuple[list[bytes], list[bytes]]:
        """What the disk's writer did: (identities that are behind now, that are no longer)."""
        if self._disk is None:
            return [], []
        came, went = self._disk.collect()
        here = self.host.__contains__
        return [i for i in came if not here(i)], [i for i in went if not here(i)]

    def seconds(self, pages: Iterable[Stored | None]) -> float:
        """What bringing the pages is expected to take."""
        counts = [0, 0]
        for page in pages:
            if page is not None:
                counts[isinstance(page, OnDisk)] += 1
        return self.costs.seconds(*counts)

    def declined(self, pages: Iterable[Stored | None]) -> None:
        """They are computed instead, because `seconds` was too much."""
        self.costs.declined()
        on_disk = any(isinstance(page, OnDisk) for page in pages)
        metrics.DECLINED.labels("disk" if on_disk else "host").inc()

    def close(self, blocks: Iterable[tuple[bytes, Load]], seconds: float) -> None:
        """Writes the device's `blocks` and host memory to the disk for its next user, for so long."""
        if self._disk is not None:
            pages = [(identity, _constant(page)) for identity, page in self.host.items()]
            self._disk.close([*blocks, *pages], seconds)

    def _write(self, identity: bytes, load: Load) -> None:
        """Queues a page for the disk, where there is one that takes it and has it not."""
        if self._disk is not None and identity not in self._disk and self._disk.takes():
            self._disk.put(identity, load())


def _constant(page: Page) -> Load:
    return lambda: page
