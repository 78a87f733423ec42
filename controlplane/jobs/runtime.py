"""Composition of one gateway process's serving side: store, fleet, job executor.

    async with ServingRuntime(RuntimeSettings(gateway_id=..., redis_url=...)) as runtime:
        job = runtime.executor.submit(request)

Leaving the block drains (bounded), then cancels what still runs. Every background task belongs to one
TaskGroup; enter and leave in the same task.
"""

from __future__ import annotations

import asyncio
import functools
import os
from types import TracebackType

from deepflow.v1 import worker_pb2
from redis.asyncio import BlockingConnectionPool, Redis

from controlplane.fleet.view import FleetView
from controlplane.jobs.executor import JobExecutor
from controlplane.jobs.job import Job
from controlplane.jobs.settings import RuntimeSettings
from controlplane.jobs.store import JobStore
from controlplane.jobs.traces import start_spans
from controlplane.jobs.tracing import Tracing
from controlplane.jobs.writer import RecordWriter

__all__ = ["RuntimeSettings", "ServingRuntime"]

REDIS_CONNECTIONS = 16
"""Poll, hints, writer and the gateway's reads (ours); a read beyond waits its turn."""
ABORTS_SECONDS = 0.2
"""At the end: for aborts to leave on the streams (their loss is harmless: the streams close next)."""


class ServingRuntime:
    """An asynchronous context manager; the properties are valid inside the block."""

    def __init__(self, settings: RuntimeSettings) -> None:
        """Raises TracingError where traces are asked for and cannot be sent."""
        self.settings = settings
        self._redis = Redis(
            connection_pool=BlockingConnectionPool.from_url(
                settings.redis_url,
                max_connections=REDIS_CONNECTIONS,
                timeout=settings.redis_seconds,
                socket_timeout=settings.redis_seconds,
                socket_connect_timeout=settings.redis_seconds,
            )
        )
        self._store = JobStore(self._redis, ttl_seconds=settings.record_ttl_seconds)
        self._fleet = FleetView(
            self._redis,
            settings.channel,
            poll_seconds=settings.registry_poll_seconds,
            eager=settings.eager_group_size,
            prefix_blocks=settings.prefix_blocks,
            policy=settings.scheduling,
        )
        self._executor = JobExecutor(self._fleet, settings, on_changed=self._changed)
        self._tracing = Tracing.from_env(os.environ, settings.gateway_id)
        self._writer = RecordWriter(
            self._store,
            lambda: self._executor.live_jobs,
            settings,
            ended=None if self._tracing is None else self._tracing.job,
        )
        if self._tracing is not None:
            self._fleet.on_start = self._started
        self._group = asyncio.TaskGroup()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def executor(self) -> JobExecutor:
        return self._executor

    @property
    def store(self) -> JobStore:
        return self._store

    @property
    def fleet(self) -> FleetView:
        return self._fleet

    async def __aenter__(self) -> ServingRuntime:
        await self._group.__aenter__()
        self._tasks = [
            self._group.create_task(self._fleet.run(), name="fleet"),
            self._group.create_task(self._executor.run(), name="jobs"),
            self._group.create_task(self._writer.run(), name="job-records"),
        ]
        if self._tracing is not None:
            self._tasks.append(self._group.create_task(self._tracing.run(), name="traces"))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None or isinstance(error, Exception):
                await self._executor.drain(self.settings.drain_seconds)
                await asyncio.sleep(ABORTS_SECONDS)
                await self._writer.flush()
        finally:
            for task in self._tasks:
                task.cancel()
            if self._tracing is not None:
                await self._tracing.close()
            try:
                await self._group.__aexit__(kind, error, trace)
            finally:
                await self._redis.aclose()

    def _started(self, record: worker_pb2.ExecutorRecord, reached: float) -> None:
        """An executor that began to serve can be sent to."""
        assert self._tracing is not None
        self._tracing.start(functools.partial(start_spans, record, reached, self.settings.gateway_id))

    def _changed(self, job: Job) -> None:
        self._writer.changed(job)
