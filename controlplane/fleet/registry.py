"""Discovery: reads executors' records from Redis, once a second and at every hint.

Records live under leases written by the executors (`deepflow:te:<id>`, the ids in the set
`deepflow:te:ids`); the pub/sub channel only says "look now". While Redis is down nothing is reported, so
that the last known records stay; streams tell who is alive.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import cast

from deepflow.v1.worker_pb2 import ExecutorRecord
from google.protobuf.message import DecodeError
from redis.asyncio import Redis
from redis.exceptions import RedisError

from controlplane.fleet import metrics

IDS_KEY = "deepflow:te:ids"
RECORD_PREFIX = "deepflow:te:"
HINT_CHANNEL = "deepflow:te:events"
MAX_EXECUTORS = 10_000
"""Ids read at most (ours): a bound on one MGET, far above what one gateway holds streams to."""

log = logging.getLogger(__name__)

# Ids of executors that were killed stay in the set: without this it would grow with every pod there ever was.
# Checked again on the server, so that one that has just registered is not forgotten.
_FORGET = """
for i = 2, #KEYS do
  if redis.call('exists', KEYS[i]) == 0 then redis.call('srem', KEYS[1], ARGV[i - 1]) end
end
return 1
"""


class Registry:
    """`on_records` gets all live records, by id, after every successful read."""

    def __init__(
        self,
        redis: Redis,
        on_records: Callable[[Mapping[str, ExecutorRecord]], None],
        *,
        poll_seconds: float = 1.0,
    ) -> None:
        self._redis = redis
        self._on_records = on_records
        self._poll_seconds = poll_seconds
        self._hint = asyncio.Event()
        self._down = False
        self.last_read: float | None = None  # monotonic

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._poll(), name="fleet-registry-poll")
            group.create_task(self._listen(), name="fleet-registry-hints")

    def look(self) -> None:
        """Read now instead of at the next poll."""
        self._hint.set()

    async def read(self) -> bool:
        """One read; False if Redis could not be reached."""
        try:
            records = await self._fetch()
        except (RedisError, OSError, TimeoutError) as error:
            metrics.REGISTRY_READS.labels("failed").inc()
            if not self._down:
                log.warning("the registry cannot be read, going on with what is known: %s", error)
            self._down = True
            return False
        metrics.REGISTRY_READS.labels("ok").inc()
        if self._down:
            log.info("the registry is back, with %d executors", len(records))
        self._down = False
        self.last_read = time.monotonic()
        self._on_records(records)
        return True

    async def _poll(self) -> None:
        while True:
            self._hint.clear()
            await self.read()
            heed_cancellation()
            age = 0.0 if self.last_read is None else time.monotonic() - self.last_read
            metrics.REGISTRY_AGE.set(age)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._poll_seconds):
                    await self._hint.wait()

    async def _fetch(self) -> dict[str, ExecutorRecord]:
        ids = sorted(_text(item) for item in await self._redis.smembers(IDS_KEY))[:MAX_EXECUTORS]
        if not ids:
            return {}
        values = await self._redis.mget([RECORD_PREFIX + te_id for te_id in ids])
        records: dict[str, ExecutorRecord] = {}
        lapsed: list[str] = []
        for te_id, value in zip(ids, values, strict=True):
            if not isinstance(value, bytes):
                lapsed.append(te_id)
                continue
            try:
                record = ExecutorRecord.FromString(value)
            except DecodeError:
                log.warning("the registry's record of executor %r cannot be read", te_id[:100])
                continue
            if record.te_id == te_id and record.address:
                records[te_id] = record
        if lapsed:
            keys = [IDS_KEY, *(RECORD_PREFIX + te_id for te_id in lapsed)]
            await cast("Awaitable[object]", self._redis.eval(_FORGET, len(keys), *keys, *lapsed))
        return records

    async def _listen(self) -> None:
        while True:
            with contextlib.suppress(RedisError, OSError, TimeoutError):
                async with self._redis.pubsub(ignore_subscribe_messages=True) as pubsub:
                    await pubsub.subscribe(HINT_CHANNEL)
                    while True:
                        message = await pubsub.get_message(timeout=self._poll_seconds)
                        heed_cancellation()
                        if message is not None:
                            self._hint.set()
            heed_cancellation()
            await asyncio.sleep(self._poll_seconds)


def heed_cancellation() -> None:
    """For loops over a Redis client: its calls go through `asyncio.wait_for`, which until Python 3.12 forgets
    a cancellation that arrives as the call completes; the loop, and whoever waits for its end, would hang."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def _text(value: bytes | str) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
