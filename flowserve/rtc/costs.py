"""What bringing a page back costs, tier by tier, as measured: one side of populate or recompute.

Called by `flowserve.rtc.cache`; the other side is the engine's cost model of steps. Numbers only.
"""

from __future__ import annotations

FIRST_HOST_RATE = 4e9
"""Bytes per second of a copy out of host memory until one was measured (ours): half of a core's memcpy."""
FIRST_DISK_RATE = 4e8
"""The same from a disk, checksum included (ours): a local SSD's, well below what memory caches give."""
LEARNING = 0.1
"""Weight of the newest page (ours): pages of one population follow each other."""
DOUBT = 0.02
"""Each time an estimate kept a tier from being used, it moves so much towards the first guess (ours): a tier
that is never used is never measured again."""


class TierCosts:
    """Seconds of a page from host memory and from the disk. `took` may come from another thread."""

    def __init__(self, page_bytes: int) -> None:
        self._first = (page_bytes / FIRST_HOST_RATE, page_bytes / FIRST_DISK_RATE)
        self._host, self._disk = self._first

    def took(self, seconds: float, *, on_disk: bool) -> None:
        """One page was brought."""
        if on_disk:
            self._disk += LEARNING * (seconds - self._disk)
        else:
            self._host += LEARNING * (seconds - self._host)

    def seconds(self, host_pages: int, disk_pages: int) -> float:
        return host_pages * self._host + disk_pages * self._disk

    def declined(self) -> None:
        """The estimate was acted upon, and will not be tested."""
        self._host += DOUBT * (self._first[0] - self._host)
        self._disk += DOUBT * (self._first[1] - self._disk)
