"""This executor's record in the registry (Redis protocol), under a lease.

Discovery only: liveness is the stream, and serving goes on while Redis is down. The full record is
written again at every beat, so a restarted or emptied server heals by itself; a pub/sub message
hints at changes, and may be lost.

    deepflow:te:<te_id>   ExecutorRecord, expires after the lease     deepflow:te:ids   set of te_ids
    deepflow:te:events    channel: te_id of a record that changed
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import cast

from deepflow.v1 import worker_pb2 as pb
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from flowserve.shell import metrics

log = logging.getLogger(__name__)

KEY_PREFIX = "deepflow:te:"
IDS_KEY = "deepflow:te:ids"
CHANNEL = "deepflow:te:events"
LEASE_MS = 10_000
BEAT_SECONDS = 2.0
"""Four beats may be lost before the lease ends."""
TIMEOUT_SECONDS = 2.0
BACKOFF_FIRST_SECONDS = 0.2
BACKOFF_LAST_SECONDS = 2.0  # not above a beat: the lease must survive a short outage

# Another incarnation under the same name may have registered meanwhile: only our own bytes go.
_REMOVE = """
if redis.call('get', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('del', KEYS[1])
redis.call('srem', KEYS[2], ARGV[2])
redis.call('publish', ARGV[3], ARGV[2])
return 1
"""


class Registry:
    """Writes the record that `record` returns until it is cancelled; `changed` writes it at once."""

    def __init__(self, url: str, te_id: str, record: Callable[[], pb.ExecutorRecord]) -> None:
        self._te_id = te_id
        self._record = record
        self._redis: Redis = Redis.from_url(
            url,
            # Bounded by asyncio.timeout around each call: the client's own bound goes through
            # asyncio.wait_for, which until Python 3.12 can forget a cancellation.
            socket_timeout=None,
            socket_connect_timeout=TIMEOUT_SECONDS,
            retry=Retry(NoBackoff(), 0),  # retrying is this class's
            max_connections=2,
        )
        self._written = b""
        self._wake = asyncio.Event()
        self._writing = asyncio.Lock()
        self._connected: bool | None = None

    @property
    def key(self) -> str:
        return KEY_PREFIX + self._te_id

    def changed(self) -> None:
        """The record has changed: write it now, and say so."""
        self._wake.set()

    async def run(self) -> None:
        """Beats until cancelled."""
        backoff = BACKOFF_FIRST_SECONDS
        while True:
            self._wake.clear()
            if await self.write():
                backoff = BACKOFF_FIRST_SECONDS
                wait = BEAT_SECONDS
            else:
                wait, backoff = backoff, min(2 * backoff, BACKOFF_LAST_SECONDS)
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise asyncio.CancelledError  # the client's connecting may have swallowed it
            try:
                async with asyncio.timeout(wait):
                    await self._wake.wait()
            except TimeoutError:
                continue
            if not self._connected:  # a change does not shorten the back-off
                await asyncio.sleep(wait)

    async def write(self) -> bool:
        """One full write. False if the server could not be reached."""
        async with self._writing:
            record = self._record().SerializeToString(deterministic=True)
            try:
                async with asyncio.timeout(TIMEOUT_SECONDS), self._redis.pipeline(transaction=True) as pipe:
                    pipe.set(self.key, record, px=LEASE_MS)
                    pipe.sadd(IDS_KEY, self._te_id)
                    if record != self._written:
                        pipe.publish(CHANNEL, self._te_id)
                    await pipe.execute()
            except (RedisError, OSError, TimeoutError) as error:
                self._set_connected(False, error)
                return False
            self._written = record
            self._set_connected(True)
            return True

    async def remove(self) -> None:
        """Takes the record back, once, within a bound; a lost removal is what the lease is for."""
        async with self._writing:
            try:
                async with asyncio.timeout(TIMEOUT_SECONDS):
                    removal = self._redis.eval(
                        _REMOVE, 2, self.key, IDS_KEY, self._written, self._te_id, CHANNEL
                    )
                    await cast("Awaitable[object]", removal)
            except (RedisError, OSError, TimeoutError) as error:
                self._set_connected(False, error)

    async def close(self) -> None:
        await self._redis.aclose()

    def _set_connected(self, connected: bool, error: Exception | None = None) -> None:
        if not connected:
            metrics.REGISTRY_ERRORS.inc()
        metrics.REGISTRY_CONNECTED.set(connected)
        if connected is self._connected:
            return
        self._connected = connected
        if connected:
            log.info("registered as %s", self.key)
        else:
            log.warning("registry unreachable, serving goes on: %s", str(error) or type(error).__name__)
