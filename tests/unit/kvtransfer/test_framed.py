"""The plain stream: order, credentials, bounds, ends. Over real sockets; the bytes' cutting by property."""

from __future__ import annotations

import asyncio
import itertools
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from deepflow.v1.worker_pb2 import AbortTask, TasksRequest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer import framed
from kvtransfer.auth import call_metadata
from kvtransfer.framed import StreamCall, StreamClosed, StreamEnded, StreamServer, open_stream

TOKEN = "secret"


def message(text: str) -> TasksRequest:
    return TasksRequest(abort=AbortTask(task_id=text))


async def echo(requests: AsyncIterator[TasksRequest], context: Any) -> None:
    async for request in requests:
        await context.write(request)


@asynccontextmanager
async def served(handler: Callable[[Any, Any], Any] = echo, token: str = TOKEN) -> AsyncIterator[str]:
    server = StreamServer(handler, TasksRequest.FromString, token=token)
    port = await server.start("127.0.0.1")
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop()
        assert not server.open


async def call(address: str, token: str = TOKEN) -> StreamCall[TasksRequest]:
    return await open_stream(address, call_metadata(token), TasksRequest.FromString, seconds=5)


async def test_messages_come_in_order_and_whole_whatever_their_size() -> None:
    texts = [f"{number}-" + "x" * size for number, size in enumerate((0, 1, 100, 300_000, 5, 2_000_000, 7))]
    async with served() as address:
        stream = await call(address)

        async def write() -> None:
            for text in texts:
                await stream.write(message(text))

        writing = asyncio.create_task(write())
        assert [(await anext(stream)).abort.task_id for _ in texts] == texts
        await writing
        stream.cancel()


async def test_a_generator_is_a_handler_too_and_its_end_ends_the_stream() -> None:
    async def three(requests: AsyncIterator[TasksRequest], context: Any) -> AsyncIterator[TasksRequest]:
        first = await anext(requests)
        for number in range(3):
            yield message(f"{first.abort.task_id}{number}")

    async with served(three) as address:
        stream = await call(address)
        await stream.write(message("a"))
        assert [item.abort.task_id async for item in stream] == ["a0", "a1", "a2"]
        assert await stream.details() == ""


async def test_a_listener_hears_each_message_in_order_and_the_streams_end() -> None:
    async def three(requests: AsyncIterator[TasksRequest], context: Any) -> AsyncIterator[TasksRequest]:
        async for request in requests:
            yield message(f"{request.abort.task_id}!")
            if request.abort.task_id == "2":
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "enough")

    async with served(three) as address:
        stream = await call(address)
        await stream.write(message("0"))
        await asyncio.sleep(0.05)  # it comes before anybody listens
        heard: list[str] = []

        def take(item: TasksRequest) -> None:
            heard.append(item.abort.task_id)
            stream.write_now(message(str(len(heard))))

        with pytest.raises(StreamEnded, match="enough"):
            await stream.hear(take)
        assert heard == ["0!", "1!", "2!"]
        await asyncio.sleep(0.05)
        assert not stream.write_now(message("late")), "it is closed"


async def test_credentials_are_checked_before_anything_is_handled() -> None:
    async with served(token="another") as address:
        stream = await call(address)
        with pytest.raises(StreamEnded, match="UNAUTHENTICATED"):
            await anext(stream)
    async with served() as address:
        no_version = (("authorization", f"Bearer {TOKEN}"),)
        stream = await open_stream(address, no_version, TasksRequest.FromString, seconds=5)
        with pytest.raises(StreamEnded, match="FAILED_PRECONDITION: protocol version"):
            await anext(stream)


async def test_an_aborting_and_a_failing_handler_tell_their_client() -> None:
    async def abort(requests: object, context: Any) -> None:
        assert dict(context.invocation_metadata())["x-deepflow-protocol"]
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many")

    async def fail(requests: object, context: Any) -> None:
        raise RuntimeError("scripted")

    for handler, said in ((abort, "RESOURCE_EXHAUSTED: too many"), (fail, "UNKNOWN: RuntimeError: scripted")):
        async with served(handler) as address:
            stream = await call(address)
            with pytest.raises(StreamEnded, match=said):
                await anext(stream)


async def test_a_handler_ends_with_its_client_and_a_client_with_its_server() -> None:
    ended = asyncio.Event()

    async def waits(requests: AsyncIterator[TasksRequest], context: Any) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with served(waits) as address:
        stream = await call(address)
        await asyncio.sleep(0.05)
        stream.cancel()
        async with asyncio.timeout(5):
            await ended.wait()
        with pytest.raises(StreamClosed):
            await stream.write(message("late"))
        stream = await call(address)
    async with asyncio.timeout(5):
        with pytest.raises((StopAsyncIteration, StreamEnded, ConnectionError)):
            await anext(stream)


async def test_a_reader_that_lags_holds_its_writer_and_nothing_is_lost() -> None:
    written = 0

    async def pour(requests: AsyncIterator[TasksRequest], context: Any) -> None:
        nonlocal written
        for number in range(4000):
            await context.write(message(f"{number}-" + "x" * 5000))
            written += 1

    async with served(pour) as address:
        stream = await call(address)
        await asyncio.sleep(0.5)
        assert written < 4000, "20 MB do not fit the buffers of sockets and ends"
        got = [int(item.abort.task_id.partition("-")[0]) async for item in stream]
        assert got == list(range(4000))


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        struct.pack("<IB", 1 << 30, 1),
        struct.pack("<IB", 3, 1) + b"{{{",
        struct.pack("<IB", 20_000, 2) + b"x" * 20_000,  # more than is held of somebody unknown
        struct.pack("<IB", 0, 9),
    ],
)
async def test_what_is_not_the_protocol_is_closed(data: bytes) -> None:
    async with served() as address:
        reader, writer = await asyncio.open_connection(*address.split(":"))
        writer.write(data)
        async with asyncio.timeout(5):
            with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                await reader.readexactly(1 << 20)
        writer.close()


async def test_who_says_nothing_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(framed, "OPEN_SECONDS", 0.05)
    async with served() as address:
        reader, writer = await asyncio.open_connection(*address.split(":"))
        async with asyncio.timeout(5):
            assert b"DEADLINE_EXCEEDED" in await reader.read()
        writer.close()


async def test_nobody_there_is_an_oserror() -> None:
    with pytest.raises(OSError, match="127"):
        await call("127.0.0.1:1")


@given(st.lists(st.binary(max_size=40), max_size=8), st.lists(st.integers(0, 300), max_size=8))
def test_frames_are_whole_wherever_the_bytes_are_cut(payloads: list[bytes], cuts: list[int]) -> None:
    async def run() -> None:
        stream: StreamCall[bytes] = StreamCall(bytes)
        data = b"".join(struct.pack("<IB", len(item), 2) + item for item in payloads)
        edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
        for begin, end in itertools.pairwise(edges):
            stream.data_received(data[begin:end])
        stream.connection_lost(None)
        assert [item async for item in stream] == payloads

    asyncio.run(run())
