"""Weights that an executor can feed to others, read as a pool of blocks that never change.

An image is the memory file of a model's weights in the form a device computes with
(`flowserve.models.weight_cache`): executors of one kind need the same bytes. It is fed as KV is, over the
same transports, by blocks of 1 MiB (DeepServe, section 6.3: fork over DistFlow). `kvtransfer.feeds` serves
it, `kvtransfer.weights` fetches it.

`Images` is the sender's side: what is here, who is being fed, and how far each may read. An image that is
still being received is fed as far as it goes, so that executors can stand in a tree.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kvtransfer import metrics
from kvtransfer.errors import TransferError, TransferErrorCode
from kvtransfer.layout import KVLayout
from kvtransfer.pool import BlockStore, copy_bytes
from kvtransfer.runs import Run

BLOCK_BYTES = 1 << 20
IMAGE_PREFIX = "weights/"
"""Of a transfer that is an image: KV transfers are named by tasks."""
MAX_FEEDS = 4
"""Receivers that one executor feeds at once (ours): more divide the same bandwidth, and a receiver feeds
others in its turn."""
GRANT_BLOCKS = 8
"""Granted at a time while tasks run (ours): 1 ms of a memory's bandwidth, so steps wait no longer."""
WINDOW_BLOCKS = 64
"""Granted beyond what the receiver has (ours): some milliseconds of any network's."""
DEFAULT_BUSY_RATE = 256 << 20
"""Bytes a second, of all feeds together, while tasks run here; docs/benchmarks.md says what that costs."""


@dataclass(frozen=True, slots=True)
class Description:
    """Names an image. `config` is the model's shape, as JSON; `size` in bytes, whole blocks."""

    content: str
    form: str
    size: int
    config: bytes

    @property
    def name(self) -> str:
        """The transfer it is read as."""
        return f"{IMAGE_PREFIX}{self.content}-{self.form}"

    @property
    def blocks(self) -> int:
        return self.size // BLOCK_BYTES


class ImageStore:
    """An image as a BlockStore: no block changes. Writable where `memory` is. Owns `fd`, unless -1."""

    def __init__(self, name: str, size: int, memory: memoryview | None = None, fd: int = -1) -> None:
        """`memory` of `size` bytes keeps its mapping alive; None: the file is mapped read-only when it is
        first read here. Raises ValueError unless the size is whole blocks."""
        blocks, rest = divmod(size, BLOCK_BYTES)
        if rest or not blocks:
            raise ValueError(f"an image of {size} bytes has no whole blocks of {BLOCK_BYTES}")
        half = BLOCK_BYTES // 2  # of K, and as much of V: 512 tokens of 512 elements of two bytes
        self._layout = KVLayout(
            name, "float16", block_tokens=512, layers=1, kv_heads=1, head_dim=half // 512 // 2
        )
        self._blocks = blocks
        self._mapped = memory
        self._mapping = threading.Lock()
        self._fd = fd
        self._retired = False

    @classmethod
    def attach(cls, name: str, fd: int, size: int) -> ImageStore:
        """A file; `fd` is this store's from now on. Raises OSError, ValueError."""
        try:
            if os.fstat(fd).st_size != size:
                raise ValueError(f"{name} has another size than {size}")
            return cls(name, size, None, fd)
        except BaseException:
            os.close(fd)
            raise

    @property
    def layout(self) -> KVLayout:
        return self._layout

    @property
    def num_blocks(self) -> int:
        return self._blocks

    @property
    def fd(self) -> int:
        """Of the file, to pass to a peer; -1 without one."""
        return self._fd

    @property
    def pages(self) -> memoryview:
        with self._mapping:
            if self._mapped is None:
                size = self._blocks * BLOCK_BYTES
                self._mapped = memoryview(mmap.mmap(self._fd, size, mmap.MAP_SHARED, mmap.PROT_READ))
            return self._mapped

    @property
    def retired(self) -> bool:
        return self._retired

    def generation(self, block: int) -> int:
        """0, and 1 for an image that is given up."""
        return int(self._retired)

    def generations_equal(self, blocks: Sequence[int], expected: Sequence[int]) -> bool:
        return all(self.generation(block) == wanted for block, wanted in zip(blocks, expected, strict=True))

    def view(self, start: int, count: int) -> memoryview:
        if start < 0 or count < 0 or start + count > self._blocks:
            raise IndexError(f"blocks {start}+{count} outside an image of {self._blocks}")
        return self.pages[start * BLOCK_BYTES : (start + count) * BLOCK_BYTES]

    def load(self, start: int, count: int) -> bytearray:
        data = bytearray(count * BLOCK_BYTES)
        copy_bytes(memoryview(data), self.view(start, count))
        return data

    def store(self, start: int, data: bytes | bytearray | memoryview) -> None:
        copy_bytes(self.view(start, len(data) // BLOCK_BYTES), data)

    def bump(self, block: int) -> None:
        """An image's blocks have one content."""

    def close(self) -> None:
        """No read that begins now succeeds. The mapping is freed with its last reference: a read may still
        run. Idempotent."""
        self._retired = True
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Pace:
    """A rate of bytes for all feeds together while `busy()`, none otherwise. On one loop."""

    def __init__(
        self, busy: Callable[[], bool], rate: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`rate` in bytes a second; 0 is no bound. Raises ValueError below that."""
        if rate < 0:
            raise ValueError(f"the rate of feeds must not be negative, is {rate}")
        self._busy, self._rate, self._clock = busy, rate, clock
        self._free = 0.0  # when the next bytes may go

    @property
    def holds(self) -> bool:
        """Whether feeds are held to the rate now."""
        return self._rate > 0 and self._busy()

    def delay(self, size: int) -> float:
        """Seconds until `size` bytes may go, which are counted now."""
        now = self._clock()
        if not self.holds:
            self._free = now
            return 0.0
        start = max(now, self._free)
        self._free = start + size / self._rate
        return start - now


@dataclass(slots=True)
class Growing:
    """An image that this executor is receiving, or has received whole: the first `ready` blocks are as they
    will stay."""

    revision: str
    image: Description
    store: ImageStore
    ready: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def advance(self, blocks: int) -> None:
        """On the loop."""
        self.ready = blocks
        self.changed.set()
        self.changed = asyncio.Event()


@dataclass(slots=True)
class Feed:
    """One receiver that is being fed. `granted` blocks may be read."""

    image: Description
    store: ImageStore
    growing: Growing | None
    granted: int = 0

    @property
    def ready(self) -> int:
        """Blocks that are here."""
        return self.image.blocks if self.growing is None else self.growing.ready


class Held(Protocol):
    """The images that an executor has, beside what it is receiving."""

    def described(self, revision: str) -> Description | None:
        """What is loaded of a model; None without an image of it. Any thread, at once."""
        ...

    def opened(self, image: Description) -> ImageStore | None:
        """Its memory; None where it is not there any more. On a worker thread."""
        ...


class Images:
    """What one executor feeds. On one loop, but for `check_read`."""

    def __init__(self, held: Held, pace: Pace, *, max_feeds: int = MAX_FEEDS) -> None:
        self.pace = pace
        self._held = held
        self._max_feeds = max_feeds
        self._lock = threading.Lock()
        self._feeds: dict[tuple[str, str], Feed] = {}  # by image and receiver
        self._taken = 0  # feeds, those that are being opened included
        self._opened: ImageStore | None = None  # of feeds that are not of `_growing`
        self._opening = asyncio.Lock()
        self._growing: Growing | None = None

    @property
    def active(self) -> int:
        """Receivers that are being fed."""
        return len(self._feeds)

    def find(self, revision: str) -> Description:
        """Raises TransferError(NOT_CACHED)."""
        growing = self._growing
        if growing is not None and growing.revision == revision:
            return growing.image
        image = self._held.described(revision)
        if image is None:
            raise TransferError(TransferErrorCode.NOT_CACHED, f"no weights of {revision!r} to feed are here")
        return image

    def grow(self, revision: str, image: Description, store: ImageStore) -> Growing:
        """An image begins to arrive: it can be fed as far as it is here, until `end`."""
        self.end()
        self._growing = Growing(revision, image, store)
        return self._growing

    def end(self) -> None:
        """What was received is not fed (any more): feeds of it fail. Idempotent."""
        if self._growing is not None:
            self._growing.store.close()
            self._growing.changed.set()
            self._growing = None

    @contextlib.asynccontextmanager
    async def feeding(self, revision: str, name: str, receiver: str) -> AsyncIterator[Feed]:
        """A feed of `receiver` for the time of the context. Raises TransferError: NOT_CACHED, STALE_POOL for
        another image than `name`, BUSY at the bound."""
        image, growing = self.find(revision), self._growing
        if image.name != name:
            raise TransferError(TransferErrorCode.STALE_POOL, f"{image.name} is here, not {name}")
        if self._taken >= self._max_feeds or (name, receiver) in self._feeds:
            metrics.REFUSED.labels("feed").inc()
            raise TransferError(TransferErrorCode.BUSY, f"{self._taken} executors are being fed here")
        self._taken += 1
        try:
            if growing is not None and growing.image.name == name:
                store = growing.store
            else:
                growing, store = None, await self._open(image)
            feed = Feed(image, store, growing)
            with self._lock:
                self._feeds[name, receiver] = feed
            metrics.FEEDS.set(len(self._feeds))
            try:
                yield feed
            finally:
                with self._lock:
                    del self._feeds[name, receiver]
                metrics.FEEDS.set(len(self._feeds))
                if growing is None and all(other.store is not store for other in self._feeds.values()):
                    self._opened = None
                    store.close()
        finally:
            self._taken -= 1

    async def _open(self, image: Description) -> ImageStore:
        """The store that other feeds of it have, or a new one. Raises TransferError(NOT_CACHED)."""
        async with self._opening:
            if self._opened is None or self._opened.layout.model_revision != image.name:
                self._opened = await asyncio.to_thread(self._held.opened, image)
            if self._opened is None:
                raise TransferError(TransferErrorCode.NOT_CACHED, f"{image.name} is not here any more")
            return self._opened

    def store_of(self, name: str) -> ImageStore | None:
        """The store of an image that is being fed."""
        return next((feed.store for (fed, _), feed in self._feeds.items() if fed == name), None)

    def check_read(
        self, name: str, receiver: str, runs: Sequence[Run], generations: Sequence[int]
    ) -> BlockStore:
        """The store to read `runs` from, which must have been granted. Any thread. Raises TransferError."""
        with self._lock:
            feed = self._feeds.get((name, receiver))
        if feed is None:
            raise TransferError(TransferErrorCode.UNKNOWN_TRANSFER, f"{receiver} is not being fed {name}")
        if any(run.start < 0 or run.start + run.count > feed.granted for run in runs):
            raise TransferError(TransferErrorCode.ABORTED, f"{name}: blocks were asked for beyond the grant")
        if sum(run.count for run in runs) != len(generations) or any(generations):
            raise TransferError(TransferErrorCode.GENERATION_MOVED, f"{name}: an image has one generation")
        return feed.store
