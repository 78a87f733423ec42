"""Records behind serving's back: batches, outages, bounds. The store is scripted here."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

from redis.exceptions import ConnectionError as RedisConnectionError

from controlplane.jobs.records import JobRecord
from controlplane.jobs.settings import RuntimeSettings
from controlplane.jobs.writer import RecordWriter

from .conftest import Bench


@dataclass
class ScriptedStore:
    down: bool = False
    run_id: str = "one"
    batches: list[list[str]] = field(default_factory=list)

    async def write(self, records: Sequence[JobRecord]) -> None:
        if self.down:
            raise RedisConnectionError("scripted")
        self.batches.append([record.job_id for record in records])

    async def server_id(self) -> str:
        return self.run_id


def writer(bench: Bench, store: ScriptedStore, **settings: object) -> RecordWriter:
    values = RuntimeSettings(**settings)  # type: ignore[arg-type]
    return RecordWriter(store, lambda: bench.jobs.live_jobs, values)  # type: ignore[arg-type]


async def test_many_changes_of_a_job_are_one_write(bench: Bench) -> None:
    store = ScriptedStore()
    records = writer(bench, store)
    job = bench.submit()
    for _ in range(5):
        records.changed(job)
    assert await records.flush()
    assert store.batches == [[job.job_id]]


async def test_after_an_outage_marked_and_live_jobs_are_written(bench: Bench) -> None:
    store = ScriptedStore(down=True)
    records = writer(bench, store)
    live, ended = bench.submit(), bench.submit()
    ended.cancel("over")
    records.changed(ended)
    assert not await records.flush()
    store.down = False
    assert await records.flush()
    written = {job_id for batch in store.batches for job_id in batch}
    assert written == {live.job_id, ended.job_id}


async def test_a_restarted_store_gets_live_jobs_again(bench: Bench) -> None:
    store = ScriptedStore()
    records = writer(bench, store)
    live, other = bench.submit(), bench.submit()
    records.changed(live)
    await records.flush()
    store.run_id, records._checked = "two", 0.0
    store.batches.clear()
    records.changed(other)
    await records.flush()
    assert live.job_id in {job_id for batch in store.batches for job_id in batch}


async def test_during_an_outage_the_first_ended_jobs_are_dropped(bench: Bench) -> None:
    store = ScriptedStore(down=True)
    records = writer(bench, store, record_pending=2)
    jobs = [bench.submit() for _ in range(3)]
    jobs[1].cancel("over")
    for job in jobs:
        records.changed(job)
    assert not await records.flush()
    store.down = False
    bench_live = {job.job_id for job in bench.jobs.live_jobs}
    await records.flush()
    assert {job_id for batch in store.batches for job_id in batch} == bench_live


async def test_an_ended_job_waits_without_its_prompt(bench: Bench) -> None:
    store = ScriptedStore(down=True)
    records = writer(bench, store)
    job = bench.submit(prompt=4000)
    job.cancel("over")
    records.changed(job)
    assert not await records.flush()
    job_id, gone = job.job_id, weakref.ref(job)
    del job
    gc.collect()
    assert gone() is None
    store.down = False
    assert await records.flush()
    assert store.batches == [[job_id]]


async def test_a_job_that_ends_soon_is_written_once(bench: Bench) -> None:
    store = ScriptedStore()
    records = writer(bench, store)
    short, long = bench.submit(), bench.submit()
    long.created_at -= 1000
    records.changed(short)
    records.changed(long)
    short.created_at = time.time()
    assert await records.flush(60.0)
    assert store.batches == [[long.job_id]], "the young one runs: it waits"
    short.cancel("over")
    records.changed(short)
    assert await records.flush(60.0)
    assert store.batches == [[long.job_id], [short.job_id]]
