"""Composition of one gateway process's serving side: store, fleet, job executor.

    async with ServingRuntime(RuntimeSettings(gateway_id=..., redis_url=...)) as runtime:
        job = runtime.executor.submit(request)

Leaving the block drains (bounded), then cancels what still runs. Every background task belongs to one
TaskGroup; enter and leave in the same task.
"""

from __future__ import annotations

from types import TracebackType

from controlplane.fleet.view import FleetView
from controlplane.jobs.executor import JobExecutor
from controlplane.jobs.settings import RuntimeSettings
from controlplane.jobs.store import JobStore

__all__ = ["RuntimeSettings", "ServingRuntime"]


class ServingRuntime:
    """An asynchronous context manager; the properties are valid inside the block."""

    def __init__(self, settings: RuntimeSettings) -> None: ...

    @property
    def executor(self) -> JobExecutor: ...

    @property
    def store(self) -> JobStore: ...

    @property
    def fleet(self) -> FleetView: ...

    async def __aenter__(self) -> ServingRuntime: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
