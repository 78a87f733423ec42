"""How a model's start goes, as far as one can tell: its stage, its progress, the seconds that are left.

Pure. `holding.py` asks while it holds requests; `servings.py` (a cluster) and the fleet tell stages.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

LEAST_PROGRESS = 0.05
"""Below it a rate says nothing (ours)."""
LATEST_WEIGHT = 0.5
"""Of the last wake in the typical one: start paths change (warm, cold), and the last tells most (ours)."""
MAX_KNOWN = 4096


@dataclass(frozen=True, slots=True)
class Stage:
    """Where a start is. `name` is one word, machine-readable."""

    name: str
    detail: str = ""
    progress: float | None = None  # of the whole start, 0 to 1
    typical: float | None = None  # seconds that the last start took, wherever it was measured


@dataclass(frozen=True, slots=True)
class Wake:
    """What is told to clients that wait."""

    model: str
    stage: Stage
    waited: float  # seconds, of this request
    left: float | None  # seconds until an executor serves; None: unknown

    def comment(self) -> bytes:
        """As a comment of server-sent events, which clients skip and people read."""
        fields: dict[str, object] = {"model": self.model, "stage": self.stage.name}
        if self.stage.detail:
            fields["detail"] = self.stage.detail[:200]
        if self.stage.progress is not None:
            fields["progress"] = round(self.stage.progress, 2)
        fields["waited_seconds"] = round(self.waited, 1)
        if self.left is not None:
            fields["left_seconds"] = round(self.left, 1)
        return b": waking " + orjson.dumps(fields) + b"\n\n"


class WakeTimes:
    """Seconds that starts took, by model, as this process saw them."""

    def __init__(self) -> None:
        self._typical: dict[str, float] = {}

    def observed(self, key: str, seconds: float) -> None:
        before = self._typical.pop(key, seconds)
        self._typical[key] = (1 - LATEST_WEIGHT) * before + LATEST_WEIGHT * seconds
        if len(self._typical) > MAX_KNOWN:
            del self._typical[next(iter(self._typical))]

    def typical(self, key: str) -> float | None:
        return self._typical.get(key)


def seconds_left(elapsed: float, *, typical: float | None, progress: float | None) -> float | None:
    """By the time that starts take, or by how far this one got; None where neither says anything, as when it
    takes longer than ever before."""
    if typical is not None and typical > elapsed:
        return typical - elapsed
    if progress is not None and progress >= LEAST_PROGRESS:
        return elapsed * (1 - progress) / progress
    return None


def fleet_stage(executors: Iterable[Mapping[str, Any]], revision: str) -> Stage:
    """From what the fleet lists (`Member.to_json`): the furthest executor of the revision."""
    states = {executor["state"] for executor in executors if executor.get("model_revision") == revision}
    if "ready" in states:
        return Stage("connecting")
    for name in ("loading", "draining", "failed"):
        if name in states:
            return Stage(name)
    return Stage("waiting_for_executor")
