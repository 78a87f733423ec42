"""Events: what happened to an object, for `kubectl describe`. Deduplicated, bounded, never waited for.

The same (object, reason, message) within a quarter of an hour is one Event with a growing count, written at
most once in `REPEAT_SECONDS`: an object that fails again and again tells it without filling etcd.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from controlplane.kube import metrics
from controlplane.kube.client import KubeApi, KubeError
from controlplane.kube.resources import EVENTS, Json

MAX_PENDING = 1000
MAX_REMEMBERED = 10_000
SERIES_SECONDS = 900.0
REPEAT_SECONDS = 60.0
MAX_NOTE = 1024  # of the API

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Series:
    name: str
    began: float
    written: float
    count: int = 1


class EventRecorder:
    """`record` never blocks; `run` writes until cancelled."""

    def __init__(
        self, api: KubeApi, controller: str, instance: str, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._api = api
        self._controller, self._instance = controller, instance
        self._clock = clock
        self._queue: asyncio.Queue[tuple[str, Json, int]] = asyncio.Queue(MAX_PENDING)
        self._series: OrderedDict[str, _Series] = OrderedDict()

    def record(self, obj: Json, kind: str, api_version: str, reason: str, note: str, *, warning: bool = False,
               action: str = "Reconcile") -> None:  # fmt: skip
        """Something happened to `obj` (its metadata name it)."""
        meta = obj["metadata"]
        key = f"{meta.get('uid')}|{reason}|{note}"
        now = self._clock()
        series = self._series.get(key)
        if series is not None and now - series.began < SERIES_SECONDS:
            series.count += 1
            if now - series.written < REPEAT_SECONDS:
                metrics.EVENTS_WRITTEN.labels("deduplicated").inc()
                return
            series.written = now
        else:
            digest = hashlib.sha256(f"{key}|{now}|{self._instance}".encode()).hexdigest()[:16]
            series = self._series[key] = _Series(f"{meta['name'][:200]}.{digest}", now, now)
            if len(self._series) > MAX_REMEMBERED:
                self._series.popitem(last=False)
        stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        event: Json = {
            "apiVersion": EVENTS.api_version,
            "kind": EVENTS.kind,
            "metadata": {"namespace": meta.get("namespace") or "default", "name": series.name},
            "eventTime": stamp,
            "reportingController": self._controller,
            "reportingInstance": self._instance[:128],
            "action": action,
            "reason": reason,
            "note": note[:MAX_NOTE],
            "type": "Warning" if warning else "Normal",
            "regarding": {
                "apiVersion": api_version,
                "kind": kind,
                "namespace": meta.get("namespace") or "",
                "name": meta["name"],
                "uid": meta.get("uid") or "",
            },
        }
        if series.count > 1:
            event["series"] = {"count": series.count, "lastObservedTime": stamp}
        try:
            self._queue.put_nowait((series.name, event, series.count))
        except asyncio.QueueFull:
            metrics.EVENTS_WRITTEN.labels("dropped").inc()

    async def run(self) -> None:
        while True:
            _, event, count = await self._queue.get()
            try:
                if count == 1:
                    await self._api.create(EVENTS, event, manager=self._controller)
                else:
                    meta = event["metadata"]
                    patch = {"series": event["series"]}
                    await self._api.patch(
                        EVENTS, meta["namespace"], meta["name"], patch, manager=self._controller
                    )
            except KubeError as error:  # an Event is a courtesy: it is not worth a retry
                metrics.EVENTS_WRITTEN.labels("failed").inc()
                log.debug("event not written: %s", error)
            else:
                metrics.EVENTS_WRITTEN.labels("written").inc()
