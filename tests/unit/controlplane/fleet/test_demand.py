"""What gateways say of demand, and what whoever scales reads of it, over a real Valkey."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis

from controlplane.fleet import demand
from controlplane.fleet.demand import DemandReader, DemandWriter, above, bucket_of, bucket_seconds
from controlplane.local.valkey import ValkeyServer


@pytest.fixture
async def redis(clean_valkey: str) -> AsyncIterator[Redis]:
    client = Redis.from_url(clean_valkey)
    yield client
    await client.aclose()


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


async def test_activity_and_held_requests_are_read_as_written(redis: Redis) -> None:
    clock = Clock()
    one, two = DemandWriter(redis, "g-1", clock=clock), DemandWriter(redis, "g-2", clock=clock)
    one.record_demand("ns/a", now=clock.now - 30)
    one.record_held("ns/b", 2)
    two.record_held("ns/b", 3)
    assert await one.flush() and await two.flush()
    read = await DemandReader(redis).read()
    assert read.held("ns/b") == 5 and read.held("ns/a") == 0
    assert 29.5 < read.now - read.last["ns/a"] < 35
    assert read.now - read.last["ns/b"] < 5
    two.record_held("ns/b", 0)
    assert await two.flush()
    assert (await DemandReader(redis).read()).held("ns/b") == 2


async def test_a_model_is_in_use_until_its_last_answer_ends(redis: Redis) -> None:
    clock = Clock()
    writer, reader = DemandWriter(redis, "g-1", clock=clock), DemandReader(redis)
    writer.began("m")
    writer.began("m")
    writer.ended("m")
    await writer.flush()
    for _ in range(3):  # a long answer: nothing arrives, nothing ends
        clock.now += 600
        await redis.zrem(demand.LAST_KEY, "m")
        await writer.flush()
        read = await reader.read()
        assert read.now - read.last["m"] < 5
    writer.ended("m")
    await writer.flush()
    clock.now += 600
    await redis.zrem(demand.LAST_KEY, "m")
    await writer.flush()
    assert "m" not in (await reader.read()).last


async def test_an_older_activity_never_replaces_a_newer_one(redis: Redis) -> None:
    clock = Clock()
    new, late = DemandWriter(redis, "g-1", clock=clock), DemandWriter(redis, "g-2", clock=clock)
    new.record_demand("m")
    await new.flush()
    late.record_demand("m", now=clock.now - 500)
    await late.flush()
    read = await DemandReader(redis).read()
    assert read.now - read.last["m"] < 10


async def test_latencies_are_counts_that_survive_the_way(redis: Redis) -> None:
    writer = DemandWriter(redis, "g-1")
    for ttft, tpot in ((0.1, 0.02), (0.9, None), (3.0, 0.3), (None, 0.02)):
        writer.record_answer("m", ttft=ttft, tpot=tpot)
    await writer.flush()
    report = (await DemandReader(redis).read()).gateways["g-1"]
    assert sum(report.ttft["m"].values()) == 3 and sum(report.tpot["m"].values()) == 3
    assert above(report.ttft["m"], 0.5) == 2 and above(report.ttft["m"], 1.0) == 1
    assert above(report.tpot["m"], 0.1) == 1


async def test_a_gateway_that_died_is_forgotten_its_activity_is_not(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demand, "REPORT_TTL_SECONDS", 0.05)
    writer = DemandWriter(redis, "g-1")
    writer.record_held("m", 4)
    await writer.flush()
    await asyncio.sleep(0.1)
    read = await DemandReader(redis).read()
    assert read.held("m") == 0 and "m" in read.last and not read.gateways


async def test_the_first_held_request_is_told_at_once(redis: Redis) -> None:
    woken: asyncio.Queue[str] = asyncio.Queue()
    reader = asyncio.create_task(DemandReader(redis).follow(woken.put_nowait))
    while not (await redis.pubsub_numsub(demand.HINT_CHANNEL))[0][1]:
        await asyncio.sleep(0.01)
    writer = DemandWriter(redis, "g-1")
    running = asyncio.create_task(writer.run())
    writer.record_held("ns/a", 1)
    assert await asyncio.wait_for(woken.get(), 10) == "ns/a"
    for task in (reader, running):
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_what_is_recorded_during_an_outage_is_written_after_it(
    valkey_server: Callable[[], ValkeyServer],
) -> None:
    server = valkey_server()
    client = Redis.from_url(server.url)
    writer = DemandWriter(client, "g-1")
    server.kill()
    writer.record_held("m", 1)
    assert not await writer.flush()
    server.start()
    client = Redis.from_url(server.url)
    writer._redis = client
    assert await writer.flush()
    assert (await DemandReader(client).read()).held("m") == 1
    await client.aclose()


async def test_models_are_bounded_and_the_idle_ones_go_first(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demand, "MAX_MODELS", 3)
    clock = Clock()
    writer = DemandWriter(redis, "g-1", clock=clock)
    writer.record_held("kept", 1)
    for name in "abc":
        clock.now += 1
        writer.record_demand(name)
        await writer.flush()
    assert set(writer._models) == {"kept", "b", "c"}
    assert set((await DemandReader(redis).read()).last) == {"kept", "b", "c"}, "what waits is in use now"


async def test_an_unreadable_report_is_left_out(redis: Redis) -> None:
    writer = DemandWriter(redis, "g-1")
    writer.record_demand("m")
    await writer.flush()
    await redis.set(demand.REPORT_PREFIX + "g-1", b'{"held": 7}')
    read = await DemandReader(redis).read()
    assert read.gateways == {} and "m" in read.last


@given(st.floats(min_value=0, max_value=2000), st.floats(min_value=0.001, max_value=900))
def test_a_latency_lies_within_its_bucket(seconds: float, threshold: float) -> None:
    bucket = bucket_of(seconds)
    assert seconds <= bucket_seconds(bucket) * (1 + 1e-6) or bucket == demand.BUCKETS
    counted = above({bucket: 1}, threshold)
    if seconds <= threshold:
        assert counted == 0
    elif seconds > threshold * 2 ** (1 / demand.BUCKETS_PER_DOUBLING) * 1.001 and bucket < demand.BUCKETS:
        assert counted == 1
