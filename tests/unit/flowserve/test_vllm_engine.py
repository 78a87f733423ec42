"""vLLM under the TE-shell's engine interface, with a stand-in for vLLM itself: what tasks become, what its
outputs become, and that every accepted task ends exactly once. The real one is in tests/integration."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from flowserve.engine.types import (
    EngineTask,
    ErrorCode,
    FinishReason,
    Role,
    SamplingParams,
    StepEvent,
    TaskDelta,
    TaskKind,
    TaskRejected,
)
from flowserve.executor.interface import ModelInfo
from flowserve.vllm.engine import EngineLost, Loop, Stats, VllmEngine

INFO = ModelInfo("m@1", 2, 1, 8, 1000, 100, (), "bfloat16")


def output(tokens: list[int], finish: str | None = None, **more: Any) -> Any:
    one = SimpleNamespace(token_ids=tokens, finish_reason=finish, logprobs=more.pop("logprobs", None))
    return SimpleNamespace(
        outputs=[one], finished=finish is not None, num_cached_tokens=more.get("cached", 0),
        prompt_logprobs=more.get("prompt_logprobs"),
    )  # fmt: skip


@dataclass
class StandIn:
    """Answers each request by `script`; says of itself that it is no vLLM."""

    script: Callable[[EngineTask, int], AsyncGenerator[Any, None]]
    lost: str = ""
    stats: Stats = field(default_factory=Stats)
    closed: list[str] = field(default_factory=list)
    asked: list[tuple[str, int]] = field(default_factory=list)

    async def generate(self, task: EngineTask, request_id: str, max_tokens: int) -> AsyncGenerator[Any, None]:
        self.asked.append((request_id, max_tokens))
        try:
            async for one in self.script(task, max_tokens):
                yield one
        finally:
            self.closed.append(request_id)

    def shutdown(self) -> None:
        pass


class Harness:
    def __init__(self, script: Callable[[EngineTask, int], AsyncGenerator[Any, None]], **given: Any) -> None:
        self.client, self.loop = StandIn(script), Loop()
        self.loop.start()
        self.deltas: list[TaskDelta] = []
        self.changed = threading.Condition()
        self.engine = VllmEngine(
            self.client, self.loop, INFO, num_blocks=10, block_tokens=16, on_event=self._told,
            **{"max_tasks": 4, **given},
        )  # fmt: skip

    def _told(self, event: StepEvent) -> None:
        with self.changed:
            self.deltas += event.deltas
            self.changed.notify_all()

    def ended(self, task_id: str = "t", seconds: float = 5.0) -> list[TaskDelta]:
        """Its deltas, once the last has come."""

        def mine() -> list[TaskDelta]:
            return [delta for delta in self.deltas if delta.task_id == task_id]

        with self.changed:
            assert self.changed.wait_for(lambda: any(d.finish for d in mine()), seconds), self.deltas
        assert [delta.finish is not None for delta in mine()].count(True) == 1
        assert mine()[-1].finish is not None
        return mine()


@pytest.fixture
def make() -> Iterator[Callable[..., Harness]]:
    made: list[Harness] = []

    def one(script: Callable[[EngineTask, int], AsyncGenerator[Any, None]], **given: Any) -> Harness:
        made.append(Harness(script, **given))
        return made[-1]

    yield one
    for harness in made:
        assert harness.engine.stop(5)
        assert harness.engine.active_tasks == 0
        harness.loop.stop()


async def tokens(task: EngineTask, count: int) -> AsyncGenerator[Any, None]:
    yield output([1, 2], cached=16)
    yield output([3], "length" if count <= 3 else "stop")


async def never(task: EngineTask, count: int) -> AsyncGenerator[Any, None]:
    yield output([1])
    await asyncio.sleep(3600)


def task(task_id: str = "t", **given: Any) -> EngineTask:
    values: dict[str, Any] = {
        "attempt": 1, "kind": TaskKind.UNIFIED, "prompt": list(range(20)), "sampling": SamplingParams(),
        "max_output_tokens": 8, "owner": "g", **given,
    }  # fmt: skip
    return EngineTask(task_id=task_id, **values)


def test_outputs_become_deltas_and_one_of_them_is_the_last(make: Callable[..., Harness]) -> None:
    harness = make(tokens)
    harness.engine.submit(task())
    first, second, last = harness.ended()
    assert (first.start_index, first.tokens, first.cached_tokens) == (0, [1, 2], 16)
    assert (second.start_index, second.tokens, second.cached_tokens) == (2, [3], None)
    assert (last.start_index, last.finish, last.error) == (3, FinishReason.STOP, None)
    assert last.timings is not None and last.owner == "g"
    assert harness.client.asked == [("t#1", 8)] and harness.client.closed == ["t#1"]


def test_a_replay_goes_on_after_what_was_delivered_and_keeps_its_budget(make: Callable[..., Harness]) -> None:
    harness = make(tokens)
    harness.engine.submit(task(output=[7, 7, 7, 7, 7, 7], attempt=2))
    deltas = harness.ended()
    assert harness.client.asked == [("t#2", 2)]
    assert [token for delta in deltas for token in delta.tokens] == [1, 2]  # the budget's rest, and no more
    assert (deltas[0].start_index, deltas[-1].start_index) == (6, 8)


def test_a_prompt_is_scored_without_a_token(make: Callable[..., Harness]) -> None:
    async def scored(task: EngineTask, count: int) -> AsyncGenerator[Any, None]:
        assert count == 1  # vLLM makes one, which nobody sees
        rank = SimpleNamespace(logprob=-0.5, rank=1)
        yield output([9], "length", prompt_logprobs=[None, {5: rank}])

    harness = make(scored)
    harness.engine.submit(
        task(prompt=[4, 5], max_output_tokens=0, sampling=SamplingParams(prompt_logprobs=0))
    )
    first, last = harness.ended()
    assert first.tokens == [] and last.finish is FinishReason.LENGTH
    assert first.prompt_logprobs is not None and first.prompt_logprobs[0] is None
    second = first.prompt_logprobs[1]
    assert second is not None and (second.token, second.logprob, second.rank, second.top) == (5, -0.5, 1, ())


def test_logprobs_keep_the_token_and_as_many_as_were_asked_for(make: Callable[..., Harness]) -> None:
    async def scored(task: EngineTask, count: int) -> AsyncGenerator[Any, None]:
        found = {
            7: SimpleNamespace(logprob=-3.0, rank=9),
            1: SimpleNamespace(logprob=-0.1, rank=1),
            2: SimpleNamespace(logprob=-0.2, rank=2),
        }
        yield output([7], "stop", logprobs=[found])

    harness = make(scored)
    harness.engine.submit(task(sampling=SamplingParams(logprobs=2)))
    (scores,) = harness.ended()[0].logprobs or []
    assert (scores.token, scores.logprob, scores.rank) == (7, -3.0, 9)
    assert scores.top == ((1, -0.1), (2, -0.2))


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"kind": TaskKind.PREFILL}, "whole requests"),
        ({"kind": TaskKind.DECODE, "output": [1]}, "whole requests"),
        ({"processor_state": b"x"}, "logit processors"),
        ({"adapter_id": "lora"}, "adapters"),
        ({"prompt": []}, "empty"),
        ({"prompt": [5000]}, "vocabulary"),
        ({"prompt": list(range(100)), "max_output_tokens": 1}, "no room"),
    ],
)
def test_what_vllm_cannot_do_is_refused_at_the_door(
    make: Callable[..., Harness], given: dict[str, Any], word: str
) -> None:
    harness = make(tokens)
    with pytest.raises(TaskRejected) as refused:
        harness.engine.submit(task(**given))
    assert word in refused.value.error.message and not refused.value.error.retryable
    assert harness.engine.active_tasks == 0


def test_the_bound_of_tasks_and_a_task_that_is_here_already(make: Callable[..., Harness]) -> None:
    harness = make(never, max_tasks=2)
    harness.engine.submit(task("a"))
    with pytest.raises(TaskRejected) as refused:
        harness.engine.submit(task("a"))
    assert "here already" in refused.value.error.message
    harness.engine.submit(task("b"))
    with pytest.raises(TaskRejected) as refused:
        harness.engine.submit(task("c"))
    assert refused.value.error.code is ErrorCode.QUEUE_FULL and refused.value.error.retryable


def test_aborts_deadlines_and_the_end_each_have_their_word(make: Callable[..., Harness]) -> None:
    harness = make(never)
    harness.engine.submit(task("aborted"))
    with harness.changed:
        assert harness.changed.wait_for(lambda: bool(harness.deltas), 5)  # it runs
    harness.engine.submit(task("owned", owner="gone"))  # it may be aborted before it begins
    harness.engine.submit(task("late", deadline=time.monotonic() + 0.05))
    harness.engine.abort("aborted", 1)
    harness.engine.abort("unknown", 1)
    harness.engine.abort_owner("gone")
    assert harness.ended("aborted")[-1].finish is FinishReason.ABORTED
    assert harness.ended("owned")[-1].finish is FinishReason.ABORTED
    late = harness.ended("late")[-1]
    assert late.error is not None and late.error.code is ErrorCode.DEADLINE_EXCEEDED
    harness.engine.submit(task("left"))
    assert harness.engine.stop(5)
    left = harness.ended("left")[-1]
    assert left.error is not None and left.error.code is ErrorCode.DRAINING and left.error.retryable
    with pytest.raises(TaskRejected):
        harness.engine.submit(task("later"))
    assert {"aborted#1", "late#1", "left#1"} <= set(harness.client.closed)  # vLLM was told
    assert {name for name, _ in harness.client.asked} == set(harness.client.closed)


@pytest.mark.parametrize(
    ("problem", "code", "retryable"),
    [
        (ValueError("bad bias"), ErrorCode.INVALID_ARGUMENT, False),
        (EngineLost("the core died"), ErrorCode.INTERNAL, True),
        (RuntimeError("a bug"), ErrorCode.INTERNAL, True),
    ],
)
def test_what_vllm_raises_costs_one_task(
    make: Callable[..., Harness], problem: Exception, code: ErrorCode, retryable: bool
) -> None:
    async def broken(task: EngineTask, count: int) -> AsyncGenerator[Any, None]:
        if task.task_id == "t":
            raise problem
        async for one in tokens(task, count):
            yield one

    harness = make(broken)
    harness.engine.submit(task())
    error = harness.ended()[-1].error
    assert error is not None and (error.code, error.retryable) == (code, retryable)
    assert str(problem) in error.message
    harness.engine.submit(task("other"))
    assert harness.ended("other")[-1].finish is FinishReason.STOP


def test_a_request_that_vllm_gives_up_or_forgets_is_tried_elsewhere(make: Callable[..., Harness]) -> None:
    async def odd(task: EngineTask, count: int) -> AsyncGenerator[Any, None]:
        if task.task_id == "error":
            yield output([], "error")
        return

    harness = make(odd)
    for name in ("error", "silent"):
        harness.engine.submit(task(name))
        error = harness.ended(name)[-1].error
        assert error is not None and error.code is ErrorCode.INTERNAL and error.retryable


def test_the_load_is_what_vllm_says_and_what_is_here(make: Callable[..., Harness]) -> None:
    harness = make(never)
    harness.client.stats = Stats(steps=5, running=1, kv_used=0.5)
    harness.engine.set_role(Role.DECODE)
    for name in ("a", "b"):
        harness.engine.submit(task(name))
    load = harness.engine.load()
    assert (load.step, load.running, load.waiting, load.role) == (5, 1, 1, Role.DECODE)
    assert (load.kv_blocks_total, load.kv_blocks_free) == (10, 5)
    assert harness.engine.audit().stuck_tasks == 0 and harness.engine.snapshot_kv_events().cleared
    harness.client.lost = "dead"
    assert harness.engine.lost == "dead"
