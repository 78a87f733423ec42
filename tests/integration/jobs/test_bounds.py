"""Admission, holding, deadlines, cancelling, and Redis going away: every wait ends, every task is told."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from deepflow.v1 import common_pb2

from controlplane.jobs.serving import ServingError
from tests.integration.jobs.conftest import Answer, collect, exact, linked, request, until

SLOW = 0.02  # seconds a token


async def test_cancel_reaches_both_sides_of_a_handover(open_cluster: Any) -> None:
    async with open_cluster() as cluster:
        prefill = await cluster.source("te-p", "prefill")
        decode = await cluster.source("te-d", "decode")
        runtime = await cluster.runtime()
        await linked(runtime, "te-p", "te-d")
        decode.faults.pull_seconds = 30
        job = runtime.executor.submit(request())
        await until(lambda: decode.tasks and prefill.offers)
        job.cancel("the client left")
        job.cancel("twice")
        await prefill.idle(1)
        await decode.idle(1)
        assert [outcome for _, outcome in prefill.released] == ["withdrawn"]
        assert len(decode.aborts) == 1
        got = await collect(job)
        assert got.finish == {0: "cancelled"}
        assert got.tokens[0] == exact(request())[:1]


async def test_cancel_stops_every_choice_that_runs_or_waits(open_cluster: Any) -> None:
    async with open_cluster() as cluster:
        source = await cluster.source("te-0", token_seconds=SLOW, max_tasks=2)
        runtime = await cluster.runtime()
        await linked(runtime, "te-0")
        job = runtime.executor.submit(request(length=8, n=6, output=1000))
        await until(lambda: len(source.tasks) == 2)
        job.cancel("the client left")
        await source.idle(1)
        assert set((await collect(job)).finish.values()) == {"cancelled"}


async def test_a_consumer_that_stops_reading_cancels(open_cluster: Any) -> None:
    async with open_cluster() as cluster:
        source = await cluster.source("te-0", token_seconds=SLOW)
        runtime = await cluster.runtime()
        await linked(runtime, "te-0")
        job = runtime.executor.submit(request(output=1000))
        deltas = job.deltas()
        await anext(deltas)
        await deltas.aclose()  # type: ignore[attr-defined]  # an async generator
        await source.idle(1)


async def test_a_choice_that_met_its_stop_string_ends_alone(open_cluster: Any) -> None:
    async with open_cluster() as cluster:
        source = await cluster.source("te-0", token_seconds=SLOW)
        runtime = await cluster.runtime()
        await linked(runtime, "te-0")
        job = runtime.executor.submit(request(length=8, n=2, output=30))
        got = Answer()
        async with asyncio.timeout(20):
            async for delta in job.deltas():
                got.add(delta)
                if len(got.tokens.get(0, ())) >= 5 and 0 not in got.finish:
                    job.finish_choice(0)
        assert got.finish == {0: "stop", 1: "length"}
        assert len(got.tokens[0]) < 30
        assert len(got.tokens[1]) == 30
        assert len(source.aborts) == 1


async def test_beyond_the_bound_is_429_and_room_comes_back(open_cluster: Any) -> None:
    async with open_cluster() as cluster:
        await cluster.source("te-0", token_seconds=SLOW)
        runtime = await cluster.runtime(max_choices=4)
        await linked(runtime, "te-0")
        jobs = [runtime.executor.submit(request(output=20, n=2, length=8)) for _ in range(2)]
        assert not runtime.executor.accepting
        with pytest.raises(ServingError) as refused:
            runtime.executor.submit(request())
        assert (refused.value.status, refused.value.code) == (429, "queue_full")
        assert refused.value.retry_after is not None
        for job in jobs:
            await collect(job)
        assert runtime.executor.accepting
        assert (await collect(runtime.executor.submit(request()))).finish == {0: "length"}


async def test_what_waits_is_bounded_too(open_cluster: Any) -> None:
    async with open_cluster() as cluster:
        runtime = await cluster.runtime(max_held=3)
        jobs = [runtime.executor.submit(request()) for _ in range(3)]
        with pytest.raises(ServingError) as refused:
            runtime.executor.submit(request())
        assert refused.value.status in (429, 503)
        await cluster.source("te-0")
        for job in jobs:
            assert (await collect(job)).tokens[0] == exact(request())


async def test_requests_are_held_until_an_executor_appears(open_cluster: Any) -> None:
    async with open_cluster() as cluster:
        runtime = await cluster.runtime()
        asked = [request(seed=i) for i in range(5)]
        jobs = [asyncio.create_task(collect(runtime.executor.submit(one))) for one in asked]
        await asyncio.sleep(0.3)
        assert not runtime.executor.can_serve("model@1")
        assert runtime.executor.accepting
        await cluster.source("te-0")
        answers = await asyncio.gather(*jobs)
        assert [got.tokens[0] for got in answers] == [exact(one) for one in asked]


async def test_nobody_coming_is_503_with_a_hint(open_cluster: Any) -> None:
    async with open_cluster() as cluster:
        runtime = await cluster.runtime(placement_seconds=0.3)
        got = await collect(runtime.executor.submit(request()))
        assert (got.errors[0].status, got.errors[0].code) == (503, "no_executor")
        assert got.errors[0].retry_after is not None


async def test_full_executors_for_too_long_are_429(open_cluster: Any) -> None:
    async with open_cluster() as cluster:
        source = await cluster.source("te-0", max_tasks=1)
        runtime = await cluster.runtime(contended_seconds=0.5)
        await linked(runtime, "te-0")
        source.faults.stall = True
        first = runtime.executor.submit(request())
        await until(lambda: source.tasks)
        got = await collect(runtime.executor.submit(request()))
        assert got.errors[0].status == 429
        source.faults.stall = False
        assert (await collect(first)).finish == {0: "length"}


async def test_waiting_tasks_run_in_order_of_priority_then_arrival(open_cluster: Any) -> None:
    async with open_cluster() as cluster:
        runtime = await cluster.runtime()
        wanted = [("low", -1), ("first", 0), ("second", 0), ("high", 5)]
        jobs = [
            runtime.executor.submit(request(output=4, first=1000 * i, priority=priority))
            for i, (_, priority) in enumerate(wanted)
        ]
        source = await cluster.source("te-0", max_tasks=1)
        await asyncio.gather(*(collect(job) for job in jobs))
        order: list[str] = []
        for submit in source.submits:
            name = wanted[int.from_bytes(submit.prompt_tokens[:4], "little") // 1000][0]
            if name not in order:
                order.append(name)
        assert order == ["high", "first", "second", "low"]


async def test_the_requests_deadline_is_504_wherever_it_is(open_cluster: Any) -> None:
    async with open_cluster() as cluster:
        runtime = await cluster.runtime()
        started = time.monotonic()
        held = await collect(runtime.executor.submit(request(timeout_seconds=0.3)))
        assert held.errors[0].status == 504
        assert time.monotonic() - started < 2
        source = await cluster.source("te-0")
        await linked(runtime, "te-0")
        source.faults.stall_after = 3
        running = await collect(runtime.executor.submit(request(timeout_seconds=0.3)))
        assert (running.errors[0].status, len(running.tokens[0])) == (504, 3)
        await source.idle(1)
        assert 0 < source.submits[0].timeout_ms <= 300


async def test_a_prompt_that_fits_nobody_is_400_at_once(open_cluster: Any) -> None:
    async with open_cluster() as cluster:
        await cluster.source("te-0", kv_blocks=4)
        runtime = await cluster.runtime()
        await linked(runtime, "te-0")
        with pytest.raises(ServingError) as refused:
            runtime.executor.submit(request(length=100))
        assert refused.value.status == 400


async def test_a_lost_prompt_goes_on_without_a_decode_executor(open_cluster: Any) -> None:
    """The decode executor leaves while the prefill runs: the rest runs where the prompt is cached."""
    async with open_cluster() as cluster:
        prefill = await cluster.source("te-p", "prefill", prefill_tokens_per_second=200)
        decode = await cluster.source("te-d", "decode")
        runtime = await cluster.runtime()
        await linked(runtime, "te-p", "te-d")
        asked = request()
        job = runtime.executor.submit(asked)
        await until(lambda: prefill.tasks)
        await decode.stop()
        started = time.monotonic()
        got = await collect(job)
        assert got.tokens[0] == exact(asked)
        assert time.monotonic() - started < 3
        assert prefill.submits[-1].kind == common_pb2.TASK_KIND_UNIFIED
        await prefill.idle(1)


async def test_draining_executors_get_nothing_new(open_cluster: Any) -> None:
    async with open_cluster() as cluster:
        leaving = await cluster.source("te-0", token_seconds=SLOW)
        runtime = await cluster.runtime()
        await linked(runtime, "te-0")
        asked = request(output=40)
        job = asyncio.create_task(collect(runtime.executor.submit(asked)))
        await until(lambda: leaving.tokens_made)
        leaving.draining = True
        await until(lambda: runtime.fleet.executors()[0]["state"] == "draining")
        other = await cluster.source("te-1")
        await linked(runtime, "te-1")
        for index in range(4):
            await collect(runtime.executor.submit(request(output=2, first=100 * index)))
        assert len(other.submits) == 4
        assert (await job).tokens[0] == exact(asked)
        assert len(leaving.submits) == 1


async def test_shutting_down_cancels_and_frees(open_cluster: Any) -> None:
    async with open_cluster() as cluster:
        source = await cluster.source("te-0", token_seconds=SLOW)
        async with open_cluster() as inner:
            runtime = await inner.runtime(drain_seconds=0.1)
            await linked(runtime, "te-0")
            job = asyncio.create_task(collect(runtime.executor.submit(request(output=1000))))
            await until(lambda: source.tasks)
            inner.runtimes.clear()  # its job is cancelled by the shutdown that follows
        assert (await job).finish == {0: "cancelled"}
        await source.idle(1)
        with pytest.raises(ServingError) as refused:
            runtime.executor.submit(request())
        assert refused.value.status == 503


# -- Redis ---------------------------------------------------------------------------------------


async def test_serving_goes_on_while_redis_is_down_and_records_heal(
    open_cluster: Any, valkey_server: Any
) -> None:
    server = valkey_server()
    async with open_cluster(server.url) as cluster:
        source = await cluster.source("te-0", token_seconds=0.005)
        runtime = await cluster.runtime()
        await linked(runtime, "te-0")
        long = runtime.executor.submit(request(output=400))
        answer = asyncio.create_task(collect(long))
        await until(lambda: source.tokens_made)
        await asyncio.to_thread(server.stop)
        during = [runtime.executor.submit(request(first=100 * i, output=5)) for i in range(10)]
        for i, job in enumerate(during):
            assert (await collect(job)).tokens[0] == exact(request(first=100 * i, output=5))
        await asyncio.sleep(0.3)
        await asyncio.to_thread(server.start)

        async def recorded(job_id: str, state: str) -> None:
            async with asyncio.timeout(10):
                while True:
                    record = await runtime.store.get(job_id)
                    if record is not None and record.state == state:
                        return
                    await asyncio.sleep(0.02)

        await recorded(long.job_id, "running")
        for job in during:
            await recorded(job.job_id, "completed")
        assert (await answer).tokens[0] == exact(request(output=400))
        await recorded(long.job_id, "completed")


async def test_an_emptied_registry_drops_nobody_who_answers(open_cluster: Any, clean_valkey: str) -> None:
    from redis.asyncio import Redis

    async with open_cluster() as cluster:
        await cluster.source("te-0")
        runtime = await cluster.runtime()
        await linked(runtime, "te-0")
        async with Redis.from_url(clean_valkey) as redis:
            for _ in range(20):
                await redis.delete("deepflow:te:ids", "deepflow:te:te-0")
                await asyncio.sleep(0.01)
                assert runtime.executor.can_serve("model@1")
                await collect(runtime.executor.submit(request(output=2)))


async def test_a_start_without_redis_serves_once_it_is_there(open_cluster: Any, valkey_server: Any) -> None:
    server = valkey_server()
    await asyncio.to_thread(server.stop)
    async with open_cluster(server.url) as cluster:
        runtime = await cluster.runtime()
        job = asyncio.create_task(collect(runtime.executor.submit(request())))
        await cluster.source("te-0")
        await asyncio.sleep(0.3)
        await asyncio.to_thread(server.start)
        assert (await job).tokens[0] == exact(request())
