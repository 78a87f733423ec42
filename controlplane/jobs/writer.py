"""Puts job records into the store behind serving's back: batched, bounded, healing.

Serving only marks a job as changed. Marked jobs are written in one pipeline every flush, those that end soon
after they began once, at their end; while the store
is down they stay marked, the oldest ended ones are dropped beyond the bound, and when it answers again
(or was restarted, and may have forgotten) every live job is written anew.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Iterable

from redis.exceptions import RedisError

from controlplane.fleet.registry import heed_cancellation
from controlplane.jobs import metrics
from controlplane.jobs.job import Job
from controlplane.jobs.records import JobRecord
from controlplane.jobs.settings import RuntimeSettings
from controlplane.jobs.store import JobStore

SERVER_CHECK_SECONDS = 2.0
"""How soon a restarted store gets the live jobs again (ours)."""

log = logging.getLogger(__name__)


class RecordWriter:
    """`changed` from serving; `run` until cancelled; `flush` at the end."""

    def __init__(
        self,
        store: JobStore,
        live: Callable[[], Iterable[Job]],
        settings: RuntimeSettings,
        ended: Callable[[JobRecord], None] | None = None,
    ) -> None:
        """`ended` is told of each job once, when it has ended."""
        self._store = store
        self._ended = ended
        self._live = live
        self._settings = settings
        # An ended job waits as its record: the job itself would keep prompt and answer in memory.
        self._marked: dict[str, Job | JobRecord] = {}
        self._work = asyncio.Event()
        self._up = True
        self._server = ""
        self._checked = 0.0
        metrics.STORE_UP.set(1)

    def changed(self, job: Job) -> None:
        """Never blocks."""
        if job.job_id not in self._marked and len(self._marked) >= self._settings.record_pending:
            self._drop_one()
        if not job.state.terminal:
            self._marked[job.job_id] = job
        else:
            first = not isinstance(self._marked.get(job.job_id), JobRecord)
            self._marked[job.job_id] = record = job.record(self._settings.gateway_id, time.time())
            if first and self._ended is not None:
                self._ended(record)
        self._work.set()

    async def run(self) -> None:
        """A task boundary: a record that cannot be written is reported, the rest goes on."""
        pause = self._settings.record_flush_seconds
        while True:
            await self._work.wait()
            await asyncio.sleep(pause)
            try:
                written = await self.flush(self._settings.record_young_seconds)
            except Exception:
                log.exception("writing job records failed")
                written = False
            heed_cancellation()
            pause = self._settings.record_flush_seconds if written else min(2.0, max(pause, 0.1) * 2)

    async def flush(self, young_seconds: float = 0.0) -> bool:
        """Writes what is marked, but for jobs that run and are younger than `young_seconds`; False if the
        store could not be reached (it stays marked)."""
        self._work.clear()
        while due := self._due(young_seconds):
            if not await self._write_batch(due):
                self._work.set()
                return False
        metrics.RECORDS_PENDING.set(len(self._marked))
        if self._marked:
            self._work.set()
        return True

    def _due(self, young_seconds: float) -> list[str]:
        since = time.time() - young_seconds if young_seconds else float("inf")
        ready = (
            job_id
            for job_id, job in self._marked.items()
            if isinstance(job, JobRecord) or job.created_at <= since
        )
        return list(itertools.islice(ready, self._settings.record_batch))

    async def _write_batch(self, due: list[str]) -> bool:
        settings = self._settings
        batch = [self._marked.pop(job_id) for job_id in due]
        wall = time.time()
        try:
            async with asyncio.timeout(settings.redis_seconds):
                await self._store.write(
                    [
                        job if isinstance(job, JobRecord) else job.record(settings.gateway_id, wall)
                        for job in batch
                    ]
                )
                await self._look_for_restart()
        except (RedisError, OSError, TimeoutError) as error:
            if self._up:
                log.warning("job records cannot be written, serving goes on: %s", error)
            self._up = False
            metrics.STORE_UP.set(0)
            metrics.RECORDS.labels("failed").inc(len(batch))
            for job in batch:
                self._marked.setdefault(job.job_id, job)
            while len(self._marked) > settings.record_pending:
                self._drop_one()
            metrics.RECORDS_PENDING.set(len(self._marked))
            return False
        metrics.RECORDS.labels("written").inc(len(batch))
        if not self._up:
            log.info("job records are written again")
            self._up = True
            metrics.STORE_UP.set(1)
            self._mark_live()
        return True

    async def _look_for_restart(self) -> None:
        now = time.monotonic()
        if now - self._checked < SERVER_CHECK_SECONDS:
            return
        self._checked = now
        server = await self._store.server_id()
        if self._server and server != self._server:
            log.info("the job store was restarted")
            self._mark_live()
        self._server = server

    def _mark_live(self) -> None:
        for job in self._live():
            self.changed(job)

    def _drop_one(self) -> None:
        """The job marked first that has ended; else the first. Live ones are written again later anyway."""
        ended = (job_id for job_id, job in self._marked.items() if job.state.terminal)
        del self._marked[next(ended, next(iter(self._marked)))]
        metrics.RECORDS.labels("dropped").inc()
