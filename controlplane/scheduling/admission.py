"""Who goes first while executors are full, and who is dropped when too many wait: one pure queue.

Strict priority bands; within a band weighted fair queueing between tenants (start-time fair queueing, Goyal
et al. 1996), costed in the tokens that must be computed, so that a tenant of long prompts gets fewer of them
through; within a tenant the earliest deadline, then the order of arrival. What is placed without waiting is
charged too: queues empty and fill again within seconds, and shares must hold across that.

Bounded by requests and by bytes. A full queue makes room by dropping from the lowest band, and there from
the tenant with the most waiting cost: the newcomer goes in only if its band is higher, or its tenant waits
with less. Every drop has a `DropReason`; nothing is lost silently. Called by the job executor, and by the
twin in its place. The papers leave admission open: bands and fairness are ours.
"""

from __future__ import annotations

import enum
import heapq
from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

MAX_TENANTS = 4096
"""Tenants whose share is remembered while they wait for nothing (ours: a few hundred bytes each)."""


class DropReason(enum.StrEnum):
    """Why a request got no answer, as the API tells it. Rejected: it never waited; evicted: it did."""

    REJECTED_QUEUE_FULL = "rejected-queue-full"
    REJECTED_QUEUE_BYTES = "rejected-queue-bytes"
    REJECTED_IN_FLIGHT = "rejected-in-flight"  # too many run and wait together
    REJECTED_TOO_LARGE = "rejected-too-large"  # no executor could ever hold it
    REJECTED_SHUTDOWN = "rejected-shutdown"
    EVICTED_FOR_PRIORITY = "evicted-for-priority"  # a higher band needed the room
    EVICTED_FOR_SHARE = "evicted-for-share"  # its tenant waited with the most
    EVICTED_TIMEOUT = "evicted-timeout"  # waited as long as it may
    EVICTED_DEADLINE = "evicted-deadline"  # its own deadline passed


@dataclass(frozen=True, slots=True)
class Waiting:
    """One request as the queue sees it."""

    key: str  # unique among what waits
    tenant: str
    band: int  # higher goes first
    cost: float  # tokens to compute
    size: int  # bytes it keeps in memory
    deadline: float = float("inf")
    number: int = 0  # order of arrival; a request that comes back keeps its own


@dataclass(slots=True)
class _Share:
    """One tenant in one band: its queue in order, and how much of its share it has used."""

    used: float = 0.0  # virtual time at which it has had what it was given
    cost: float = 0.0  # of all that waits
    queue: list[tuple[float, int, str]] = field(default_factory=list)  # deadline, number, key


@dataclass(slots=True)
class _Band:
    now: float = 0.0  # virtual time: start of what was served last
    shares: dict[str, _Share] = field(default_factory=dict)
    waiting: int = 0


@dataclass(frozen=True, slots=True)
class Pushed:
    """What became of a newcomer: why it was not taken, if it was not, and whom it drove out."""

    refused: DropReason | None = None
    evicted: tuple[tuple[Waiting, DropReason], ...] = ()


class FairQueue:
    """Mutable, one owner, no clock of its own."""

    def __init__(self, max_requests: int, max_bytes: int, weights: Mapping[str, float] | None = None) -> None:
        """`weights` of tenants; 1 where none is given. Raises ValueError unless all are positive."""
        if max_requests < 1 or max_bytes < 1:
            raise ValueError("a queue has room for one request at least")
        self._weights = dict(weights or {})
        if any(weight <= 0 for weight in self._weights.values()):
            raise ValueError("a tenant's weight is above 0")
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self._items: dict[str, Waiting] = {}
        self._bands: dict[int, _Band] = {}
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, key: str) -> bool:
        return key in self._items

    # -- in and out --------------------------------------------------------------------------------------

    def push(self, item: Waiting) -> Pushed:
        """Lets a newcomer wait, if it may. Raises ValueError for a key that waits already."""
        self._check(item)
        if item.size > self._max_bytes:
            return Pushed(DropReason.REJECTED_QUEUE_BYTES)
        victims: list[tuple[Waiting, DropReason]] = []
        while len(self) >= self._max_requests or self.bytes + item.size > self._max_bytes:
            full = len(self) >= self._max_requests
            victim = self._victim(item)
            if victim is None:
                for gone, _ in victims:  # the room they made was not enough: nobody leaves for nothing
                    self._insert(gone)
                return Pushed(DropReason.REJECTED_QUEUE_FULL if full else DropReason.REJECTED_QUEUE_BYTES)
            lower = victim.band < item.band
            self.remove(victim.key)
            victims.append(
                (victim, DropReason.EVICTED_FOR_PRIORITY if lower else DropReason.EVICTED_FOR_SHARE)
            )
        self._insert(item)
        return Pushed(evicted=tuple(victims))

    def below(self, band: int) -> int:
        """How many of lower bands wait."""
        return sum(level.waiting for number, level in self._bands.items() if number < band)

    def drop_lowest(self, count: int) -> list[Waiting]:
        """Takes out who would make room first: of the lowest band, the last of whoever waits with most.

        For a newcomer of a higher band that needs room elsewhere than here; `below` says how many that may
        be."""
        gone = []
        for _ in range(count):
            band = self._bands[min(number for number, level in self._bands.items() if level.waiting)]
            victim = self._items[band.shares[self._largest(band)].queue[-1][2]]
            self.remove(victim.key)
            gone.append(victim)
        return gone

    def put_back(self, item: Waiting) -> None:
        """Something that was let in before waits again, whatever the bounds say: it is not lost for them."""
        self._check(item)
        self._insert(item)

    def remove(self, key: str) -> Waiting | None:
        """Takes it out without charging its tenant; None if it does not wait."""
        item = self._items.pop(key, None)
        if item is None:
            return None
        band = self._bands[item.band]
        share = band.shares[item.tenant]
        share.queue.pop(bisect_left(share.queue, (item.deadline, item.number, key)))
        share.cost = share.cost - item.cost if share.queue else 0.0
        band.waiting -= 1
        self.bytes -= item.size
        self._tidy(item.band)
        return item

    def serve(self, key: str) -> None:
        """It was placed: out of the queue, and its tenant is charged."""
        item = self.remove(key)
        if item is not None:
            self.charge(item.tenant, item.band, item.cost)

    def charge(self, tenant: str, band: int, cost: float) -> None:
        """Something of the tenant was placed, whether it had waited or not."""
        level = self._bands.setdefault(band, _Band())
        share = level.shares.setdefault(tenant, _Share())
        start = max(level.now, share.used)
        level.now = min(start, self._least_used(level, start))
        share.used = start + cost / self._weights.get(tenant, 1.0)
        self._tidy(band)

    # -- order -------------------------------------------------------------------------------------------

    def head(self) -> Waiting | None:
        """Who goes next."""
        return next(iter(self), None)

    def __iter__(self) -> Iterator[Waiting]:
        """In the order in which all would go, served one after the other. Do not change it meanwhile."""
        for number in sorted(self._bands, reverse=True):
            band = self._bands[number]
            heads: list[tuple[float, tuple[float, int, str], int, str]] = []
            for tenant, share in band.shares.items():
                if share.queue:
                    heapq.heappush(heads, (max(band.now, share.used), share.queue[0], 0, tenant))
            while heads:
                start, (_, _, key), at, tenant = heapq.heappop(heads)
                item = self._items[key]
                yield item
                queue = band.shares[tenant].queue
                if at + 1 < len(queue):
                    after = start + item.cost / self._weights.get(tenant, 1.0)
                    heapq.heappush(heads, (after, queue[at + 1], at + 1, tenant))

    def before(self, item: Waiting) -> bool:
        """Something that waits would go before this newcomer, were it let in."""
        highest = max((number for number, band in self._bands.items() if band.waiting), default=None)
        if highest is None or highest < item.band:
            return False
        if highest > item.band:
            return True
        band = self._bands[highest]
        mine = band.shares.get(item.tenant, _Share())
        own = (max(band.now, mine.used), (item.deadline, item.number, item.key))
        return any(
            (max(band.now, share.used), share.queue[0]) < own for share in band.shares.values() if share.queue
        )

    # -- inside ------------------------------------------------------------------------------------------

    def _check(self, item: Waiting) -> None:
        if item.key in self._items:
            raise ValueError(f"{item.key} waits already")

    def _insert(self, item: Waiting) -> None:
        band = self._bands.setdefault(item.band, _Band())
        share = band.shares.setdefault(item.tenant, _Share(used=band.now))
        insort(share.queue, (item.deadline, item.number, item.key))
        share.cost += item.cost
        band.waiting += 1
        self._items[item.key] = item
        self.bytes += item.size

    def _victim(self, item: Waiting) -> Waiting | None:
        """The last of the tenant that waits with most in the lowest band; None if that is the newcomer."""
        lowest = min((number for number, band in self._bands.items() if band.waiting), default=None)
        if lowest is None or lowest > item.band:
            return None
        band = self._bands[lowest]
        tenant = self._largest(band)
        if lowest == item.band:
            mine = band.shares[item.tenant].cost if item.tenant in band.shares else 0.0
            if tenant == item.tenant or self._weighted(tenant, band.shares[tenant].cost) <= self._weighted(
                item.tenant, mine + item.cost
            ):
                return None
        return self._items[band.shares[tenant].queue[-1][2]]

    def _weighted(self, tenant: str, cost: float) -> float:
        return cost / self._weights.get(tenant, 1.0)

    def _largest(self, band: _Band) -> str:
        """The tenant that waits with most, for its weight."""
        waiting = ((name, share) for name, share in band.shares.items() if share.queue)
        return max(waiting, key=lambda entry: (self._weighted(entry[0], entry[1].cost), entry[0]))[0]

    @staticmethod
    def _least_used(band: _Band, default: float) -> float:
        return min((max(band.now, s.used) for s in band.shares.values() if s.queue), default=default)

    def _tidy(self, number: int) -> None:
        """Forgets tenants that wait for nothing and have no more than their share."""
        band = self._bands[number]
        if len(band.shares) > MAX_TENANTS:
            for tenant in [n for n, s in band.shares.items() if not s.queue and s.used <= band.now]:
                del band.shares[tenant]
        if len(band.shares) > 2 * MAX_TENANTS:  # all ahead of their share: the least ahead lose least
            idle = sorted((s.used, n) for n, s in band.shares.items() if not s.queue)
            for _, tenant in idle[: len(band.shares) - MAX_TENANTS]:
                del band.shares[tenant]
