"""The engine's calls: refusals, aborts, failures, its thread, its reports. Needs nothing."""

from __future__ import annotations

import threading
import time

import pytest

from flowserve.engine.config import EngineConfig
from flowserve.engine.core import AuditResult
from flowserve.engine.engine import Engine
from flowserve.engine.types import (
    EngineTask,
    ErrorCode,
    FinishReason,
    KVSource,
    Role,
    SamplingParams,
    StepEvent,
    TaskKind,
    TaskRejected,
)
from flowserve.rtc import RTC
from tests.support.engine import (
    VOCAB,
    ChainExecutor,
    PageStore,
    Rig,
    Wire,
    expected_output,
    make_task,
    tokens_of,
)

SOURCE = KVSource("t.0", "te", "1", "h:1")
DECODE = TaskKind.DECODE


@pytest.mark.parametrize(
    ("task", "word"),
    [
        (make_task([]), "empty"),
        (make_task([1, VOCAB]), "vocabulary"),
        (make_task([1, -1]), "vocabulary"),
        (make_task([1], output=[VOCAB]), "vocabulary"),
        (make_task([1, 2], 1, output=[3, 4]), "already out"),
        (make_task([1] * 32), "no room"),
        (make_task([1] * 20, 50, output=[1] * 12), "no room"),
        (make_task([1], adapter_id="style"), "not loaded"),
        (make_task([1], kind=DECODE, kv_source=SOURCE), "output token"),
        (make_task([1], kind=DECODE, output=[2]), "kv_source"),
        (
            make_task(
                [1], kind=DECODE, output=[2], kv_source=SOURCE, sampling=SamplingParams(prompt_logprobs=1)
            ),
            "prompt_logprobs",
        ),
    ],
)
def test_wrong_tasks_are_refused_with_what_is_wrong(task: EngineTask, word: str) -> None:
    rig = Rig(wire=Wire(), max_model_len=32)
    with pytest.raises(TaskRejected, match=word) as refused:
        rig.submit(task)
    assert refused.value.error.code is ErrorCode.INVALID_ARGUMENT and not refused.value.error.retryable
    assert rig.engine.active_tasks == 0


def test_a_full_context_can_be_scored() -> None:
    rig = Rig(max_model_len=32)
    answer = rig.submit(make_task([1] * 32, 0, sampling=SamplingParams(prompt_logprobs=0)))
    rig.run()
    assert answer.final.finish is FinishReason.LENGTH and len(answer.first.prompt_logprobs) == 32


def test_a_task_that_can_never_fit_is_refused() -> None:
    rig = Rig(num_blocks=4)
    with pytest.raises(TaskRejected) as refused:
        rig.submit(make_task(tokens_of(1, 17)))
    assert refused.value.error.code is ErrorCode.OUT_OF_KV and not refused.value.error.retryable
    fits = rig.submit(make_task(tokens_of(1, 16)))
    rig.run()
    assert fits.tokens == expected_output(tokens_of(1, 16), 1)[0]


def test_the_queue_is_bounded_and_says_so() -> None:
    rig = Rig(config=EngineConfig(max_tasks=2, max_running=2, max_batch_tokens=8))
    rig.submit(make_task([1], task_id="a"))
    rig.submit(make_task([2], task_id="b"))
    with pytest.raises(TaskRejected) as refused:
        rig.submit(make_task([3], task_id="c"))
    assert refused.value.error.code is ErrorCode.QUEUE_FULL and refused.value.error.retryable
    rig.run()
    rig.submit(make_task([3], task_id="c"))
    rig.run()


def test_an_attempt_is_taken_once() -> None:
    rig = Rig()
    rig.submit(make_task([1]))
    with pytest.raises(TaskRejected, match="already"):
        rig.submit(make_task([1]))
    rig.submit(make_task([1], attempt=1))
    rig.run()
    rig.assert_clean()


def test_aborts_end_waiting_and_running_tasks_once() -> None:
    rig = Rig(config=EngineConfig(max_running=1, max_batch_tokens=8))
    running = rig.submit(make_task(tokens_of(1, 30), 5, task_id="running"))
    waiting = rig.submit(make_task([3], 5, task_id="waiting"))
    rig.step(2)
    for _ in range(3):
        rig.engine.abort("running", 0)
        rig.engine.abort("waiting", 0)
        rig.engine.abort("unknown", 0)
    rig.step()
    assert running.final.finish is waiting.final.finish is FinishReason.ABORTED
    rig.engine.abort("running", 0)
    rig.assert_clean()


def test_an_abort_that_overtakes_its_task_still_ends_it() -> None:
    rig = Rig()
    answer = rig.submit(make_task([1]))
    rig.engine.abort("t", 0)
    rig.step()
    assert answer.final.finish is FinishReason.ABORTED and not rig.executor.batches
    rig.assert_clean()


def test_a_lost_owner_takes_its_tasks_with_it_and_no_others() -> None:
    rig = Rig()
    gone = [rig.submit(make_task([i + 1], 50, task_id=f"g{i}", owner="gw/1")) for i in range(3)]
    stays = rig.submit(make_task([9], 5, task_id="s", owner="gw/2"))
    rig.step(2)
    rig.engine.abort_owner("gw/1")
    rig.run()
    assert all(answer.final.finish is FinishReason.ABORTED for answer in gone)
    assert stays.tokens == expected_output([9], 5)[0]
    rig.assert_clean()


def test_a_step_that_raises_fails_its_tasks_and_no_others() -> None:
    rig = Rig(config=EngineConfig(max_running=1, max_batch_tokens=8))
    failed = rig.submit(make_task(tokens_of(1, 12), 5, task_id="a"))
    other = rig.submit(make_task(tokens_of(2, 12), 5, task_id="b"))
    rig.step()
    rig.executor.fail_next = 1
    rig.step()
    assert rig.engine.consecutive_failures == 1
    assert failed.final.error.code is ErrorCode.INTERNAL and failed.final.error.retryable
    rig.run()
    assert other.tokens == expected_output(tokens_of(2, 12), 5)[0]
    assert rig.engine.consecutive_failures == 0
    retry = rig.submit(make_task(tokens_of(1, 12), 5, task_id="a", attempt=1))
    rig.run()
    assert retry.tokens == expected_output(tokens_of(1, 12), 5)[0], "what the failed step wrote is not reused"
    rig.assert_clean()


def test_a_processor_that_raises_fails_its_task_only() -> None:
    class Broken:
        def advance(self, token: int) -> None:
            raise RuntimeError("grammar is stuck")

        def state(self) -> bytes:
            return b""

    rig = Rig(processor_factory=lambda task: Broken() if task.task_id == "a" else None)
    broken = rig.submit(make_task([1], 5, task_id="a"))
    fine = rig.submit(make_task([2], 5, task_id="b"))
    rig.run()
    assert broken.final.error.code is ErrorCode.INTERNAL
    assert fine.tokens == expected_output([2], 5)[0]
    rig.assert_clean()


def test_a_processor_state_that_cannot_be_read_is_refused() -> None:
    def factory(task: EngineTask) -> None:
        raise ValueError("bad state")

    rig = Rig(processor_factory=factory)
    with pytest.raises(TaskRejected, match="bad state"):
        rig.submit(make_task([1]))


def test_load_reports_what_is_held_and_queued() -> None:
    rig = Rig(num_blocks=32, config=EngineConfig(max_running=1, max_batch_tokens=16))
    rig.submit(make_task(tokens_of(1, 40), 5, task_id="a"))
    rig.submit(make_task(tokens_of(2, 10), 5, task_id="b"))
    assert rig.engine.load().waiting == 2
    rig.engine.set_role(Role.DECODE)
    rig.step()
    load = rig.engine.load()
    assert (load.running, load.waiting, load.step) == (1, 1, 1)
    assert load.queued_prefill_tokens == 24 + 10
    assert load.kv_blocks_total == 32 and load.kv_blocks_free == 22
    assert load.role is Role.DECODE
    rig.run()
    load = rig.engine.load()
    assert load.kv_blocks_free == 32 and load.kv_blocks_cached == rig.cache.idle_blocks > 0
    rig.clock.now += 3
    assert rig.engine.load().age_seconds == pytest.approx(3, abs=0.1)


def test_a_task_without_progress_counts_as_stuck() -> None:
    rig = Rig(wire=Wire())
    rig.submit(make_task([1, 2], kind=DECODE, output=[3], kv_source=SOURCE))
    rig.step()
    assert rig.engine.audit().stuck_tasks == 0
    rig.clock.now += 100
    assert rig.engine.audit().stuck_tasks == 1


class Threaded:
    """An engine on its own thread."""

    def __init__(self, num_blocks: int = 64, **options: object) -> None:
        store = PageStore(num_blocks)
        self.executor = ChainExecutor(store)
        self.events: list[StepEvent] = []
        self.ended = threading.Semaphore(0)
        config = EngineConfig(max_running=8, max_batch_tokens=32, idle_tick_seconds=0.05)
        self.engine = Engine(
            self.executor, RTC(store), config, handover=None, on_event=self.on_event, **options
        )
        self.engine.start()

    def on_event(self, event: StepEvent) -> None:
        self.events.append(event)
        for delta in event.deltas:
            if delta.finish is not None:
                self.ended.release()

    def tokens(self, task_id: str) -> list[int]:
        return [t for event in self.events for delta in event.deltas if delta.task_id == task_id
                for t in delta.tokens]  # fmt: skip


def test_the_thread_serves_submits_from_many_threads() -> None:
    rig = Threaded()

    def client(number: int) -> None:
        for i in range(5):
            rig.engine.submit(make_task(tokens_of(number, 5 + i), 6, task_id=f"{number}/{i}"))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for _ in range(30):
        assert rig.ended.acquire(timeout=10)
    assert rig.engine.stop()
    for number in range(6):
        for i in range(5):
            assert rig.tokens(f"{number}/{i}") == expected_output(tokens_of(number, 5 + i), 6)[0]
    assert rig.engine.audit() == AuditResult(0, 0)


def test_an_idle_engine_keeps_its_heartbeat_and_wakes_at_once() -> None:
    rig = Threaded()
    time.sleep(0.3)
    assert rig.engine.load().age_seconds < 0.2
    started = time.monotonic()
    rig.engine.submit(make_task([1], 1))
    assert rig.ended.acquire(timeout=5)
    assert time.monotonic() - started < 1
    assert rig.engine.stop()


def test_a_deadline_ends_a_task_on_an_idle_engine() -> None:
    rig = Threaded()
    rig.engine.submit(make_task([1], 1000, deadline=time.monotonic() - 1))
    assert rig.ended.acquire(timeout=5)
    assert rig.engine.stop()
    (delta,) = [delta for event in rig.events for delta in event.deltas]
    assert delta.error is not None and delta.error.code is ErrorCode.DEADLINE_EXCEEDED


def test_stop_ends_every_task_with_a_retryable_error_and_takes_no_more() -> None:
    rig = Threaded(num_blocks=600)
    rig.engine.submit(make_task([1], 2000, sampling=SamplingParams(ignore_eos=True)))
    assert rig.engine.stop()
    assert rig.ended.acquire(timeout=1)
    last = rig.events[-1].deltas[-1]
    assert last.error is not None and last.error.retryable
    with pytest.raises(TaskRejected) as refused:
        rig.engine.submit(make_task([1], 5, task_id="late"))
    assert refused.value.error.code is ErrorCode.DRAINING
    assert rig.engine.audit().leaked_blocks == 0


def test_a_receiver_of_events_that_raises_does_not_stop_the_engine() -> None:
    rig = Threaded()
    inner = rig.on_event
    calls = iter(range(1000))

    def broken(event: StepEvent) -> None:
        inner(event)
        if next(calls) == 0:
            raise RuntimeError("shell is confused")

    rig.engine._on_event = broken
    rig.engine.submit(make_task([1], 5))
    assert rig.ended.acquire(timeout=5)
    assert rig.engine.stop()


def test_repeated_executor_failures_leave_the_engine_alive() -> None:
    rig = Threaded()
    rig.executor.fail_next = 3
    for i in range(3):
        rig.engine.submit(make_task([1 + i], 5, task_id=f"f{i}"))
        assert rig.ended.acquire(timeout=5)
    rig.engine.submit(make_task([7], 5, task_id="ok"))
    assert rig.ended.acquire(timeout=5)
    assert rig.tokens("ok") == expected_output([7], 5)[0]
    assert rig.engine.stop()
