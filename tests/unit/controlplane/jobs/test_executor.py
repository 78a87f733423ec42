"""Admission, order, holding, siblings and shutdown of the job executor."""

from __future__ import annotations

import asyncio

import pytest
from deepflow.v1 import common_pb2

from controlplane.jobs.serving import ServingError
from controlplane.jobs.states import TaskState
from controlplane.scheduling.types import Role

from .conftest import Bench, drain, make_bench, request


def test_a_request_is_held_until_an_executor_appears(bench: Bench) -> None:
    job = bench.submit()
    assert job.choices[0].state is TaskState.HELD
    bench.turn(5)
    bench.fleet.add("a")
    bench.turn()
    assert bench.fleet.last.te_id == "a"


def test_holding_without_an_executor_ends_in_503_with_retry_after(bench: Bench) -> None:
    job = bench.submit()
    bench.turn(61)
    (delta,) = drain(job)
    assert delta.error is not None
    assert (delta.error.status, delta.error.code) == (503, "no_executor") and delta.error.retry_after


def test_beyond_the_in_flight_bound_429_and_the_slot_comes_back() -> None:
    bench = make_bench(max_choices=2)
    bench.fleet.add("a")
    bench.submit(n=1)
    second = bench.submit(n=1)
    assert not bench.jobs.accepting
    with pytest.raises(ServingError) as refused:
        bench.submit()
    assert (refused.value.status, refused.value.code) == (429, "queue_full") and refused.value.retry_after
    second.cancel("done")
    bench.submit()


def test_beyond_the_held_bound_429() -> None:
    bench = make_bench(max_held=2)
    bench.submit()
    bench.submit()
    with pytest.raises(ServingError) as refused:
        bench.submit()
    assert refused.value.status == 429


def test_held_requests_go_by_priority_then_age(bench: Bench) -> None:
    jobs = [bench.submit(priority=priority) for priority in (0, 5, 0, 5)]
    bench.fleet.add("a")
    bench.turn()
    order = [item.task.task_id for item in bench.fleet.submitted]
    assert order == [f"{jobs[i].job_id}-0" for i in (1, 3, 0, 2)]


def test_a_newcomer_does_not_overtake_those_who_wait(bench: Bench) -> None:
    bench.fleet.add("a", tasks=1, kv_blocks_free=2)
    big = bench.submit(prompt=400)
    small = bench.submit(prompt=10)
    assert bench.fleet.submitted == []
    bench.fleet.change("a", kv_blocks_free=1000)
    bench.turn()
    assert [s.task.task_id for s in bench.fleet.submitted] == [f"{j.job_id}-0" for j in (big, small)]


def test_another_models_queue_does_not_block(bench: Bench) -> None:
    bench.submit(model_revision="other@1")
    bench.fleet.add("a")
    bench.submit()
    assert bench.fleet.last.te_id == "a"


def test_a_prompt_no_executor_can_ever_hold_is_refused(bench: Bench) -> None:
    bench.fleet.add("a", kv_blocks_total=2, kv_blocks_free=2)
    with pytest.raises(ServingError) as refused:
        bench.submit(prompt=400)
    assert (refused.value.status, refused.value.code) == (400, "context_length_exceeded")
    assert bench.jobs.accepting and not list(bench.jobs.live_jobs)


def test_a_link_that_breaks_in_the_act_is_passed_over(bench: Bench) -> None:
    bench.fleet.add("a")
    bench.fleet.add("b", tasks=5)
    bench.fleet.broken.add("a")
    bench.submit()
    assert bench.fleet.last.te_id == "b"


def test_siblings_follow_their_leader_onto_its_executor_with_seeds_of_their_own(bench: Bench) -> None:
    bench.fleet.add("a")
    bench.fleet.add("b")
    job = bench.submit(n=3)
    assert len(bench.fleet.submitted) == 1
    leader = bench.fleet.last
    leader.delta([1])
    assert [item.te_id for item in bench.fleet.submitted] == [leader.te_id] * 3
    seeds = [item.task.sampling.seed for item in bench.fleet.submitted]
    assert seeds[0] == 7 and len(set(seeds)) == 3
    for item in bench.fleet.submitted:
        item.finish([2], 1 if item is leader else 0)
    assert [(d.index, d.finish) for d in drain(job)] == [(0, "stop"), (1, "stop"), (2, "stop")]


def test_siblings_start_even_if_their_leader_fails(bench: Bench) -> None:
    bench.fleet.add("a")
    job = bench.submit(n=2)
    job.finish_choice(0)
    assert [item.task.task_id for item in bench.fleet.submitted] == [f"{job.job_id}-{i}" for i in (0, 1)]


def test_siblings_of_a_prompt_below_a_block_do_not_wait(bench: Bench) -> None:
    bench.fleet.add("a")
    bench.submit(n=2, prompt=3)
    bench.turn()
    assert len(bench.fleet.submitted) == 2


def test_records_show_where_prefill_and_decode_ran(bench: Bench) -> None:
    bench.fleet.add("p", Role.PREFILL)
    bench.fleet.add("d", Role.DECODE)
    job = bench.submit()
    bench.fleet.last.delta([], cached_tokens=16)
    bench.fleet.last.hand_over(1)
    bench.fleet.last.finish([2])
    record = job.record("gw", 0.0)
    (task,) = record.tasks
    assert (task.prefill_te, task.decode_te, task.output_tokens) == ("p", "d", 2)
    assert [(a.kind, a.outcome, a.tokens) for a in task.attempts] == [
        ("prefill", "handover", 1),
        ("decode", "stop", 1),
    ]
    assert task.attempts[0].cached_tokens == 16
    assert record.state == "completed" and record.ended_at is not None


async def test_the_consumer_gets_merged_deltas_and_leaving_cancels(bench: Bench) -> None:
    bench.fleet.add("a")
    job = bench.submit()
    bench.fleet.last.delta([1])
    bench.fleet.last.delta([2], 1)
    stream = job.deltas()
    assert (await anext(stream)).tokens == [1, 2]
    await stream.aclose()  # type: ignore[attr-defined]
    assert bench.fleet.aborted


async def test_drain_refuses_newcomers_waits_and_then_cancels() -> None:
    bench = make_bench()
    bench.fleet.add("a")
    done, slow = bench.submit(), bench.submit()
    draining = asyncio.create_task(bench.jobs.drain(0.05))
    await asyncio.sleep(0)
    with pytest.raises(ServingError) as refused:
        bench.submit()
    assert (refused.value.status, refused.value.code) == (503, "shutting_down")
    bench.fleet.submitted[0].finish([1])
    await draining
    assert done.choices[0].finish == "stop"
    assert slow.choices[0].finish == "cancelled"
    assert not list(bench.jobs.live_jobs)


async def test_the_loops_place_and_time_out_by_themselves(bench: Bench) -> None:
    loops = asyncio.create_task(bench.jobs.run())
    held, late = bench.submit(), bench.jobs.submit(request(timeout_seconds=5, model_revision="other@1"))
    bench.fleet.add("a")
    async with asyncio.timeout(5):
        while not bench.fleet.submitted:
            await asyncio.sleep(0.01)
        bench.clock.now += 6
        while late.choices[0].finish is None:
            await asyncio.sleep(0.01)
    assert held.choices[0].state is TaskState.RUNNING
    loops.cancel()
    await asyncio.gather(loops, return_exceptions=True)


def test_a_task_that_the_present_executors_cannot_run_stops_nobody(bench: Bench) -> None:
    bench.fleet.add("small")
    bench.fleet.add("large", link_up=False)
    bench.submit()
    bench.fleet.last.error(common_pb2.ERROR_CODE_OUT_OF_KV)  # only "large" may hold it
    bench.turn()
    other = bench.submit()
    bench.turn()
    assert (bench.fleet.last.te_id, bench.fleet.last.task.task_id) == ("small", f"{other.job_id}-0")


def test_siblings_that_wait_are_not_placed_by_their_jobs_end(bench: Bench) -> None:
    bench.fleet.add("a")
    bench.submit(n=3).cancel("the client left")
    late = bench.submit(n=3, timeout_seconds=5.0)
    bench.turn(6)
    assert [delta.finish for delta in drain(late)] == ["error"] * 3
    assert len(bench.fleet.submitted) == 2, "the leaders alone"


def test_a_task_is_told_who_holds_more_of_its_prompt(bench: Bench) -> None:
    bench.fleet.add("busy", tasks=200, queued_tokens=500_000)
    bench.fleet.add("idle")
    hashes = bench.submit(prompt=100).hashes(16)
    bench.fleet.prefixes.apply("busy", 1, hashes[:4])
    bench.fleet.prefixes.apply("idle", 1, hashes[:1])
    bench.submit(prompt=100)
    told = bench.fleet.last
    assert told.te_id == "idle" and not told.task.HasField("kv_source")
    assert (told.task.prefix_source.te_id, told.task.prefix_source.tokens) == ("busy", 64)
    bench.fleet.prefixes.drop("busy")
    bench.submit(prompt=100)
    assert not bench.fleet.last.task.HasField("prefix_source")


def test_the_length_of_an_answer_is_expected_once_its_likes_were_seen() -> None:
    bench = make_bench()
    bench.fleet.add("te-0")
    bench.fleet.add("te-1")
    said = []
    for _ in range(40):
        job = bench.submit(max_output_tokens=1000)
        bench.fleet.last.finish(list(range(1, 301)), length=False)
        said.append(job.choices[0].predicted)
    assert said[0] is None
    assert said[-1] is not None
    assert said[-1].likely == 384
    assert bench.jobs._placer._lengths.accuracy.hits == 1.0
    cancelled = bench.submit(max_output_tokens=1000)
    cancelled.cancel("client left")
    assert bench.jobs._placer._lengths.accuracy.seen == 40
