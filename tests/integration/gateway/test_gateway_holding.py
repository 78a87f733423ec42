"""Requests for a sleeping model: held in bounds, told how it goes, answered when it wakes. Needs Valkey."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from controlplane.fleet.demand import DemandReader
from controlplane.jobs.serving import ServingError
from tests.integration.gateway.conftest import (
    MODEL,
    REVISION,
    Stack,
    StartStack,
    catalogue_entry,
    write_catalogue,
)
from tests.integration.gateway.test_gateway_streams import payload
from tests.integration.gateway.test_gateway_streams import until as until_within
from tests.support.http_client import StreamRun, stream

PATH = "/v1/completions"


@pytest.fixture
def catalogue_path(tmp_path: Path, small_model_path: Path) -> Path:
    path = tmp_path / "catalogue.json"
    write_catalogue(path, [catalogue_entry(small_model_path, wakes=True)])
    return path


@pytest.fixture
async def asleep(start: StartStack) -> Stack:
    return await sleeping(start)


async def sleeping(start: StartStack, **settings: Any) -> Stack:
    stack = await start(peek_seconds=0.05, hold_comment_seconds=0.1, **settings)
    stack.executor.serving = False
    return stack


async def until(condition: object) -> None:
    """Cards, watches and polls take seconds on a machine that does other things too."""
    await until_within(condition, 20)


def ask(stack: Stack, **fields: object) -> asyncio.Task[httpx.Response]:
    async def one() -> httpx.Response:
        async with stack.http() as http:
            return await http.post(PATH, json=payload(**{"stream": False, **fields}))

    return asyncio.create_task(one())


async def held(stack: Stack, count: int) -> None:
    await until(lambda: sum(len(s.held) for s in stack.gateway.holding._sleeping.values()) == count)


async def test_a_held_stream_tells_how_it_goes_and_is_answered(asleep: Stack) -> None:
    run = StreamRun()
    task = asyncio.create_task(stream("127.0.0.1", asleep.port, PATH, payload(), run=run))
    await until(lambda: run.comments >= 3)
    assert run.status == 200 and not run.events and not asleep.executor.jobs
    asleep.executor.serving = True
    await task
    assert run.done and run.text() == "one two three"


async def test_a_comment_says_stage_and_time(asleep: Stack) -> None:
    async with asleep.http() as http, http.stream("POST", PATH, json=payload()) as response:
        lines = response.aiter_lines()
        line = await anext(lines)
        fields = orjson.loads(line.removeprefix(": waking "))
        assert fields["model"] == MODEL and fields["stage"] == "waiting_for_executor"
        assert fields["waited_seconds"] >= 0 and "left_seconds" not in fields
        asleep.executor.serving = True
        async for _ in lines:
            pass
    # The next start is estimated by the last one.
    asleep.executor.serving = False
    wakes = [asleep.gateway.holding._times.typical(MODEL)]
    assert wakes[0] is not None and wakes[0] > 0


async def test_a_held_whole_answer_says_how_long_it_was_held(asleep: Stack) -> None:
    task = ask(asleep)
    await held(asleep, 1)
    asleep.executor.serving = True
    response = await task
    assert response.status_code == 200
    assert float(response.headers["x-deepflow-held-seconds"]) > 0


async def test_too_many_are_refused_at_once_with_retry_after(start: StartStack) -> None:
    stack = await sleeping(start, hold_requests=2)
    tasks = [ask(stack), ask(stack)]
    await held(stack, 2)
    refused = await ask(stack)
    assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["code"] == "hold_full"
    assert refused.headers["x-deepflow-drop-reason"] == "rejected-queue-full"
    streamed = await stream("127.0.0.1", stack.port, PATH, payload())
    assert streamed.status == 429, "a refused stream keeps its status"
    stack.executor.serving = True
    assert [(await task).status_code for task in tasks] == [200, 200]


@pytest.mark.parametrize("bound", ["hold_bytes", "hold_total_bytes"])
async def test_held_bytes_are_bounded(start: StartStack, bound: str) -> None:
    stack = await sleeping(start, **{bound: 2000})
    long = ask(stack, prompt="one two " * 200)
    await held(stack, 1)
    assert (await ask(stack, prompt="one two " * 200)).status_code == 429
    short = ask(stack)
    await held(stack, 2)
    stack.executor.serving = True
    assert {(await task).status_code for task in (long, short)} == {200}
    assert stack.gateway.holding._bytes == 0


async def test_one_held_too_long_is_told_why_and_when_to_come_back(start: StartStack) -> None:
    stack = await sleeping(start, hold_seconds=0.3)
    response = await ask(stack)
    assert response.status_code == 503 and int(response.headers["retry-after"]) >= 1
    error = response.json()["error"]
    assert error["code"] == "wake_timeout" and "waiting_for_executor" in error["message"]
    streamed = await stream("127.0.0.1", stack.port, PATH, payload())
    assert streamed.status == 200, "its comments had begun"
    assert streamed.error() is not None and streamed.done
    assert not stack.gateway.holding._sleeping and not stack.executor.jobs


async def test_a_client_that_leaves_is_held_no_longer(asleep: Stack) -> None:
    task = asyncio.create_task(stream("127.0.0.1", asleep.port, PATH, payload()))
    await held(asleep, 1)
    task.cancel()
    await held(asleep, 0)
    await until(lambda: asleep.gateway.limiter.in_flight == 0)
    asleep.executor.serving = True
    await asyncio.sleep(0.1)
    assert not asleep.executor.jobs


async def test_where_the_queue_is_full_by_then_it_waits_on(asleep: Stack) -> None:
    task = ask(asleep)
    await held(asleep, 1)
    asleep.executor.refuse = ServingError(429, "queue_full", "full")
    asleep.executor.serving = True
    await asyncio.sleep(0.3)
    assert not task.done()
    asleep.executor.refuse = None
    assert (await task).status_code == 200


async def test_other_refusals_after_the_wake_are_told(asleep: Stack) -> None:
    task = ask(asleep)
    await held(asleep, 1)
    asleep.executor.refuse = ServingError(400, "context_length_exceeded", "too long")
    asleep.executor.serving = True
    assert (await task).status_code == 400


async def test_a_model_that_nobody_wakes_is_not_held_here(
    start: StartStack, catalogue_path: Path, small_model_path: Path
) -> None:
    write_catalogue(catalogue_path, [catalogue_entry(small_model_path)])
    stack = await sleeping(start)
    assert (await ask(stack)).status_code == 200, "the job executor has a queue of its own"


async def test_demand_is_told_once_however_many_wait_and_answers_count(asleep: Stack) -> None:
    hints: list[str] = []
    reader = DemandReader(asleep.redis)
    follower = asyncio.create_task(reader.follow(hints.append))
    await asyncio.sleep(0.2)
    tasks = [ask(asleep) for _ in range(20)]
    await held(asleep, 20)
    async with asyncio.timeout(20):
        while (await reader.read()).held(MODEL) != 20:
            await asyncio.sleep(0.02)
    demand = await reader.read()
    assert demand.now - demand.last[MODEL] < 5
    assert hints == [MODEL]
    asleep.executor.serving = True
    assert {(await task).status_code for task in tasks} == {200}
    assert (await ask(asleep)).status_code == 200
    async with asyncio.timeout(10):
        while not (await reader.read()).gateways:
            await asyncio.sleep(0.02)
        while True:
            (report,) = (await reader.read()).gateways.values()
            if report.ttft and report.tpot and not report.held:
                break
            await asyncio.sleep(0.05)
    assert sum(report.ttft[MODEL].values()) == 1, "a wait for the start is no sign of a slow model"
    assert sum(report.tpot[MODEL].values()) == 21
    follower.cancel()
    await asyncio.gather(follower, return_exceptions=True)


async def test_a_sleeping_model_is_listed_and_the_gateway_ready(asleep: Stack) -> None:
    async with asleep.http() as http:
        (listed,) = (await http.get("/v1/models")).json()["data"]
        assert (listed["id"], listed["revision"], listed["ready"]) == (MODEL, REVISION, False)
        assert (await http.get("/readyz")).status_code == 200


async def test_a_shutdown_tells_who_is_held(asleep: Stack) -> None:
    task = ask(asleep)
    await held(asleep, 1)
    asleep.server.begin_drain()
    asleep.server.begin_drain()
    response = await task
    assert response.status_code == 503 and response.json()["error"]["code"] == "shutting_down"
