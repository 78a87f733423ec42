"""Executors that die, lie, stall and refuse: the client gets every token once, or one clear error."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from deepflow.v1 import common_pb2

from tests.integration.jobs.conftest import collect, exact, link, linked, request, until

SLOW = 0.01  # seconds a token: long enough to be in the middle of it


async def test_the_decode_executor_dies_mid_stream(open_cluster: Any) -> None:
    async with open_cluster() as cluster:
        prefill = await cluster.source("te-p", "prefill")
        decode = await cluster.source("te-d", "decode", token_seconds=SLOW)
        runtime = await cluster.runtime()
        await linked(runtime, "te-p", "te-d")
        decode.faults.die_after = 12
        asked = request(output=40)
        job = runtime.executor.submit(asked)
        got = await collect(job)
        assert got.tokens[0] == exact(asked)
        assert [submit.kind for submit in prefill.submits] == [
            common_pb2.TASK_KIND_PREFILL,
            common_pb2.TASK_KIND_UNIFIED,
        ]
        assert len(prefill.submits[1].output_tokens) // 4 >= 12
        await prefill.idle()


async def test_the_prefill_executor_dies_before_its_first_token(open_cluster: Any) -> None:
    async with open_cluster() as cluster:
        # 40 tokens take 1.6 s there: time to die in, and within what a split may cost (guard_seconds).
        prefill = await cluster.source("te-p", "prefill", prefill_tokens_per_second=25)
        decode = await cluster.source("te-d", "decode")
        runtime = await cluster.runtime()
        await linked(runtime, "te-p", "te-d")
        asked = request()
        job = runtime.executor.submit(asked)
        await until(lambda: prefill.tasks)
        await prefill.crash()
        got = await collect(job)
        assert got.tokens[0] == exact(asked)
        assert decode.submits[0].kind == common_pb2.TASK_KIND_UNIFIED


async def test_the_prefill_executor_dies_while_its_kv_is_pulled(open_cluster: Any) -> None:
    async with open_cluster() as cluster:
        prefill = await cluster.source("te-p", "prefill")
        decode = await cluster.source("te-d", "decode")
        runtime = await cluster.runtime()
        await linked(runtime, "te-p", "te-d")
        decode.faults.pull_seconds = 0.3
        asked = request()
        job = runtime.executor.submit(asked)
        await until(lambda: decode.submits)
        await prefill.crash()
        got = await collect(job)
        assert got.tokens[0] == exact(asked)
        await decode.idle()


@pytest.mark.parametrize("victim", ["te-p", "te-d"])
async def test_a_killed_process_loses_and_repeats_nothing(open_cluster: Any, victim: str) -> None:
    """kill -9, real processes; a replacement under the same id takes over when it registers."""
    async with open_cluster() as cluster:
        options = ("--token-seconds", "0.01", "--prefill-rate", "400")
        processes = {
            "te-p": cluster.process("te-p", "prefill", *options),
            "te-d": cluster.process("te-d", "decode", *options),
        }
        runtime = await cluster.runtime()
        await linked(runtime, "te-p", "te-d", seconds=30)
        asked = [request(output=60, seed=i, first=100 * i) for i in range(6)]
        jobs = [asyncio.create_task(collect(runtime.executor.submit(one))) for one in asked]
        await asyncio.sleep(0.4 if victim == "te-d" else 0.05)
        old = runtime.fleet.executors()
        processes[victim].kill()
        role = "prefill" if victim == "te-p" else "decode"
        cluster.process(victim, role, *options)
        answers = await asyncio.gather(*jobs)
        assert [got.tokens[0] for got in answers] == [exact(one) for one in asked]
        before = {item["te_id"]: item["incarnation"] for item in old}

        def replaced() -> bool:
            now = {item["te_id"]: item for item in runtime.fleet.executors()}
            return now[victim]["link"] == "up" and now[victim]["incarnation"] != before[victim]

        await until(replaced, 20)
        again = request(seed=99)
        assert (await collect(runtime.executor.submit(again))).tokens[0] == exact(again)


async def test_broken_streams_are_replayed_and_opened_again(open_cluster: Any) -> None:
    async with open_cluster() as cluster:
        source = await cluster.source("te-0", token_seconds=SLOW)
        runtime = await cluster.runtime()
        await linked(runtime, "te-0")
        asked = request(output=60)
        job = asyncio.create_task(collect(runtime.executor.submit(asked)))
        for made in (5, 20, 35):
            await until(lambda made=made: source.tokens_made > made)
            await source.drop_streams()
        assert (await job).tokens[0] == exact(asked)
        assert len(source.submits) == 4
        outputs = [len(submit.output_tokens) // 4 for submit in source.submits]
        assert outputs == sorted(outputs)
        assert outputs[1] > 0
        assert [submit.attempt for submit in source.submits] == [1, 2, 3, 4]


async def test_repeated_and_overlapping_deltas_count_once(open_cluster: Any) -> None:
    async with open_cluster() as cluster:
        source = await cluster.source("te-0")
        runtime = await cluster.runtime()
        await linked(runtime, "te-0")
        source.faults.duplicates = 3
        asked = request(output=50)
        assert (await collect(runtime.executor.submit(asked))).tokens[0] == exact(asked)


async def test_a_hole_in_the_indexes_is_replayed_not_papered_over(open_cluster: Any) -> None:
    async with open_cluster() as cluster:
        liar = await cluster.source("te-0")
        runtime = await cluster.runtime()
        await linked(runtime, "te-0")
        liar.faults.skip_token = True
        asked = request()
        job = runtime.executor.submit(asked)
        await until(lambda: liar.aborts)
        liar.faults.skip_token = False
        assert (await collect(job)).tokens[0] == exact(asked)


async def test_a_retryable_fault_goes_elsewhere(open_cluster: Any) -> None:
    async with open_cluster() as cluster:
        sources = [await cluster.source(f"te-{i}") for i in range(2)]
        runtime = await cluster.runtime()
        await linked(runtime, "te-0", "te-1")
        for source in sources:
            source.faults.error_after = 9
        asked = request(output=30)
        assert (await collect(runtime.executor.submit(asked))).tokens[0] == exact(asked)
        assert [len(source.submits) for source in sources] == [2, 2]


async def test_faults_without_progress_end_after_a_bounded_number(open_cluster: Any) -> None:
    async with open_cluster() as cluster:
        source = await cluster.source("te-0")
        runtime = await cluster.runtime(max_attempts=3)
        await linked(runtime, "te-0")
        source.faults.error_after = 0
        got = await collect(runtime.executor.submit(request()))
        assert got.finish == {0: "error"}
        assert got.errors[0].status == 503
        assert len(source.submits) == 3


@pytest.mark.parametrize(
    ("code", "status"),
    [
        (common_pb2.ERROR_CODE_INVALID_ARGUMENT, 400),
        (common_pb2.ERROR_CODE_DEADLINE_EXCEEDED, 504),
        (common_pb2.ERROR_CODE_OUT_OF_KV, 400),
        (common_pb2.ERROR_CODE_INTERNAL, 500),
    ],
)
async def test_what_is_not_retryable_ends_the_job(open_cluster: Any, code: int, status: int) -> None:
    async with open_cluster() as cluster:
        source = await cluster.source("te-0")
        runtime = await cluster.runtime()
        await linked(runtime, "te-0")
        source.faults.submit_error = code
        got = await collect(runtime.executor.submit(request()))
        assert (got.finish, got.errors[0].status) == ({0: "error"}, status)
        assert len(source.submits) == 1


@pytest.mark.parametrize(
    "code",
    [
        common_pb2.ERROR_CODE_QUEUE_FULL,
        common_pb2.ERROR_CODE_DRAINING,
        common_pb2.ERROR_CODE_MODEL_NOT_LOADED,
    ],
)
async def test_a_refusal_goes_elsewhere_and_costs_no_attempt(open_cluster: Any, code: int) -> None:
    async with open_cluster() as cluster:
        source = await cluster.source("te-0")
        runtime = await cluster.runtime(max_attempts=1)
        await linked(runtime, "te-0")
        source.faults.submit_error, source.faults.submit_errors_left = code, 3
        asked = request()
        assert (await collect(runtime.executor.submit(asked))).tokens[0] == exact(asked)
        assert len(source.submits) == 4


async def test_a_failed_pull_is_replayed(open_cluster: Any) -> None:
    async with open_cluster() as cluster:
        prefill = await cluster.source("te-p", "prefill")
        decode = await cluster.source("te-d", "decode")
        runtime = await cluster.runtime()
        await linked(runtime, "te-p", "te-d")
        decode.faults.pull_fails = True
        asked = request()
        job = runtime.executor.submit(asked)
        await until(lambda: len(decode.submits) >= 2)
        decode.faults.pull_fails = False
        assert (await collect(job)).tokens[0] == exact(asked)
        await prefill.idle()  # what was on offer is withdrawn, not left to its lease
        assert "expired" not in {outcome for _, outcome in prefill.released}


async def test_a_stalled_task_moves_once_then_fails(open_cluster: Any) -> None:
    async with open_cluster() as cluster:
        first = await cluster.source("te-0")
        runtime = await cluster.runtime(stall_seconds=0.3)
        await linked(runtime, "te-0")
        first.faults.stall_after = 5
        asked = request()
        job = runtime.executor.submit(asked)
        await until(lambda: first.tokens_made == 5)
        other = await cluster.source("te-1")
        await linked(runtime, "te-1")
        assert (await collect(job)).tokens[0] == exact(asked)
        assert len(first.aborts) == 1

        other.faults.stall_after = first.faults.stall_after = 0
        runtime2 = await cluster.runtime(first_token_seconds=0.3, gateway_id="gw-1")
        await linked(runtime2, "te-0", "te-1")
        got = await collect(runtime2.executor.submit(request(first=5000)))
        assert (got.finish, got.errors[0].status) == ({0: "error"}, 504)
        await first.idle()
        await other.idle()


async def test_a_silent_executor_gets_nothing_new_and_loses_what_it_has(open_cluster: Any) -> None:
    async with open_cluster() as cluster:
        silent = await cluster.source("te-0", token_seconds=SLOW)
        runtime = await cluster.runtime(suspect_seconds=0.6, lost_seconds=1.5)
        await linked(runtime, "te-0")
        asked = request(output=30)
        job = asyncio.create_task(collect(runtime.executor.submit(asked)))
        await until(lambda: silent.tokens_made > 5)
        silent.faults.silent = True
        other = await cluster.source("te-1")
        await until(lambda: link(runtime, "te-0") == "suspect")
        later = request(first=500)
        assert (await collect(runtime.executor.submit(later))).tokens[0] == exact(later)
        assert len(silent.submits) == 1
        assert (await job).tokens[0] == exact(asked)
        assert len(other.submits) == 2


async def test_a_hung_step_loop_gets_nothing(open_cluster: Any) -> None:
    async with open_cluster() as cluster:
        hung = await cluster.source("te-0")
        hung.faults.hung = True
        await cluster.source("te-1")
        runtime = await cluster.runtime()
        await linked(runtime, "te-0", "te-1")
        for index in range(6):
            await collect(runtime.executor.submit(request(output=2, first=100 * index)))
        assert not hung.submits


async def test_chaos_loses_and_repeats_nothing(open_cluster: Any) -> None:
    """Streams break, executors die and return, pulls fail, deltas repeat; 60 answers stay exact."""
    rng = random.Random(20)
    async with open_cluster() as cluster:
        roles = {
            "te-p0": "prefill",
            "te-p1": "prefill",
            "te-d0": "decode",
            "te-d1": "decode",
            "te-c": "colocated",
        }
        sources = {te_id: await cluster.source(te_id, role) for te_id, role in roles.items()}
        runtime = await cluster.runtime(max_attempts=100)
        await linked(runtime, *roles)
        asked = [request(length=16 + i, output=1 + i, seed=i, first=i * 50) for i in range(60)]
        jobs = [asyncio.create_task(collect(runtime.executor.submit(one))) for one in asked]
        while not all(job.done() for job in jobs[:50]):
            te_id = rng.choice(sorted(roles))
            source = sources[te_id]
            what = rng.choice(["drop", "drop", "die", "error", "pull", "duplicate", "calm", "calm"])
            if what == "drop":
                await source.drop_streams()
            elif what == "die":
                await source.crash()
                sources[te_id] = await cluster.source(te_id, roles[te_id])
            elif what == "error":
                source.faults.error_after = rng.randint(1, 5)
            elif what == "pull":
                source.faults.pull_fails = True
            elif what == "duplicate":
                source.faults.duplicates = 2
            else:
                source.faults.error_after = None
                source.faults.pull_fails = False
                source.faults.duplicates = 0
            await asyncio.sleep(0.02)
        for source in sources.values():
            source.faults.error_after, source.faults.pull_fails = None, False
        answers = await asyncio.gather(*jobs)
        assert [got.tokens[0] for got in answers] == [exact(one) for one in asked]
        assert {got.finish[0] for got in answers} == {"length"}
        for source in sources.values():
            await source.idle()
