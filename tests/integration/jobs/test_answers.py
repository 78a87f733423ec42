"""Undisturbed answers: placed as the roles say, whole, recorded, and gone from the executors afterwards."""

from __future__ import annotations

import asyncio
from typing import Any

from controlplane.jobs.serving import Sampling
from tests.fakes.token_source import answer
from tests.integration.jobs.conftest import collect, exact, linked, request, until


async def test_a_prompt_is_prefilled_on_one_executor_and_decoded_on_another(open_cluster: Any) -> None:
    async with open_cluster() as cluster:
        prefill = await cluster.source("te-p", "prefill")
        decode = await cluster.source("te-d", "decode")
        runtime = await cluster.runtime()
        await linked(runtime, "te-p", "te-d")
        assert runtime.executor.can_serve("model@1")
        assert not runtime.executor.can_serve("other@1")
        asked = request(output=30)
        job = runtime.executor.submit(asked)
        got = await collect(job)
        assert got.tokens[0] == exact(asked)
        assert got.finish == {0: "length"}
        (first,), (second,) = prefill.submits, decode.submits
        assert second.kv_source.te_id == "te-p"
        assert second.processor_state == b"after the first token"
        assert len(second.output_tokens) == 4
        assert second.attempt == first.attempt + 1
        assert prefill.released == [(f"{first.task_id}.{first.attempt}", "acked")]
        await prefill.idle()
        await decode.idle()


async def test_a_job_is_recorded_with_where_and_when_it_ran(open_cluster: Any) -> None:
    async with open_cluster() as cluster:
        await cluster.source("te-p", "prefill")
        await cluster.source("te-d", "decode")
        runtime = await cluster.runtime(gateway_id="gw-7")
        await linked(runtime, "te-p", "te-d")
        jobs = []
        for index in range(5):
            job = runtime.executor.submit(request(tenant=f"tenant-{index % 2}", request_id=f"req-{index}"))
            await collect(job)
            jobs.append(job.job_id)

        async def written() -> bool:
            record = await runtime.store.get(jobs[-1])
            return record is not None and record.state.terminal

        async with asyncio.timeout(5):
            while not await written():
                await asyncio.sleep(0.01)
        shown = (await runtime.store.get(jobs[-1])).to_json()
        assert (shown["id"], shown["tenant"], shown["state"]) == (jobs[-1], "tenant-0", "completed")
        assert (shown["gateway_id"], shown["request_id"], shown["model"]) == ("gw-7", "req-4", "model")
        (task,) = shown["tasks"]
        assert (task["prefill_te"], task["decode_te"], task["output_tokens"]) == ("te-p", "te-d", 20)
        assert [attempt["kind"] for attempt in task["attempts"]] == ["prefill", "decode"]
        assert task["attempts"][1]["compute_seconds"] > 0
        assert shown["created_at"] <= shown["first_token_at"] <= shown["ended_at"]

        newest, cursor = await runtime.store.list(2, None, None)
        assert [record.job_id for record in newest] == jobs[:2:-1]
        rest, end = await runtime.store.list(10, cursor, None)
        assert [record.job_id for record in rest] == jobs[2::-1]
        assert end is None
        mine, _ = await runtime.store.list(10, None, "tenant-1")
        assert [record.job_id for record in mine] == [jobs[3], jobs[1]]
        assert await runtime.store.get("job_none") is None


async def test_colocated_executors_run_it_whole(open_cluster: Any) -> None:
    async with open_cluster() as cluster:
        source = await cluster.source("te-0")
        runtime = await cluster.runtime()
        await linked(runtime, "te-0")
        asked = request(sampling=Sampling(seed=3, logprobs=2))
        got = await collect(runtime.executor.submit(asked))
        assert got.tokens[0] == exact(asked)
        assert [entry.token for entry in got.logprobs[0]] == exact(asked)
        assert all(len(entry.top) == 2 for entry in got.logprobs[0])
        assert len(source.submits) == 1


async def test_short_prompts_stay_whole_below_the_threshold(open_cluster: Any) -> None:
    async with open_cluster() as cluster:
        prefill = await cluster.source("te-p", "prefill")
        decode = await cluster.source("te-d", "decode")
        runtime = await cluster.runtime(disaggregate_min_uncached_tokens=100)
        await linked(runtime, "te-p", "te-d")
        await collect(runtime.executor.submit(request(length=99)))
        assert (len(prefill.submits), len(decode.submits)) == (0, 1)
        await collect(runtime.executor.submit(request(length=100, first=1000)))
        assert (len(prefill.submits), len(decode.submits)) == (1, 2)


async def test_choices_share_a_prefix_and_draw_with_seeds_of_their_own(open_cluster: Any) -> None:
    async with open_cluster() as cluster:
        sources = [await cluster.source(f"te-{i}") for i in range(3)]
        runtime = await cluster.runtime()
        await linked(runtime, "te-0", "te-1", "te-2")
        asked = request(length=64, n=3)
        got = await collect(runtime.executor.submit(asked))
        (home,) = [source for source in sources if source.submits]
        seeds = [submit.sampling.seed for submit in home.submits]
        assert seeds[0] == asked.sampling.seed
        assert len(set(seeds)) == 3
        by_index = {int(submit.task_id.rpartition("-")[2]): submit.sampling.seed for submit in home.submits}
        assert got.tokens == {i: answer(asked.prompt, 20, seed) for i, seed in by_index.items()}
        assert got.cached == {0: 0, 1: 63, 2: 63}


async def test_a_follow_up_goes_where_its_prefix_lies(open_cluster: Any) -> None:
    async with open_cluster() as cluster:
        sources = [await cluster.source(f"te-{i}") for i in range(4)]
        runtime = await cluster.runtime()
        await linked(runtime, *(source.te_id for source in sources))
        for prompt in range(6):
            await collect(runtime.executor.submit(request(length=320, first=1000 * prompt)))
        await until(lambda: len(runtime.fleet.prefixes) == 6 * 20)
        before = {source.te_id: len(source.submits) for source in sources}
        for prompt in range(6):
            got = await collect(runtime.executor.submit(request(length=320, first=1000 * prompt)))
            assert got.cached[0] == 319
        assert {source.te_id: 2 * before[source.te_id] for source in sources} == {
            source.te_id: len(source.submits) for source in sources
        }


async def test_many_answers_at_once_are_all_whole(open_cluster: Any) -> None:
    async with open_cluster() as cluster:
        sources = [
            await cluster.source("te-p", "prefill"),
            await cluster.source("te-d0", "decode"),
            await cluster.source("te-d1", "decode"),
        ]
        runtime = await cluster.runtime()
        await linked(runtime, "te-p", "te-d0", "te-d1")
        asked = [request(length=20 + i, output=1 + i % 40, seed=i, first=i) for i in range(128)]
        answers = await asyncio.gather(*(collect(runtime.executor.submit(one)) for one in asked))
        assert [got.tokens[0] for got in answers] == [exact(one) for one in asked]
        for source in sources:
            await source.idle()
        counts = [len(source.submits) for source in sources[1:]]
        assert min(counts) > 20, counts  # both decode executors have their share


async def test_executors_are_listed_with_link_load_and_role(open_cluster: Any) -> None:
    async with open_cluster() as cluster:
        source = await cluster.source("te-0", "decode")
        runtime = await cluster.runtime()
        await linked(runtime, "te-0")
        (shown,) = runtime.fleet.executors()
        assert (shown["te_id"], shown["role"], shown["state"], shown["link"]) == (
            "te-0",
            "decode",
            "ready",
            "up",
        )
        source.role, source.role_epoch = "prefill", 5
        await until(lambda: runtime.fleet.executors()[0]["role"] == "prefill")
        assert runtime.fleet.executors()[0]["role_epoch"] == 5


async def test_executors_without_a_plain_stream_and_such_behind_a_firewall_are_spoken_to_over_grpc(
    open_cluster: Any,
) -> None:
    async with open_cluster() as cluster:
        old = await cluster.source("te-old", plain_stream=False)
        walled = await cluster.source("te-walled")
        assert walled._tasks_server is not None
        await walled._tasks_server.stop()  # announced, and nobody answers there
        runtime = await cluster.runtime()
        await linked(runtime, "te-old", "te-walled")
        asked = [request(length=40 + index, output=20, first=100 * index) for index in range(6)]
        answers = await asyncio.gather(*(collect(runtime.executor.submit(one)) for one in asked))
        assert [got.tokens[0] for got in answers] == [exact(one) for one in asked]
        assert old.submits
        assert walled.submits
