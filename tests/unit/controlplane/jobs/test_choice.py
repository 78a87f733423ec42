"""A choice over its life: handover, replay, refusals, deadlines. No sockets, no waiting."""

from __future__ import annotations

from deepflow.v1 import common_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.jobs.serving import Sampling
from controlplane.jobs.states import JobState, TaskState
from controlplane.scheduling.types import Role

from .conftest import Bench, drain, make_bench

PREFILL, DECODE, UNIFIED = (
    common_pb2.TASK_KIND_PREFILL,
    common_pb2.TASK_KIND_DECODE,
    common_pb2.TASK_KIND_UNIFIED,
)


def pair(bench: Bench) -> None:
    bench.fleet.add("p", Role.PREFILL)
    bench.fleet.add("d", Role.DECODE)


def test_a_unified_task_streams_to_its_end(bench: Bench) -> None:
    bench.fleet.add("c")
    job = bench.submit()
    assert bench.fleet.last.task.kind == UNIFIED
    bench.fleet.last.delta([5, 6], cached_tokens=16)
    bench.fleet.last.finish([7], 2)
    (delta,) = drain(job)
    assert (delta.tokens, delta.finish, delta.cached_tokens) == ([5, 6, 7], "stop", 16)
    assert job.state is JobState.COMPLETED


def test_a_prefill_hands_over_to_a_decode_with_its_first_token_and_state(bench: Bench) -> None:
    pair(bench)
    job = bench.submit()
    first = bench.fleet.last
    assert (first.te_id, first.task.kind, first.task.attempt) == ("p", PREFILL, 1)
    first.hand_over(9)
    second = bench.fleet.last
    assert (second.te_id, second.task.kind, second.task.attempt) == ("d", DECODE, 2)
    assert second.output == [9]
    assert second.task.kv_source.transfer_id == f"{first.task.task_id}.1"
    assert second.task.processor_state == b"state"
    second.finish([10], length=True)
    (delta,) = drain(job)
    assert (delta.tokens, delta.finish) == ([9, 10], "length")


def test_decode_resumes_after_its_executor_dies_with_every_token_once(bench: Bench) -> None:
    pair(bench)
    job = bench.submit()
    bench.fleet.last.hand_over(1)
    dead = bench.fleet.last
    dead.delta([2, 3])
    bench.fleet.change("d", link_up=False)
    dead.lose()
    bench.turn()
    again = bench.fleet.last
    assert (again.te_id, again.task.kind, again.output) == ("p", UNIFIED, [1, 2, 3])
    assert ("p", again.task.task_id, 1) in bench.fleet.aborted  # what it had offered is freed
    dead.delta([99], 3)  # late, of an attempt that is over
    again.finish([4], length=True)
    (delta,) = drain(job)
    assert delta.tokens == [1, 2, 3, 4]


def test_a_replay_avoids_the_executor_that_failed(bench: Bench) -> None:
    bench.fleet.add("a")
    bench.fleet.add("b")
    bench.submit()
    failed = bench.fleet.last
    failed.error(common_pb2.ERROR_CODE_INTERNAL, retryable=True)
    bench.turn()
    assert bench.fleet.last.te_id != failed.te_id


def test_a_failed_transfer_blames_the_sender(bench: Bench) -> None:
    pair(bench)
    bench.submit()
    bench.fleet.last.hand_over(1)
    bench.fleet.last.error(common_pb2.ERROR_CODE_KV_TRANSFER_FAILED, retryable=True)
    bench.turn()
    assert (bench.fleet.last.te_id, bench.fleet.last.task.kind) == ("d", UNIFIED)


def test_replays_are_bounded() -> None:
    bench = make_bench(max_attempts=3)
    bench.fleet.add("a")
    job = bench.submit()
    for _ in range(3):
        bench.fleet.last.error(common_pb2.ERROR_CODE_INTERNAL, retryable=True)
        bench.turn()
    (delta,) = drain(job)
    assert delta.finish == "error" and delta.error is not None
    assert (delta.error.status, delta.error.code) == (503, "replays_exhausted")
    assert len(bench.fleet.submitted) == 3


def test_an_invalid_task_is_never_tried_again(bench: Bench) -> None:
    bench.fleet.add("a")
    job = bench.submit()
    bench.fleet.last.error(common_pb2.ERROR_CODE_INVALID_ARGUMENT)
    (delta,) = drain(job)
    assert delta.error is not None and delta.error.status == 400
    assert job.state is JobState.FAILED


def test_a_full_executor_is_left_for_another_and_costs_no_replay(bench: Bench) -> None:
    bench.fleet.add("a")
    bench.fleet.add("b")
    job = bench.submit()
    full = bench.fleet.last
    full.error(common_pb2.ERROR_CODE_QUEUE_FULL, retryable=True)
    bench.turn()
    assert bench.fleet.last.te_id != full.te_id
    assert job.choices[0].faults == 0


def test_when_all_are_full_it_waits_and_then_429() -> None:
    bench = make_bench(contended_seconds=30)
    bench.fleet.add("a")
    job = bench.submit(timeout_seconds=1000)
    for _ in range(100):
        if job.choices[0].state.terminal:
            break
        if job.choices[0].state.on_executor:
            bench.fleet.last.error(common_pb2.ERROR_CODE_QUEUE_FULL, retryable=True)
        bench.turn(0.5)
    error = job.choices[0].error
    assert error is not None and (error.status, error.code) == (429, "queue_full") and error.retry_after


def test_a_refused_decode_keeps_its_kv_and_goes_elsewhere(bench: Bench) -> None:
    pair(bench)
    bench.fleet.add("d2", Role.DECODE)
    bench.submit()
    bench.fleet.last.hand_over(1)
    refused = bench.fleet.last
    refused.error(common_pb2.ERROR_CODE_QUEUE_FULL, retryable=True)
    bench.turn()
    assert bench.fleet.last.task.kind == DECODE
    assert bench.fleet.last.te_id != refused.te_id
    assert bench.fleet.aborted == []


def test_without_a_decode_executor_a_handover_goes_on_unified(bench: Bench) -> None:
    pair(bench)
    bench.submit()
    prefill = bench.fleet.last
    del bench.fleet.views["d"]
    prefill.hand_over(1)
    bench.turn()
    assert (bench.fleet.last.te_id, bench.fleet.last.task.kind) == ("p", UNIFIED)
    assert bench.fleet.last.output == [1]
    assert ("p", prefill.task.task_id, 1) in bench.fleet.aborted


def test_a_handover_waits_for_a_busy_decode_executor_but_not_past_its_lease(bench: Bench) -> None:
    pair(bench)
    bench.submit()
    prefill = bench.fleet.last
    bench.fleet.change("d", tasks=256)
    prefill.hand_over(1, lease_ms=10_000)
    bench.turn(4)
    assert len(bench.fleet.submitted) == 1
    bench.turn(2)
    assert (bench.fleet.last.te_id, bench.fleet.last.task.kind) == ("p", UNIFIED)


def test_a_handover_of_another_length_is_not_believed(bench: Bench) -> None:
    pair(bench)
    bench.submit()
    first = bench.fleet.last
    first.delta(
        [1], finish=common_pb2.FINISH_REASON_HANDOVER, handover={"length": 7, "source": {"transfer_id": "x"}}
    )
    bench.turn()
    assert bench.fleet.last.task.attempt == 2
    assert bench.fleet.last.task.kind != DECODE


def test_cancel_reaches_the_decode_and_the_prefill_executor(bench: Bench) -> None:
    pair(bench)
    job = bench.submit()
    bench.fleet.last.hand_over(1)
    job.cancel("client left")
    task = bench.fleet.last.task.task_id
    assert set(bench.fleet.aborted) == {("d", task, 2), ("p", task, 1)}
    job.cancel("again")
    assert len(bench.fleet.aborted) == 2
    assert job.state is JobState.CANCELLED
    assert drain(job)[0].finish == "cancelled"


def test_a_stop_string_completes_the_choice_and_aborts_its_task(bench: Bench) -> None:
    bench.fleet.add("a")
    job = bench.submit()
    bench.fleet.last.delta([1])
    job.finish_choice(0)
    assert bench.fleet.aborted == [("a", bench.fleet.last.task.task_id, 1)]
    assert drain(job)[0].finish == "stop"
    assert job.state is JobState.COMPLETED


def test_the_whole_deadline_ends_a_running_task(bench: Bench) -> None:
    bench.fleet.add("a")
    job = bench.submit(timeout_seconds=5)
    assert 4000 < bench.fleet.last.task.timeout_ms <= 5000
    bench.turn(6)
    error = job.choices[0].error
    assert error is not None and (error.status, error.code) == (504, "deadline_exceeded")
    assert bench.fleet.aborted


def test_a_stalled_task_is_replayed_once_then_504(bench: Bench) -> None:
    bench.fleet.add("a")
    bench.fleet.add("b")
    job = bench.submit()
    stalled = bench.fleet.last
    stalled.delta([1])
    bench.turn(61)
    assert (stalled.te_id, stalled.task.task_id, 1) in bench.fleet.aborted
    again = bench.fleet.last
    assert again.te_id != stalled.te_id and again.output == [1]
    again.delta([], 1, cached_tokens=0)
    bench.turn(61)
    error = job.choices[0].error
    assert error is not None and (error.status, error.code) == (504, "stalled")


def test_a_task_in_an_executors_queue_has_longer_than_a_running_one(bench: Bench) -> None:
    bench.fleet.add("a")
    job = bench.submit()
    bench.turn(100)
    assert job.choices[0].state is TaskState.RUNNING
    bench.turn(100)
    assert len(bench.fleet.submitted) == 2


def test_a_lost_end_is_not_computed_again(bench: Bench) -> None:
    bench.fleet.add("a")
    job = bench.submit(max_output_tokens=2)
    bench.fleet.last.delta([1, 2])
    bench.fleet.last.lose()
    (delta,) = drain(job)
    assert (delta.tokens, delta.finish) == ([1, 2], "length")
    assert len(bench.fleet.submitted) == 1


def test_a_gap_is_replayed_and_never_delivered(bench: Bench) -> None:
    bench.fleet.add("a")
    job = bench.submit()
    bench.fleet.last.delta([1])
    bench.fleet.last.delta([3], 2)
    bench.turn()
    assert bench.fleet.last.output == [1]
    bench.fleet.last.finish([2, 3])
    assert [d.tokens for d in drain(job)] == [[1, 2, 3]]


def test_out_of_kv_everywhere_is_the_clients_error(bench: Bench) -> None:
    bench.fleet.add("a")
    bench.fleet.add("b")
    job = bench.submit()
    for _ in range(2):
        bench.fleet.last.error(common_pb2.ERROR_CODE_OUT_OF_KV)
        bench.turn()
    error = job.choices[0].error
    assert error is not None and (error.status, error.code) == (400, "context_length_exceeded")


def test_prompt_scores_run_unified_and_are_asked_for_once(bench: Bench) -> None:
    pair(bench)
    sampling = Sampling(temperature=0, prompt_logprobs=1)
    job = bench.submit(sampling=sampling, max_output_tokens=4, prompt=3)
    first = bench.fleet.last
    assert first.task.kind == UNIFIED and first.task.sampling.HasField("prompt_logprobs")
    first.delta([1], prompt_logprobs=[{}, {"token": 1, "logprob": -1.0}, {"token": 2, "logprob": -2.0}])
    first.lose()
    bench.turn()
    assert not bench.fleet.last.task.sampling.HasField("prompt_logprobs")
    scored = drain(job)[0].prompt_logprobs
    assert scored is not None and scored[0] is None and scored[2] is not None and scored[2].token == 2


def test_an_echo_without_output_is_unified(bench: Bench) -> None:
    pair(bench)
    job = bench.submit(max_output_tokens=0)
    assert bench.fleet.last.task.kind == UNIFIED
    bench.fleet.last.finish(length=True)
    assert drain(job)[0].finish == "length"


EXPECTED = list(range(100, 116))
"""What every attempt would say: token i is 100 + i, as for a seeded or greedy engine."""


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_no_token_is_lost_or_repeated_whatever_happens_below(data: st.DataObject) -> None:
    """Random order of good deltas, duplicates, overlaps, deltas of past attempts, losses and refusals."""
    bench = make_bench(max_attempts=1000)
    for te_id, role in (("p", Role.PREFILL), ("d", Role.DECODE), ("c", Role.COLOCATED)):
        bench.fleet.add(te_id, role)
    job = bench.submit(max_output_tokens=len(EXPECTED))
    choice = job.choices[0]
    sent = {0: 0}  # per submit: tokens its executor has sent
    for _ in range(60):
        if choice.state.terminal:
            break
        bench.turn(1.1, step=1.1)
        number = data.draw(st.integers(0, len(bench.fleet.submitted) - 1), label="submit")
        if data.draw(st.booleans(), label="newest"):
            number = len(bench.fleet.submitted) - 1
        item = bench.fleet.submitted[number]
        base = len(item.output)
        at = sent.setdefault(number, base)
        current = choice.current is not None and choice.current.number == item.task.attempt
        action = data.draw(st.sampled_from(["more", "repeat", "lose", "error", "refuse", "transfer"]))
        if action == "more" and item.task.kind == PREFILL:
            item.hand_over(EXPECTED[base])
        elif action in ("more", "repeat"):
            back = data.draw(st.integers(0, at - base)) if action == "repeat" else 0
            count = data.draw(st.integers(1, 4))
            end = min(at - back + count, len(EXPECTED))
            tokens = EXPECTED[at - back : end]
            sent[number] = max(at, end)
            item.delta(tokens, at - back)
            if end == len(EXPECTED) and current and not choice.state.terminal:
                item.finish([], end, length=True)
        elif action == "lose":
            item.lose()
        elif current:
            code = {
                "error": common_pb2.ERROR_CODE_INTERNAL,
                "refuse": common_pb2.ERROR_CODE_DRAINING,
                "transfer": common_pb2.ERROR_CODE_KV_TRANSFER_FAILED,
            }[action]
            item.error(code, retryable=True)
    got = [token for delta in drain(job) for token in delta.tokens]
    assert got == EXPECTED[: len(got)]
    assert choice.output == got
    if choice.finish == "length":
        assert got == EXPECTED
