"""The disk tier: pages that host memory let go, in a folder that outlives the executor.

Called by `flowserve.rtc.cache`. The engine's thread only looks into sets and puts pages into a bounded
queue; one thread behind it writes, evicts and counts (`flowserve.rtc.folder`), and tells what became of them
in messages that `collect` takes in. Pages are read on the thread that populates. A disk that fails, or is
slower than the evictions, costs pages, never a step.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from flowserve.rtc import metrics
from flowserve.rtc.folder import PageFolder
from flowserve.rtc.pagefile import Page, PageLost, Seal
from kvtransfer.layout import KVLayout

log = logging.getLogger(__name__)

WRITE_BEHIND_BYTES = 64 << 20
"""Pages that wait to be written (ours): what a disk of 200 MB/s takes in a third of a second."""
SCAN_SECONDS = 10.0
"""How often it looks whether others wrote into the folder (ours)."""
PAUSE_SECONDS = 30.0
"""After a failed write nothing is written for so long (ours): a full or broken disk is not hammered."""
FLUSH_SECONDS = 2.0
"""For writing what is in memory when the executor stops (ours): well below the grace it is given."""


@dataclass(frozen=True, slots=True)
class OnDisk:
    """A page to be read from the disk. Any thread."""

    identity: bytes
    tier: DiskTier

    def read(self) -> bytearray:
        """Raises PageLost; a bad file is removed then."""
        return self.tier.read(self.identity)


class DiskTier:
    """Identities of pages on the disk, with a writer behind. Engine's thread, but for `read`."""

    def __init__(
        self,
        folder: Path,
        capacity_bytes: int,
        layout: KVLayout,
        *,
        token: str = "",
        pending_bytes: int = WRITE_BEHIND_BYTES,
        scan_seconds: float = SCAN_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises OSError where the folder cannot be used. What is in it already is found by the writer."""
        self._folder = PageFolder(folder, capacity_bytes, Seal.of(layout, token))
        self._page_bytes = layout.block_bytes
        self._room = max(1, pending_bytes // layout.block_bytes) if self._folder.takes_pages() else 0
        self._scan_seconds = scan_seconds
        self._clock = clock
        self._held: set[bytes] = set()  # as far as messages were taken in
        self._pending: dict[bytes, Page] = {}  # to be written; read from here meanwhile
        self._mail = threading.Condition()  # guards what is below
        self._jobs: deque[tuple[bytes, Page | None]] = deque()  # a page to write, or None: to remove
        self._told: list[tuple[bytes, bool]] = []  # identity, whether it is on the disk now
        self._working = False
        self._stopping = False
        self._paused_until = 0.0
        self._thread = threading.Thread(target=self._run, name="rtc-disk", daemon=True)
        self._thread.start()

    def __contains__(self, identity: bytes) -> bool:
        return identity in self._held or identity in self._pending

    def __iter__(self) -> Iterator[bytes]:
        yield from self._held
        yield from self._pending.keys() - self._held

    @property
    def used_bytes(self) -> int:
        return self._folder.used_bytes

    def get(self, identity: bytes) -> Page | OnDisk | None:
        page = self._pending.get(identity)
        if page is not None:
            return page
        return OnDisk(identity, self) if identity in self._held else None

    def takes(self) -> bool:
        """Whether `put` would keep a page."""
        return len(self._pending) < self._room

    def put(self, identity: bytes, page: Page) -> bool:
        """Keeps a page that does not change any more; False where too many wait to be written."""
        if identity in self:
            return True
        if not self.takes():
            metrics.DISK_DROPPED.labels("queue_full").inc()
            return False
        self._pending[identity] = page
        self._post(identity, page)
        return True

    def drop(self, identity: bytes) -> bool:
        """Forgets a page that could not be read, and removes it. False if it was not known."""
        known = identity in self
        self._held.discard(identity)
        self._pending.pop(identity, None)
        if known:
            self._post(identity, None)
        return known

    def collect(self) -> tuple[list[bytes], list[bytes]]:
        """What the writer did since the last call: (identities that came, that went)."""
        with self._mail:
            if not self._told:
                return [], []
            told, self._told = self._told, []
        before = {identity: identity in self for identity, _ in told}
        for identity, held in told:
            self._pending.pop(identity, None)
            (self._held.add if held else self._held.discard)(identity)
        metrics.DISK_PENDING.set(len(self._pending) * self._page_bytes)
        came = [identity for identity, was in before.items() if not was and identity in self]
        went = [identity for identity, was in before.items() if was and identity not in self]
        return came, went

    def read(self, identity: bytes) -> bytearray:
        """Any thread. Raises PageLost; a bad file is removed."""
        started = time.perf_counter()
        try:
            page = self._folder.read(identity)
        except PageLost as lost:
            metrics.DISK_LOST.labels("bad" if lost.bad else "gone").inc()
            (log.warning if lost.bad else log.info)("%s", lost)
            raise
        metrics.DISK_READ_SECONDS.observe(time.perf_counter() - started)
        return page

    def close(self, pages: Iterable[tuple[bytes, Callable[[], Page]]] = (), seconds: float = 0.0) -> None:
        """Writes what waits, and `pages`, for at most `seconds`; then ends the writer. Blocks so long."""
        deadline = time.monotonic() + seconds
        for identity, load in pages:
            if self._room == 0 or not self._wait(lambda: len(self._jobs) < self._room, deadline):
                break
            if identity not in self:
                self._pending[identity] = page = load()
                self._post(identity, page)
        self._wait(lambda: not self._jobs and not self._working, deadline)
        with self._mail:
            if self._jobs:
                log.info("%d pages were not written before the end", len(self._jobs))
                metrics.DISK_DROPPED.labels("stopped").inc(len(self._jobs))
            self._jobs.clear()
            self._stopping = True
            self._mail.notify_all()
        self._thread.join(max(1.0, seconds))

    # -- the writer ------------------------------------------------------------------------------

    def _post(self, identity: bytes, page: Page | None) -> None:
        with self._mail:
            self._jobs.append((identity, page))
            metrics.DISK_PENDING.set(len(self._pending) * self._page_bytes)
            self._mail.notify_all()

    def _wait(self, ready: Callable[[], bool], deadline: float) -> bool:
        with self._mail:
            return self._mail.wait_for(ready, max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        self._scan(first=True)
        next_scan = self._clock() + self._scan_seconds
        while True:
            with self._mail:
                self._working = False
                self._mail.notify_all()
                self._mail.wait_for(lambda: self._jobs or self._stopping, max(0.0, next_scan - self._clock()))
                if self._stopping:
                    return
                job = self._jobs.popleft() if self._jobs else None
                self._working = True
            if job is not None:
                self._work(*job)
            if self._clock() >= next_scan:
                self._scan()
                next_scan = self._clock() + self._scan_seconds

    def _work(self, identity: bytes, page: Page | None) -> None:
        held, gone = False, list[bytes]()
        try:
            if page is None:
                self._folder.remove(identity)
            elif self._clock() < self._paused_until:
                metrics.DISK_DROPPED.labels("error").inc()
            else:
                gone = self._folder.write(identity, page)
                held = True
                metrics.DISK_WRITTEN.inc()
                metrics.DISK_EVICTED.inc(len(gone))
        except (
            OSError,
            ValueError,
        ) as error:  # one page is lost; the disk gets a pause
            log.warning("disk tier: %s", error)
            metrics.DISK_DROPPED.labels("error").inc()
            self._paused_until = self._clock() + PAUSE_SECONDS
        metrics.DISK_BYTES.set(self._folder.used_bytes)
        self._tell([(evicted, False) for evicted in gone if evicted != identity] + [(identity, held)])

    def _scan(self, first: bool = False) -> None:
        """Counts the folder if somebody else changed it, and tells what is in it."""
        try:
            if not first and not self._folder.changed():
                return
            found = set(self._folder.scan())
        except OSError as error:
            log.warning("disk tier: the folder cannot be read: %s", error)
            return
        metrics.DISK_BYTES.set(self._folder.used_bytes)
        held = self._held.copy()  # the set is the engine thread's; this is one step of the interpreter
        self._tell([(identity, False) for identity in held - found] + [(new, True) for new in found - held])

    def _tell(self, told: list[tuple[bytes, bool]]) -> None:
        with self._mail:
            self._told += told
