"""Job records in Redis: JSON with a lifetime, and indexes by time (all jobs, and each tenant's).

Keys: `deepflow:job:<id>` (JSON), `deepflow:jobs` and `deepflow:jobs:tenant:<tenant>` (sorted sets, score =
microseconds of creation). Serving records are a convenience: losing them loses no answer, so they live
for a bounded time and in a bounded number. Written by `writer.py`, read by the gateway's routes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from redis.asyncio import Redis

from controlplane.jobs.records import JobRecord, from_bytes, to_bytes

log = logging.getLogger(__name__)

JOB_PREFIX = "deepflow:job:"
INDEX = "deepflow:jobs"
TENANT_INDEX_PREFIX = "deepflow:jobs:tenant:"
TTL_SECONDS = 3600.0  # ours: long enough to look into what happened, short enough to bound the store
MAX_INDEXED = 100_000  # per index (ours): an hour of 28 jobs a second
_Entries = list[tuple[int, str]]  # (score, job id)
_Records = list[JobRecord]
PAGE_ROUNDS = 8  # index pages looked through for one page of records that still live


class JobStore:
    """Raises redis.RedisError (and OSError) from every method while the store cannot be reached."""

    def __init__(
        self,
        redis: Redis,
        *,
        ttl_seconds: float = TTL_SECONDS,
        max_indexed: int = MAX_INDEXED,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._redis = redis
        self._ttl = ttl_seconds
        self._max_indexed = max_indexed
        self._clock = clock

    async def get(self, job_id: str) -> JobRecord | None:
        data = await self._redis.get(JOB_PREFIX + job_id)
        return _read(data)

    async def list(
        self, limit: int, cursor: str | None = None, tenant: str | None = None
    ) -> tuple[_Records, str | None]:
        """Newest first: at most `limit` records, and the cursor of the next page (None: no more).

        `tenant` None means all. A cursor that was not made here counts as none.
        """
        key = INDEX if tenant is None else TENANT_INDEX_PREFIX + tenant
        found: _Records = []
        position = _parse_cursor(cursor)
        for _ in range(PAGE_ROUNDS):
            wanted = limit - len(found)
            entries = await self._page(key, position, wanted)
            if not entries:
                return found, None
            values = await self._redis.mget([JOB_PREFIX + job_id for _, job_id in entries])
            found += [record for value in values if (record := _read(value)) is not None]
            position = entries[-1]
            if len(entries) < wanted:
                return found, None
            if len(found) >= limit:
                break
        assert position is not None
        return found, f"{position[0]}:{position[1]}"

    async def _page(self, key: str, position: tuple[int, str] | None, wanted: int) -> _Entries:
        """The next `wanted` index entries after `position`, newest first."""
        highest: str | int = "+inf" if position is None else position[0]
        offset, size = 0, wanted + 1
        entries: _Entries = []
        while len(entries) < wanted:
            # Several jobs may share a microsecond: those at or before the position are skipped.
            rows: Any = await self._redis.zrevrangebyscore(
                key, highest, "-inf", start=offset, num=size, withscores=True
            )
            for member, score in rows:
                entry = (int(score), member.decode() if isinstance(member, bytes) else str(member))
                if position is None or entry < position:
                    entries.append(entry)
            offset += len(rows)
            if len(rows) < size:
                break
        return entries[:wanted]

    async def write(self, records: Sequence[JobRecord]) -> None:
        """Writes whole records, in one round trip; what was there is replaced."""
        if not records:
            return
        ttl = max(1, int(self._ttl))
        oldest = int((self._clock() - self._ttl) * 1e6)
        pipe = self._redis.pipeline(transaction=False)
        indexes: dict[str, dict[str, int]] = {INDEX: {}}  # one command an index, not one a record
        for record in records:
            pipe.set(JOB_PREFIX + record.job_id, to_bytes(record), ex=ttl)
            score = int(record.created_at * 1e6)
            for key in (INDEX, TENANT_INDEX_PREFIX + record.tenant):
                indexes.setdefault(key, {})[record.job_id] = score
        for key, scores in indexes.items():
            pipe.zadd(key, scores)
            pipe.zremrangebyscore(key, "-inf", oldest)
            pipe.zremrangebyrank(key, 0, -self._max_indexed - 1)
            pipe.expire(key, ttl)
        await pipe.execute()

    async def server_id(self) -> str:
        """Changes when the server was restarted: what was written before may be gone."""
        info = await self._redis.info("server")
        return str(info.get("run_id", ""))


def _read(value: bytes | str | None) -> JobRecord | None:
    """None for what is gone, and for what another version wrote: it lives for an hour at most."""
    if value is None:
        return None
    try:
        return from_bytes(value if isinstance(value, bytes) else value.encode())
    except ValueError as error:
        log.warning("a job record cannot be read: %s", error)
        return None


def _parse_cursor(cursor: str | None) -> tuple[int, str] | None:
    score, _, job_id = (cursor or "").partition(":")
    if not (score.isascii() and score.isdigit() and len(score) <= 17 and job_id):
        return None
    return int(score), job_id
