"""The work queue of a controller, and the workers that empty it.

A key is in the queue once however often it is added, and is worked on by one worker at a time; what is added
meanwhile runs again afterwards. Failures come back later and later, each key by itself, under a bound. So the
queue is bounded by the number of objects, and a failing object slows down nobody else.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import random
import time
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

from controlplane.kube.client import KubeError
from controlplane.operator import metrics

FIRST_RETRY_SECONDS = 0.05
MAX_RETRY_SECONDS = 60.0

log = logging.getLogger(__name__)
K = TypeVar("K", bound=Hashable)


class WorkQueue(Generic[K]):
    """On one event loop."""

    def __init__(
        self,
        name: str,
        *,
        clock: Callable[[], float] = time.monotonic,
        rand: Callable[[], float] = random.random,
    ) -> None:
        self.name = name
        self._clock = clock
        self._rand = rand
        self._ready: dict[K, float] = {}  # in order of arrival; value: when added
        self._working: dict[K, float] = {}
        self._again: set[K] = set()
        self._later: list[tuple[float, int, K]] = []
        self._due: dict[K, float] = {}
        self._failures: dict[K, int] = {}
        self._order = itertools.count()
        self._wake = asyncio.Event()

    def __len__(self) -> int:
        return len(self._ready)

    @property
    def busy(self) -> int:
        return len(self._working)

    def add(self, key: K) -> None:
        if key in self._working:
            self._again.add(key)
        elif key not in self._ready:
            self._ready[key] = self._clock()
            metrics.QUEUE_ADDS.labels(self.name).inc()
            metrics.QUEUE_DEPTH.labels(self.name).set(len(self._ready))
            self._wake.set()

    def add_after(self, key: K, seconds: float) -> None:
        """Not before `seconds` from now; the earliest of several counts."""
        due = self._clock() + seconds
        known = self._due.get(key)
        if known is None or due < known:
            self._due[key] = due
            heapq.heappush(self._later, (due, next(self._order), key))
            self._wake.set()

    def failed(self, key: K, at_least: float = 0.0) -> float:
        """Adds it again, later each time in a row. Returns after how many seconds."""
        count = self._failures[key] = self._failures.get(key, 0) + 1
        wait = min(FIRST_RETRY_SECONDS * float(2 ** min(count - 1, 20)), MAX_RETRY_SECONDS)
        wait = max(wait * (0.75 + 0.5 * self._rand()), at_least)
        metrics.QUEUE_RETRIES.labels(self.name).inc()
        self.add_after(key, wait)
        return wait

    def succeeded(self, key: K) -> None:
        self._failures.pop(key, None)

    async def get(self) -> K:
        """The next key; `done` must follow."""
        while True:
            wait = self._release()
            if self._ready:
                key = next(iter(self._ready))
                now = self._clock()
                metrics.QUEUE_SECONDS.labels(self.name).observe(now - self._ready.pop(key))
                metrics.QUEUE_DEPTH.labels(self.name).set(len(self._ready))
                self._working[key] = now
                return key
            self._wake.clear()
            try:
                async with asyncio.timeout(wait):
                    await self._wake.wait()
            except TimeoutError:
                continue

    def done(self, key: K) -> None:
        began = self._working.pop(key)
        metrics.WORK_SECONDS.labels(self.name).observe(self._clock() - began)
        if key in self._again:
            self._again.discard(key)
            self.add(key)

    def measure(self) -> None:
        """Sets the gauges of work in progress."""
        ages = [self._clock() - began for began in self._working.values()]
        metrics.QUEUE_UNFINISHED.labels(self.name).set(sum(ages))
        metrics.QUEUE_LONGEST.labels(self.name).set(max(ages, default=0.0))

    def _release(self) -> float | None:
        """Moves what is due; seconds until the next, None without one."""
        now = self._clock()
        while self._later:
            due, _, key = self._later[0]
            if self._due.get(key) != due:  # an earlier one took its place
                heapq.heappop(self._later)
            elif due <= now:
                heapq.heappop(self._later)
                del self._due[key]
                self.add(key)
            else:
                return due - now
        return None


class Controller(Generic[K]):
    """Workers over one queue. `reconcile` returns after how many seconds to look again, or None."""

    def __init__(
        self,
        name: str,
        reconcile: Callable[[K], Awaitable[float | None]],
        *,
        workers: int = 1,
    ) -> None:
        self.name = name
        self.queue: WorkQueue[K] = WorkQueue(name)
        self._reconcile = reconcile
        self._workers = workers

    async def run(self) -> None:
        metrics.MAX_WORKERS.labels(self.name).set(self._workers)
        async with asyncio.TaskGroup() as group:
            for number in range(self._workers):
                group.create_task(self._work(), name=f"{self.name}-{number}")

    async def _work(self) -> None:
        while True:
            key = await self.queue.get()
            started = time.perf_counter()
            metrics.ACTIVE_WORKERS.labels(self.name).inc()
            try:
                result = await self._once(key)
            finally:
                metrics.ACTIVE_WORKERS.labels(self.name).dec()
                metrics.RECONCILE_SECONDS.labels(self.name).observe(time.perf_counter() - started)
                self.queue.done(key)
            metrics.RECONCILES.labels(self.name, result).inc()

    async def _once(self, key: K) -> str:
        """A task boundary: one object's failure is reported and comes again."""
        try:
            after = await self._reconcile(key)
        except KubeError as error:
            metrics.RECONCILE_ERRORS.labels(self.name).inc()
            wait = self.queue.failed(key, at_least=error.retry_after or 0.0)
            level = logging.INFO if error.status == 409 else logging.WARNING
            log.log(level, "%s %s: %s (%d); again in %.2f s", self.name, key, error, error.status, wait)
            return "error"
        except Exception:
            metrics.RECONCILE_ERRORS.labels(self.name).inc()
            wait = self.queue.failed(key)
            log.exception("%s %s failed; again in %.2f s", self.name, key, wait)
            return "error"
        self.queue.succeeded(key)
        if after is not None:
            self.queue.add_after(key, after)
            return "requeue_after"
        return "success"
