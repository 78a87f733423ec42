"""Populations: pages on their way into blocks of the device, each under a ticket.

Called by `flowserve.rtc.cache` on the engine's thread. Pages of the local tiers are written by one copying
thread; a peer's by whoever fulfils the future. A population holds a reference on its blocks from start to
end, so their owner may give them up at any time: nothing else gets a block that is still being written.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from flowserve.rtc import metrics
from flowserve.rtc.costs import TierCosts
from flowserve.rtc.disk import OnDisk
from flowserve.rtc.pagefile import PageLost
from flowserve.rtc.tiers import Stored
from kvtransfer.pool import BlockStore

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Written:
    """Pages in place, from the first on. `lost`: the next one is not to be had any more."""

    count: int
    lost: bool = False


@dataclass(slots=True)
class Population:
    blocks: list[int]
    identities: list[bytes]
    future: Future[Written]
    stop: Callable[[], object] | None = None  # of one that somebody else writes
    abandoned: bool = False

    @property
    def local(self) -> bool:
        return self.stop is None

    def outcome(self) -> Written:
        """Once the future is done."""
        return Written(0) if self.future.cancelled() else self.future.result()


class Populations:
    """Tickets that were not asked to their end."""

    def __init__(self, store: BlockStore, costs: TierCosts) -> None:
        self._store = store
        self._costs = costs
        self._under_way: dict[int, Population] = {}
        self._next = 1
        self._copier: ThreadPoolExecutor | None = None

    def __len__(self) -> int:
        return len(self._under_way)

    def __getitem__(self, ticket: int) -> Population:
        return self._under_way[ticket]

    def held_blocks(self) -> Iterator[int]:
        for population in self._under_way.values():
            yield from population.blocks

    def copy(
        self, identities: list[bytes], blocks: list[int], pages: Sequence[Stored], notify: Callable[[], None]
    ) -> int:
        """Starts to write the pages; the ticket. `notify` is called on the copying thread at the end."""
        if self._copier is None:
            self._copier = ThreadPoolExecutor(1, thread_name_prefix="rtc-populate")
        future = self._copier.submit(self._write, list(zip(blocks, pages, strict=True)))
        ticket = self.add(Population(blocks, identities, future))
        future.add_done_callback(lambda _: notify())
        return ticket

    def add(self, population: Population) -> int:
        ticket = self._next
        self._next += 1
        self._under_way[ticket] = population
        return ticket

    def pop(self, ticket: int) -> Population | None:
        """The population, if it has ended; its ticket is forgotten then."""
        return self._under_way.pop(ticket) if self._under_way[ticket].future.done() else None

    def abandon(self, ticket: int) -> None:
        """Nobody will ask for this ticket again."""
        population = self._under_way.get(ticket)
        if population is not None:
            population.abandoned = True
            if population.stop is None:
                population.future.cancel()
            else:  # bytes may be under way: who writes them says when no more are
                population.stop()

    def abandoned(self) -> list[int]:
        return [ticket for ticket, population in self._under_way.items() if population.abandoned]

    def close(self) -> None:
        """Ends the copying thread; blocks until a running copy is done."""
        if self._copier is not None:
            self._copier.shutdown(wait=True, cancel_futures=True)

    def _write(self, moves: list[tuple[int, Stored]]) -> Written:
        """On the copying thread."""
        for done, (block, page) in enumerate(moves):
            started = time.perf_counter()
            on_disk = isinstance(page, OnDisk)
            try:
                self._store.store(block, page.read() if isinstance(page, OnDisk) else page)
            except PageLost:
                return Written(done, lost=True)
            except Exception:  # a task boundary: one population fails, its task computes instead
                log.exception("a page cannot be put into the pool")
                return Written(done)
            self._costs.took(time.perf_counter() - started, on_disk=on_disk)
            metrics.POPULATED.labels("disk" if on_disk else "host").inc()
        return Written(len(moves))
