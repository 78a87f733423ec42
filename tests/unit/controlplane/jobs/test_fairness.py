"""Who goes first while executors are full, who makes way, and what a dropped request is told."""

from __future__ import annotations

import pytest

from controlplane.jobs.job import Job
from controlplane.jobs.serving import ServingError
from controlplane.jobs.states import TaskState
from tests.unit.controlplane.jobs.conftest import Bench, drain, make_bench


def full(**settings: object) -> Bench:
    bench = make_bench(**settings)
    bench.fleet.add("te-0", tasks=4, max_tasks=4)
    return bench


def error_of(job: Job) -> ServingError:
    error = drain(job)[-1].error
    assert error is not None
    return error


def placed(bench: Bench) -> list[str]:
    """Tenants in the order in which the executor got them, one at a time."""
    order: list[str] = []
    while len(bench.jobs._room):
        before = len(bench.fleet.submitted)
        bench.fleet.change("te-0", tasks=3)
        bench.jobs._placer.place, real = _once(bench, bench.jobs._placer.place), bench.jobs._placer.place  # type: ignore[method-assign]
        bench.jobs.place_waiting()
        bench.jobs._placer.place = real  # type: ignore[method-assign]
        for submitted in bench.fleet.submitted[before:]:
            job_id = submitted.task.task_id.rsplit("-", 1)[0]
            order.append(bench.jobs._jobs[job_id].request.tenant)
    return order


def _once(bench: Bench, place: object) -> object:
    """The first placement fills the executor again."""

    def placing(choice: object) -> object:
        reason = place(choice)  # type: ignore[operator]
        bench.fleet.change("te-0", tasks=4)
        return reason

    return placing


def test_a_flood_of_one_tenant_does_not_hold_another_up() -> None:
    bench = full()
    for _ in range(6):
        bench.submit(tenant="flood")
    for _ in range(2):
        bench.submit(tenant="calm")
    assert placed(bench)[:4].count("calm") == 2


def test_long_prompts_count_for_more() -> None:
    bench = full()
    for _ in range(8):
        bench.submit(tenant="short", prompt=100)
    for _ in range(4):
        bench.submit(tenant="long", prompt=400)
    assert placed(bench)[:5].count("long") == 1


def test_a_full_queue_drops_the_flooding_tenants_last_and_tells_why() -> None:
    bench = full(max_held=3)
    flood = [bench.submit(tenant="flood") for _ in range(3)]
    with pytest.raises(ServingError) as refused:
        bench.submit(tenant="flood")
    assert (refused.value.status, refused.value.drop_reason) == (429, "rejected-queue-full")
    calm = bench.submit(tenant="calm")
    assert calm.choices[0].state is TaskState.HELD
    assert [job.choices[0].state.terminal for job in flood] == [False, False, True]
    error = error_of(flood[2])
    assert (error.status, error.code, error.drop_reason) == (429, "queue_full", "evicted-for-share")
    bench.submit(tenant="flood", priority=5)
    assert len(bench.jobs._room) == 3


def test_what_waited_in_vain_says_so() -> None:
    bench = full(contended_seconds=3)
    job = bench.submit()
    bench.turn(4)
    assert error_of(job).drop_reason == "evicted-timeout"
    late = bench.submit(timeout_seconds=2)
    bench.turn(3)
    error = error_of(late)
    assert (error.status, error.drop_reason) == (504, "evicted-deadline")


def test_a_higher_band_takes_the_place_of_one_that_has_no_token_yet() -> None:
    bench = make_bench()
    bench.fleet.add("te-0", max_tasks=2)
    started = bench.submit(tenant="a")
    bench.fleet.last.delta([1])
    silent = bench.submit(tenant="b")
    bench.fleet.change("te-0", tasks=2)
    high = bench.submit(tenant="c", priority=1)
    assert started.choices[0].state is TaskState.RUNNING
    assert silent.choices[0].state is TaskState.HELD
    assert bench.fleet.aborted[-1][1] == silent.choices[0].task_id
    bench.fleet.change("te-0", tasks=1)
    bench.turn()
    assert high.choices[0].state is TaskState.RUNNING
    bench.fleet.change("te-0", tasks=0)
    bench.turn()
    assert silent.choices[0].state is TaskState.RUNNING  # late, and not lost
    bench.fleet.last.finish([1, 2])
    assert silent.choices[0].finish == "stop"


def test_prompts_wait_where_order_can_change_while_the_executors_queue_is_long() -> None:
    bench = make_bench(hold_seconds=2)
    bench.fleet.add("te-0", tasks=3, queued_tokens=5000, prefill_tokens_per_second=1000)
    low = bench.submit()
    high = bench.submit(priority=1)
    assert (low.choices[0].state, high.choices[0].state) == (TaskState.HELD, TaskState.HELD)
    bench.fleet.change("te-0", queued_tokens=1000)
    bench.turn()
    first, second = (submitted.task.task_id for submitted in bench.fleet.submitted)
    assert (first, second) == (high.choices[0].task_id, low.choices[0].task_id)


def test_beyond_the_in_flight_bound_a_higher_band_takes_the_place_of_one_that_waits() -> None:
    bench = full(max_choices=3)
    low = [bench.submit(tenant="low") for _ in range(3)]
    high = bench.submit(tenant="high", priority=5)
    assert [job.choices[0].state.terminal for job in low] == [False, False, True]
    assert error_of(low[2]).drop_reason == "evicted-for-priority"
    assert not high.choices[0].state.terminal and len(bench.jobs._live) == 3
    with pytest.raises(ServingError) as refused:
        bench.submit(tenant="other")
    assert refused.value.drop_reason == "rejected-in-flight"
    with pytest.raises(ServingError) as refused:
        bench.submit(tenant="high", priority=5, n=3)  # two others wait in lower bands
    assert refused.value.drop_reason == "rejected-in-flight"
    assert len(bench.jobs._live) == 3


def test_a_tenant_that_weighs_more_goes_more_often() -> None:
    bench = full(tenant_weights={"gold": 3.0})
    for _ in range(8):
        bench.submit(tenant="plain")
        bench.submit(tenant="gold")
    assert placed(bench)[:8].count("gold") == 6
