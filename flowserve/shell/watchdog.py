"""Ends a process whose engine no longer turns: the supervisor's restart is the only cure.

The engine's loop turns at least every quarter second, and a step is bounded to half a second; a loop
that stood still for the bound is stuck in a driver, a lock, or is dead.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from flowserve.engine.types import LoadReport

log = logging.getLogger(__name__)

CHECK_SECONDS = 1.0
# Steps that raise, one after the other, each with other tasks: the device, not the tasks (ours).
MAX_STEP_FAILURES = 20


class Watched(Protocol):
    """What is asked of `flowserve.engine.engine.Engine`."""

    @property
    def consecutive_failures(self) -> int: ...

    @property
    def lost(self) -> str: ...

    def load(self) -> LoadReport: ...


def verdict(engine: Watched, bound_seconds: float) -> str | None:
    """Why the engine is given up; None if it is well."""
    if engine.lost:
        return f"the executor is lost: {engine.lost}"
    load = engine.load()
    if load.age_seconds > bound_seconds:
        return (
            f"the step loop stood still for {load.age_seconds:.1f} s at step {load.step} "
            f"({load.running} running, {load.waiting} waiting tasks)"
        )
    if engine.consecutive_failures >= MAX_STEP_FAILURES:
        return f"{engine.consecutive_failures} steps in a row failed"
    return None


async def watch(engine: Callable[[], Watched | None], bound_seconds: float) -> str:
    """Returns only when the engine is to be given up, with the reason."""
    while True:
        await asyncio.sleep(min(CHECK_SECONDS, bound_seconds / 4))
        current = engine()
        if current is None:
            continue
        reason = verdict(current, bound_seconds)
        if reason is not None:
            return reason
