"""A decode executor chosen while the prefill runs: order, failures, and the way back to a late choice."""

from __future__ import annotations

from deepflow.v1 import common_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.jobs.states import TaskState
from controlplane.scheduling.types import Role

from .conftest import Bench, Submitted, drain, make_bench

DECODE, UNIFIED = common_pb2.TASK_KIND_DECODE, common_pb2.TASK_KIND_UNIFIED


def started(bench: Bench, decodes: int = 1) -> tuple[Submitted, Submitted]:
    """A prefill that runs, and its early decode."""
    bench.fleet.add("p", Role.PREFILL)
    for number in range(decodes):
        bench.fleet.add(f"d{number}", Role.DECODE)
    bench.submit()
    prefill = bench.fleet.last
    prefill.start()
    assert len(bench.fleet.submitted) == 2
    return prefill, bench.fleet.last


def test_the_decode_is_placed_when_the_prefill_starts(bench: Bench) -> None:
    prefill, decode = started(bench)
    assert (decode.te_id, decode.task.kind, decode.task.attempt) == ("d0", DECODE, 2)
    assert decode.task.early and decode.output == []
    assert decode.task.kv_source.transfer_id == f"{prefill.task.task_id}.1"
    job = next(iter(bench.jobs.live_jobs))
    assert job.choices[0].state is TaskState.PREFILLING
    prefill.hand_over(1)
    assert len(bench.fleet.submitted) == 2
    decode.finish([2, 3], 1, length=True)
    (delta,) = drain(job)
    assert (delta.tokens, delta.finish) == ([1, 2, 3], "length")
    assert [a.outcome for a in job.choices[0].attempts] == ["handover", "length"]
    assert bench.fleet.aborted == []


def test_tokens_that_overtake_the_prefills_own_are_delivered_after_it(bench: Bench) -> None:
    prefill, decode = started(bench)
    job = next(iter(bench.jobs.live_jobs))
    decode.delta([2], 1)
    decode.finish([3], 2, length=True)
    assert drain(job) == []
    prefill.hand_over(1)
    assert [token for delta in drain(job) for token in delta.tokens] == [1, 2, 3]
    assert job.choices[0].state is TaskState.COMPLETED


def test_a_refused_or_failed_early_decode_costs_nothing(bench: Bench) -> None:
    for code in (
        common_pb2.ERROR_CODE_QUEUE_FULL,
        common_pb2.ERROR_CODE_DRAINING,
        common_pb2.ERROR_CODE_KV_TRANSFER_FAILED,
        common_pb2.ERROR_CODE_INTERNAL,
        common_pb2.ERROR_CODE_INVALID_ARGUMENT,  # an executor that knows no early decodes
    ):
        bench = make_bench()
        prefill, decode = started(bench, decodes=2)
        choice = next(iter(bench.jobs.live_jobs)).choices[0]
        decode.error(code, retryable=True)
        assert (choice.state, choice.faults) == (TaskState.PREFILLING, 0)
        prefill.hand_over(1)
        again = bench.fleet.last
        assert (again.task.kind, again.task.attempt, again.output) == (DECODE, 3, [1])
        assert again.te_id != decode.te_id and not again.task.early
        decode.delta([99], 1)  # late, of an attempt that is over
        again.finish([2], length=True)
        assert choice.output == [1, 2]


def test_an_early_decode_lost_with_its_executor_is_replaced_at_the_handover(bench: Bench) -> None:
    prefill, decode = started(bench, decodes=2)
    decode.lose()
    prefill.hand_over(1)
    assert bench.fleet.last.te_id not in ("p", decode.te_id)
    assert (bench.fleet.last.task.attempt, bench.fleet.last.task.early) == (3, False)


def test_a_prefill_that_is_lost_takes_its_early_decode_along(bench: Bench) -> None:
    prefill, decode = started(bench)
    decode.delta([2], 1)
    bench.fleet.change("p", link_up=False)
    prefill.lose()
    bench.turn()
    assert ("d0", decode.task.task_id, 2) in bench.fleet.aborted
    assert bench.fleet.last.task.kind == UNIFIED and bench.fleet.last.output == []
    decode.delta([3], 2)
    bench.fleet.last.finish([1, 2, 3])
    assert bench.fleet.last.task.attempt == 3


def test_cancel_and_a_final_first_token_end_both(bench: Bench) -> None:
    prefill, decode = started(bench)
    job = next(iter(bench.jobs.live_jobs))
    job.cancel("client left")
    assert set(bench.fleet.aborted) == {("p", job.choices[0].task_id, 1), ("d0", job.choices[0].task_id, 2)}
    other = make_bench()
    prefill, decode = started(other)
    prefill.finish([5])
    assert other.fleet.aborted == [("d0", decode.task.task_id, 2)]


def test_a_decode_cannot_run_ahead_without_bound(bench: Bench) -> None:
    prefill, decode = started(bench)
    for number in range(300):
        decode.delta([number], 1 + number)
    assert ("d0", decode.task.task_id, 2) in bench.fleet.aborted
    prefill.hand_over(1)
    assert bench.fleet.last.task.attempt == 3


def test_a_second_start_places_nothing(bench: Bench) -> None:
    prefill, _ = started(bench)
    prefill.start()
    assert len(bench.fleet.submitted) == 2


def test_late_when_the_setting_says_so() -> None:
    bench = make_bench(early_decode=False)
    bench.fleet.add("p", Role.PREFILL)
    bench.fleet.add("d", Role.DECODE)
    bench.submit()
    assert not bench.fleet.last.task.tell_start
    bench.fleet.last.hand_over(1)
    assert bench.fleet.last.task.kind == DECODE and not bench.fleet.last.task.early


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(["p", "d", "lose_p", "lose_d", "fail_d", "refuse_d", "turn"]), max_size=12))
def test_whatever_fails_and_whatever_comes_first_each_token_is_delivered_once(steps: list[str]) -> None:
    """Both executors produce the same tokens 0, 1, 2, …: the client must see exactly that."""
    bench = make_bench(max_attempts=50)
    prefill, decode = started(bench, decodes=2)
    job = next(iter(bench.jobs.live_jobs))
    said = 1  # of the early decode
    alive = {"p": True, "d": True}
    for step in steps:
        match step:
            case "p" if alive["p"]:
                prefill.hand_over(0)
                alive["p"] = False
            case "d" if alive["d"]:
                decode.delta([said], said)
                said += 1
            case "lose_p" if alive["p"]:
                prefill.lose()
                alive["p"] = False
            case "lose_d" if alive["d"]:
                decode.lose()
                alive["d"] = False
            case "fail_d" | "refuse_d" if alive["d"]:
                refused = step == "refuse_d" and said == 1
                code = common_pb2.ERROR_CODE_QUEUE_FULL if refused else common_pb2.ERROR_CODE_INTERNAL
                decode.delta(
                    start=said if said > 1 else 0,
                    finish=common_pb2.FINISH_REASON_ERROR,
                    error=common_pb2.TaskError(code=code, retryable=True),
                )
                alive["d"] = False
            case "turn":
                bench.turn()
    for _ in range(20):
        choice = job.choices[0]
        if choice.state.terminal:
            break
        last = bench.fleet.last
        known = len(choice.output)
        if choice.state is TaskState.PREFILLING:
            current = next(s for s in bench.fleet.submitted if s.task.attempt == choice.current.number)
            current.hand_over(known)
        elif choice.state.on_executor:
            current = next(s for s in bench.fleet.submitted if s.task.attempt == choice.current.number)
            current.finish(list(range(known, 8)), known, length=True)
        else:
            bench.turn()
        assert last
    tokens = [token for delta in drain(job) for token in delta.tokens]
    assert tokens == list(range(len(tokens))) and len(tokens) >= 8
