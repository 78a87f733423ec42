"""The executor's record in a real Valkey: lease, hints, outages, removal. Needs the embedded Valkey."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import redis
import redis.asyncio
from deepflow.v1 import worker_pb2 as pb

from controlplane.local.valkey import ValkeyServer
from flowserve.shell import registry
from flowserve.shell.registry import Registry


class Executor:
    """The record, as it is now."""

    def __init__(self, incarnation: str = "i1") -> None:
        self.te_id = f"te-{uuid.uuid4().hex[:8]}"
        self.state = pb.EXECUTOR_STATE_WARM
        self.incarnation = incarnation

    def record(self) -> pb.ExecutorRecord:
        return pb.ExecutorRecord(te_id=self.te_id, incarnation=self.incarnation, state=self.state)


@asynccontextmanager
async def registered(url: str, executor: Executor) -> AsyncIterator[Registry]:
    entry = Registry(url, executor.te_id, executor.record)
    task = asyncio.create_task(entry.run())
    try:
        yield entry
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await entry.close()


def read(url: str, te_id: str) -> pb.ExecutorRecord | None:
    with redis.Redis.from_url(url) as client:
        value = client.get(registry.KEY_PREFIX + te_id)
    return pb.ExecutorRecord.FromString(value) if isinstance(value, bytes) else None


async def until(condition: Callable[[], Any], timeout: float = 10.0) -> None:
    deadline = time.monotonic() + timeout
    while not await asyncio.to_thread(condition):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


async def test_the_record_is_there_under_a_lease_and_known_by_id(valkey_url: str) -> None:
    executor = Executor()
    async with registered(valkey_url, executor):
        await until(lambda: read(valkey_url, executor.te_id))
        assert read(valkey_url, executor.te_id) == executor.record()
        with redis.Redis.from_url(valkey_url) as client:
            assert 0 < client.pttl(registry.KEY_PREFIX + executor.te_id) <= registry.LEASE_MS
            assert client.sismember(registry.IDS_KEY, executor.te_id)


async def test_a_change_is_written_at_once_and_hinted(valkey_url: str) -> None:
    executor = Executor()
    async with (
        redis.asyncio.Redis.from_url(valkey_url) as client,
        client.pubsub(ignore_subscribe_messages=True) as hints,
        registered(valkey_url, executor) as entry,
    ):
        await hints.subscribe(registry.CHANNEL)
        await until(lambda: read(valkey_url, executor.te_id))
        executor.state = pb.EXECUTOR_STATE_READY
        entry.changed()
        started = time.monotonic()
        await until(
            lambda: (found := read(valkey_url, executor.te_id)) and found.state == pb.EXECUTOR_STATE_READY
        )
        assert time.monotonic() - started < registry.BEAT_SECONDS / 2
        deadline = time.monotonic() + 5
        seen: set[bytes] = set()
        while executor.te_id.encode() not in seen and time.monotonic() < deadline:
            message = await hints.get_message(timeout=0.5)
            if message is not None:
                seen.add(message["data"])
        assert executor.te_id.encode() in seen


async def test_an_emptied_server_is_healed_by_the_next_beat(
    valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "BEAT_SECONDS", 0.1)
    executor = Executor()
    async with registered(valkey_url, executor):
        await until(lambda: read(valkey_url, executor.te_id))
        with redis.Redis.from_url(valkey_url) as client:
            client.delete(registry.KEY_PREFIX + executor.te_id)
            client.srem(registry.IDS_KEY, executor.te_id)
        await until(lambda: read(valkey_url, executor.te_id))
        with redis.Redis.from_url(valkey_url) as client:
            assert client.sismember(registry.IDS_KEY, executor.te_id)


async def test_a_clean_exit_takes_the_record_back(valkey_url: str) -> None:
    executor = Executor()
    async with registered(valkey_url, executor) as entry:
        await until(lambda: read(valkey_url, executor.te_id))
        await entry.remove()
        assert read(valkey_url, executor.te_id) is None
        with redis.Redis.from_url(valkey_url) as client:
            assert not client.sismember(registry.IDS_KEY, executor.te_id)


async def test_a_successors_record_is_left_alone(valkey_url: str) -> None:
    executor = Executor()
    async with registered(valkey_url, executor) as entry:
        await until(lambda: read(valkey_url, executor.te_id))
        successor = executor.record()
        successor.incarnation = "i2"
        with redis.Redis.from_url(valkey_url) as client:
            client.set(registry.KEY_PREFIX + executor.te_id, successor.SerializeToString())
        await entry.remove()
        assert read(valkey_url, executor.te_id) == successor


async def test_an_outage_is_survived_logged_once_and_healed(
    valkey_server: Callable[[], ValkeyServer], caplog: pytest.LogCaptureFixture
) -> None:
    def logged(text: str) -> int:
        return sum(text in record.message for record in caplog.records)

    server = valkey_server()
    executor = Executor()
    with caplog.at_level(logging.INFO, registry.__name__):
        async with registered(server.url, executor) as entry:
            await until(lambda: read(server.url, executor.te_id))
            await asyncio.to_thread(server.kill)
            entry.changed()
            for _ in range(3):
                assert not await entry.write()
            started = time.monotonic()
            await entry.remove()  # bounded, and no error: the lease is for this
            assert time.monotonic() - started < 2 * registry.TIMEOUT_SECONDS
            executor.state = pb.EXECUTOR_STATE_READY
            await asyncio.to_thread(server.start)
            await until(lambda: (found := read(server.url, executor.te_id)) and found.state == executor.state)
            await until(lambda: logged("registered") == 2)  # said after the server has answered
    assert (logged("unreachable"), logged("registered")) == (1, 2)


async def test_a_cancellation_that_the_client_swallows_still_ends_the_beats(valkey_url: str) -> None:
    entry = Registry(valkey_url, "te-x", Executor().record)
    writing = asyncio.Event()

    async def write() -> bool:
        writing.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(10)
        return True

    entry.write = write  # type: ignore[method-assign]  # stands for the client's wait_for
    task = asyncio.create_task(entry.run())
    await writing.wait()
    task.cancel()
    async with asyncio.timeout(1):
        await asyncio.wait((task,))
    assert task.cancelled()
    await entry.close()


async def test_a_server_that_hangs_costs_a_bounded_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(registry, "TIMEOUT_SECONDS", 0.1)
    held: list[asyncio.StreamWriter] = []

    async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        held.append(writer)
        await reader.read()

    server = await asyncio.start_server(swallow, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    entry = Registry(f"redis://127.0.0.1:{port}", "te-x", Executor().record)
    started = time.monotonic()
    assert not await entry.write()
    assert time.monotonic() - started < 1.0
    await entry.close()
    for writer in held:
        writer.close()
    server.close()
