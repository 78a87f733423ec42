"""Weights from one running executor to another: both ends of a fork, as the TE-shell holds them.

The loader asks for a `Feed` on its worker thread; bytes move on the loop (`kvtransfer.weights`). What arrives
can be fed on as far as it is here, and what is loaded when somebody asks (`kvtransfer.images`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import mmap
import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from kvtransfer.errors import TransferError
from kvtransfer.images import Description, Images, ImageStore, Pace
from kvtransfer.receiver import Receiver
from kvtransfer.weights import WeightFetcher

if TYPE_CHECKING:  # imports torch: a warm process listens before that is done
    from flowserve.models.weight_cache import Named, WeightCache
    from flowserve.shell.loading import LoadSpec

log = logging.getLogger(__name__)

MIN_RATE = 16 << 20
"""Bytes a second below which a fetch is given up for storage (ours): what a slow disk does."""
GRACE_SECONDS = 30.0

Loaded = Callable[[], "Iterable[tuple[str, WeightCache, Named]]"]
"""Revisions that are loaded or sleep, the cache that holds their weights, their names there. Any thread."""


class Forks:
    """One executor's. Made on its loop."""

    def __init__(
        self, receiver: Receiver, loaded: Loaded, busy: Callable[[], bool], bytes_per_second: int
    ) -> None:
        """`bytes_per_second` are fed while `busy()`; 0 is no bound."""
        self._loop = asyncio.get_running_loop()
        self._fetcher = WeightFetcher(receiver)
        self.images = Images(_Held(loaded), Pace(busy, bytes_per_second))

    def feed(self, spec: LoadSpec) -> ForkFeed | None:
        """What the executors of `spec` can feed; None where none of them can. On the loading thread."""
        describing = asyncio.run_coroutine_threadsafe(
            self._fetcher.describe(spec.fork_from, spec.revision), self._loop
        )
        try:
            described = describing.result()
        except TransferError as error:
            log.warning("no executor feeds %s: %s", spec.revision, error)
            return None
        return ForkFeed(self, spec, described.image)

    def forget(self) -> None:
        """What was received is not fed any more, and not kept: the load failed. Any thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self.images.end)

    def fetch(self, spec: LoadSpec, image: Description, mapping: mmap.mmap, fd: int) -> None:
        """On the loading thread. Raises TransferError, TimeoutError."""
        seconds = GRACE_SECONDS + image.size / MIN_RATE
        asyncio.run_coroutine_threadsafe(self._fetch(spec, image, mapping, fd, seconds), self._loop).result()

    async def _fetch(
        self, spec: LoadSpec, image: Description, mapping: mmap.mmap, fd: int, seconds: float
    ) -> None:
        # Opened anew: others may read the file, and the lock of its maker is not theirs.
        readable = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        growing = self.images.grow(
            spec.revision, image, ImageStore(image.name, image.size, memoryview(mapping), readable)
        )
        try:
            async with asyncio.timeout(seconds):
                done = await self._fetcher.fetch(
                    spec.fork_from, spec.revision, image, growing.store, growing.advance
                )
        except BaseException:
            self.images.end()
            raise
        log.info(
            "weights of %s: %d MiB from %s over %s in %.3f s",
            spec.revision, done.bytes >> 20, ", ".join(done.sources), done.transport, done.seconds,
        )  # fmt: skip


class ForkFeed:
    """A `flowserve.models.weight_cache.Feed`."""

    def __init__(self, forks: Forks, spec: LoadSpec, image: Description) -> None:
        self._forks = forks
        self._spec = spec
        self._image = image
        self.content, self.form, self.size = image.content, image.form, image.size
        self.config = image.config

    def fill(self, mapping: mmap.mmap, fd: int) -> None:
        from flowserve.models.weight_cache import FeedLost

        try:
            self._forks.fetch(self._spec, self._image, mapping, fd)
        except (TransferError, TimeoutError, OSError) as error:
            raise FeedLost(str(error) or type(error).__name__) from error


class _Held:
    """A `kvtransfer.images.Held`."""

    def __init__(self, loaded: Loaded) -> None:
        self._loaded = loaded

    def described(self, revision: str) -> Description | None:
        return next((_description(named) for held, _, named in self._loaded() if held == revision), None)

    def opened(self, image: Description) -> ImageStore | None:
        """The file of what is loaded or sleeps now, if it is that image."""
        for _, weights, named in self._loaded():
            if _description(named) == image and (fd := weights.opened(named)) is not None:
                return ImageStore.attach(image.name, fd, image.size)
        return None


def _description(named: Named) -> Description:
    return Description(named.content, named.form, named.size, named.config)
