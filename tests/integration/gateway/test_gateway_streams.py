"""Streams over real sockets: keep-alives, early errors, slow and leaving clients, drain. Needs Valkey."""

from __future__ import annotations

import asyncio
import socket
import time

import orjson

from tests.integration.gateway.conftest import MODEL, Stack, StartStack
from tests.support.http_client import stream

PATH = "/v1/completions"


def payload(**fields: object) -> dict[str, object]:
    return {"model": MODEL, "prompt": "one two three", "stream": True, **fields}


async def until(condition: object, seconds: float = 5) -> None:
    assert callable(condition)
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


async def test_keepalives_come_before_the_first_token_and_between_tokens(start: StartStack) -> None:
    stack = await start(sse_keepalive_seconds=0.05, peek_seconds=0.02)
    stack.executor.first_delay = 0.3
    stack.executor.delay = 0.12
    run = await stream("127.0.0.1", stack.port, PATH, payload())
    assert run.done and run.text() == "one two three"
    # 6 or so before the first token, two in each pause after it.
    assert run.comments >= 6, run.comments
    assert run.arrivals[0] - run.started >= 0.29


async def test_no_keepalive_disturbs_a_flowing_stream(start: StartStack) -> None:
    stack = await start(sse_keepalive_seconds=0.2)
    stack.executor.delay = 0.01
    stack.executor.script = lambda request, index: [500] * 60
    run = await stream("127.0.0.1", stack.port, PATH, payload(max_tokens=60))
    assert run.done and run.comments == 0


async def test_disconnect_cancels_the_job_at_once(stack: Stack) -> None:
    stack.executor.delay = 30
    for body in (payload(), payload(stream=False)):
        reader, writer = await asyncio.open_connection("127.0.0.1", stack.port)
        data = orjson.dumps(body)
        writer.write(
            b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (PATH.encode(), len(data), data)
        )
        await until(lambda: stack.executor.jobs and stack.gateway.limiter.in_flight == 1)
        await asyncio.sleep(0.05)
        writer.close()
        left = time.perf_counter()
        await until(lambda: stack.executor.jobs[-1].cancelled is not None, 1)
        assert time.perf_counter() - left < 0.2
        assert stack.executor.jobs[-1].cancelled == "client disconnected"
        await until(lambda: stack.gateway.limiter.in_flight == 0)
        stack.executor.jobs.clear()
        del reader
    async with stack.http() as http:
        metrics = (await http.get("/metrics")).text
    assert 'status="499"' in metrics


async def test_many_prompts_are_all_cancelled(stack: Stack) -> None:
    stack.executor.delay = 30
    run = await stream("127.0.0.1", stack.port, PATH, payload(prompt=["a", "b", "c"]), stop_after=1)
    assert run.status == 200
    await until(lambda: len(stack.executor.jobs) == 3)
    await until(lambda: all(job.cancelled for job in stack.executor.jobs))


async def test_slow_client_is_cut_and_others_are_not_held(start: StartStack) -> None:
    stack = await start(sse_buffer_bytes=16 * 1024, sse_stall_seconds=0.5)
    stack.executor.script = lambda request, index: [500] * 2000
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    slow.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(slow, ("127.0.0.1", stack.port))
    # Large chunks, so that the kernel's buffers fill too: n choices of long texts with logprobs.
    data = orjson.dumps(payload(prompt=["x"] * 8, n=8, max_tokens=1900, logprobs=20))
    head = (
        b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    )
    await loop.sock_sendall(slow, head % (PATH.encode(), len(data)) + data)
    await until(lambda: stack.executor.jobs)
    stack.executor.script = None
    run = await stream("127.0.0.1", stack.port, PATH, payload())
    assert run.done, "another stream is served meanwhile"
    await until(lambda: all(job.cancelled for job in stack.executor.jobs[:8]), 10)
    assert stack.executor.jobs[0].cancelled == "client too slow"
    await until(lambda: stack.gateway.limiter.in_flight == 0)
    slow.close()


async def test_deadline_is_504_before_and_in_band_after_the_headers(start: StartStack) -> None:
    stack = await start(request_seconds=0.2, request_grace_seconds=0.1, peek_seconds=1)
    stack.executor.first_delay = 30
    run = await stream("127.0.0.1", stack.port, PATH, payload())
    assert run.status == 504 and b"deadline_exceeded" in run.body
    stack.executor.first_delay, stack.executor.delay = 0, 30
    run = await stream("127.0.0.1", stack.port, PATH, payload())
    error = run.error()
    assert run.status == 200 and error is not None and "deadline_exceeded" in str(error)
    assert all(job.cancelled for job in stack.executor.jobs)


async def test_bound_of_running_requests_is_429(start: StartStack) -> None:
    stack = await start(max_in_flight=4)
    stack.executor.first_delay = 0.3
    runs = await asyncio.gather(*(stream("127.0.0.1", stack.port, PATH, payload()) for _ in range(10)))
    assert sorted(run.status for run in runs) == [200] * 4 + [429] * 6
    refused = next(run for run in runs if run.status == 429)
    assert refused.headers["retry-after"] == "1" and b"queue_full" in refused.body
    assert stack.gateway.limiter.in_flight == 0


async def test_drain_lets_streams_end_then_cuts_them(start: StartStack) -> None:
    stack = await start(drain_seconds=1)
    stack.executor.delay = 0.1
    short = asyncio.create_task(stream("127.0.0.1", stack.port, PATH, payload()))
    stack.executor.script = lambda request, index: (
        [500] * 1000 if request.max_output_tokens > 16 else [500, 600, 2]
    )
    long = asyncio.create_task(stream("127.0.0.1", stack.port, PATH, payload(max_tokens=900)))
    await until(lambda: len(stack.executor.jobs) == 2)
    await asyncio.sleep(0.2)
    stack.server.begin_drain()
    assert (await short).done
    cut = await long
    assert cut.error() is not None and "shutting_down" in str(cut.error())
    await stack.task
