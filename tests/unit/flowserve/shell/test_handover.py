"""Pulls and offers between the engine's thread and the loop: each is answered exactly once. Needs nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from flowserve.engine.types import ErrorCode, KVSource, PullRequest, TaskError
from flowserve.shell.handover import Handover
from kvtransfer.errors import TransferError, TransferErrorCode
from kvtransfer.receiver import PullResult

SOURCE = KVSource("p.1", "te-p", "i1", "127.0.0.1:1")


class Answers:
    def __init__(self) -> None:
        self.pulls: list[tuple[str, TaskError | None]] = []
        self.released: list[tuple[str, str]] = []

    def pull_done(
        self, task_id: str, attempt: int, error: TaskError | None = None, payload: bytes = b""
    ) -> None:
        self.pulls.append((task_id, error))

    def release_transfer(self, transfer_id: str, outcome: str) -> None:
        self.released.append((transfer_id, outcome))


class Puller:
    """Ends a pull as `outcomes` says, after `gate`; a cancelled one still writes for a moment."""

    def __init__(self, outcome: Exception | None = None) -> None:
        self.outcome = outcome
        self.gate = asyncio.Event()
        self.calls: list[tuple[Any, ...]] = []
        self.writing = 0

    async def pull(self, *args: Any) -> PullResult:
        self.calls.append(args)
        self.writing += 1
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            await asyncio.sleep(0.02)  # the copy that was under way
            raise
        finally:
            self.writing -= 1
        if self.outcome is not None:
            raise self.outcome
        return PullResult(1, 1, "shm", 0.1)


def request(task: str, deadline: float | None = None) -> PullRequest:
    return PullRequest(task, 1, SOURCE, (4, 5), 30, 1, deadline)


@asynccontextmanager
async def running(puller: Puller) -> AsyncIterator[tuple[Handover, Answers]]:
    def no_sender() -> Any:
        raise AssertionError("not used")

    handover, answers = Handover(no_sender, puller), Answers()
    handover.attach(answers)
    task = asyncio.create_task(handover.run())
    await asyncio.sleep(0)
    yield handover, answers
    handover.stop()
    async with asyncio.timeout(5):
        await task


async def until(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.002)


async def test_a_pull_that_worked_is_answered_once_without_an_error() -> None:
    puller = Puller()
    async with running(puller) as (handover, answers):
        await asyncio.to_thread(handover.start_pull, request("t"))
        puller.gate.set()
        await until(lambda: answers.pulls)
    assert answers.pulls == [("t", None)]
    assert puller.calls == [("127.0.0.1:1", "te-p", "i1", "p.1", (4, 5), 30, 1, None, 1)]


@pytest.mark.parametrize(
    ("outcome", "deadline", "code", "retryable"),
    [
        (TransferError(TransferErrorCode.PEER_LOST, "gone"), None, ErrorCode.KV_TRANSFER_FAILED, True),
        (TransferError(TransferErrorCode.LAYOUT_MISMATCH, "x"), None, ErrorCode.KV_TRANSFER_FAILED, True),
        (TransferError(TransferErrorCode.DEADLINE, "late"), 5.0, ErrorCode.DEADLINE_EXCEEDED, False),
        (TransferError(TransferErrorCode.DEADLINE, "late"), None, ErrorCode.KV_TRANSFER_FAILED, True),
        (ValueError("a defect"), None, ErrorCode.INTERNAL, True),
    ],
)
async def test_a_failed_pull_is_a_typed_error_and_the_others_go_on(
    outcome: Exception, deadline: float | None, code: ErrorCode, retryable: bool
) -> None:
    puller = Puller(outcome)
    async with running(puller) as (handover, answers):
        for name in ("a", "b"):
            handover.start_pull(request(name, deadline))
        puller.gate.set()
        await until(lambda: len(answers.pulls) == 2)
    for _, error in answers.pulls:
        assert error is not None and (error.code, error.retryable) == (code, retryable)


@pytest.mark.parametrize("turns", [0, 1, 5])
async def test_a_cancelled_pull_is_answered_once_nothing_writes_any_more(turns: int) -> None:
    puller = Puller()
    async with running(puller) as (handover, answers):
        handover.start_pull(request("t"))
        for _ in range(turns):  # 0: cancelled before its first step
            await asyncio.sleep(0)
        handover.cancel_pull("t", 1)
        handover.cancel_pull("t", 1)
        await until(lambda: answers.pulls)
        assert puller.writing == 0
        await asyncio.sleep(0.05)
    ((task, error),) = answers.pulls
    assert task == "t" and error is not None and error.code is ErrorCode.KV_TRANSFER_FAILED


async def test_stopping_answers_what_is_open_and_what_comes_later() -> None:
    puller = Puller()
    async with running(puller) as (handover, answers):
        handover.start_pull(request("open"))
        await until(lambda: puller.writing)
        handover.stop()
        handover.start_pull(request("late"))
        await until(lambda: len(answers.pulls) == 2)
    assert {task for task, _ in answers.pulls} == {"open", "late"}
    assert all(error is not None and error.retryable for _, error in answers.pulls)


async def test_cancelling_an_unknown_pull_does_nothing() -> None:
    async with running(Puller()) as (handover, answers):
        handover.cancel_pull("never", 1)
        await asyncio.sleep(0.01)
    assert answers.pulls == []


async def test_offers_go_to_the_sender_and_their_end_to_the_engine() -> None:
    calls: list[tuple[Any, ...]] = []

    class Sender:
        def offer(self, transfer_id: str) -> float:
            calls.append(("offer", transfer_id))
            return 30.0

        def announce(self, transfer_id: str, first: int, blocks: Sequence[int], tokens: int) -> None:
            calls.append(("announce", transfer_id, first, tuple(blocks), tokens))

        def complete(self, transfer_id: str, tokens: int, payload: bytes) -> None:
            calls.append(("complete", transfer_id, tokens, payload))

        def withdraw(self, transfer_id: str, reason: str) -> None:
            calls.append(("withdraw", transfer_id, reason))

    sender: Any = Sender()
    task: Any = None
    handover, answers = Handover(lambda: sender, Puller()), Answers()
    handover.released("before.1", "expired")  # no engine yet: nobody to tell
    handover.attach(answers)
    assert handover.offer("t.1", task) == 30.0
    handover.announce("t.1", 0, [3, 4], 20)
    handover.complete("t.1", 20, b"token")
    handover.withdraw("t.1", "why")
    handover.released("t.1", "withdrawn")
    assert calls == [
        ("offer", "t.1"),
        ("announce", "t.1", 0, (3, 4), 20),
        ("complete", "t.1", 20, b"token"),
        ("withdraw", "t.1", "why"),
    ]
    assert answers.released == [("t.1", "withdrawn")]


def test_a_pull_without_a_loop_is_refused_at_once() -> None:
    async def make() -> Handover:
        sender: Any = None
        return Handover(lambda: sender, Puller())

    handover = asyncio.run(make())
    with pytest.raises(RuntimeError):
        handover.start_pull(request("t"))
