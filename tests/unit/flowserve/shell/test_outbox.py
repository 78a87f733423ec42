"""Outboxes: a slow gateway loses nothing and gets nothing twice. Needs nothing."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowserve.engine.types import (
    ErrorCode,
    FinishReason,
    KVEvents,
    TaskDelta,
    TaskError,
    TaskTimings,
    TokenLogprobs,
)
from flowserve.shell.outbox import MAX_DELTAS, KVState, Outbox


def delta(task: str = "t", start: int = 0, tokens: tuple[int, ...] = (), **kwargs: object) -> TaskDelta:
    return TaskDelta(task, 1, "owner", start_index=start, tokens=list(tokens), **kwargs)  # type: ignore[arg-type]  # passed through


def merge_all(deltas: Iterable[TaskDelta]) -> list[TaskDelta]:
    """What a gateway that was slow all along is told."""
    outbox = Outbox()
    for item in deltas:
        outbox.add_delta(item)
    return outbox.take_deltas()


# -- deltas --------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    steps=st.lists(
        st.one_of(
            st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), max_size=4),  # (task, new tokens)
            st.integers(1, 20),  # a read of so many values
        ),
        max_size=60,
    ),
    with_logprobs=st.booleans(),
)
def test_any_interleaving_of_steps_and_reads_reassembles_every_task(
    steps: list[list[tuple[int, int]] | int], with_logprobs: bool
) -> None:
    outbox = Outbox()
    sent: dict[str, list[int]] = defaultdict(list)
    got: dict[str, list[int]] = defaultdict(list)
    scores: dict[str, list[int]] = defaultdict(list)
    finished: list[str] = []

    def read(values: int) -> None:
        for item in outbox.take_deltas(values):
            assert item.task_id not in finished, "something followed the last delta"
            if item.tokens:
                assert item.start_index == len(got[item.task_id])
            got[item.task_id].extend(item.tokens)
            scores[item.task_id].extend(entry.token for entry in item.logprobs or ())
            if item.finish is not None:
                finished.append(item.task_id)

    for step in steps:
        if isinstance(step, int):
            read(step)
            continue
        for number, count in step:
            task = f"task-{number}"
            tokens = [len(sent[task]) + i for i in range(count)]
            logprobs = [TokenLogprobs(token, -1.0, 1) for token in tokens] if with_logprobs else None
            item = TaskDelta(
                task,
                1,
                "owner",
                start_index=len(sent[task]) if tokens else 0,
                tokens=tokens,
                logprobs=logprobs,
            )
            outbox.add_delta(item)
            assert item.tokens == tokens, "the engine's object was changed"
            sent[task].extend(tokens)
    for task in sent:
        outbox.add_delta(TaskDelta(task, 1, "owner", finish=FinishReason.STOP))
    while not outbox.empty:
        read(3)
    assert dict(got) == dict(sent)
    assert sorted(finished) == sorted(sent)
    if with_logprobs:
        assert dict(scores) == dict(sent)


def test_merged_deltas_keep_what_is_said_once() -> None:
    timings = TaskTimings(0.1, 0.2, 0.3, 1)
    (merged,) = merge_all(
        [
            delta(cached_tokens=0, prompt_logprobs=[None]),
            delta(start=3, tokens=(7,)),
            delta(start=4, tokens=(8, 9)),
            delta(finish=FinishReason.LENGTH, timings=timings),
        ]
    )
    assert (merged.start_index, merged.tokens, merged.finish) == (3, [7, 8, 9], FinishReason.LENGTH)
    assert (merged.cached_tokens, merged.prompt_logprobs, merged.timings) == (0, [None], timings)


def test_nothing_is_merged_into_an_attempt_that_ended() -> None:
    error = TaskError(ErrorCode.INVALID_ARGUMENT, "is here already")
    ended, refused = merge_all(
        [
            delta(tokens=(1,), finish=FinishReason.STOP),
            delta(finish=FinishReason.ERROR, error=error),
        ]
    )
    assert (ended.finish, ended.error) == (FinishReason.STOP, None)
    assert (refused.finish, refused.error) == (FinishReason.ERROR, error)


def test_a_gap_in_the_tokens_is_not_papered_over() -> None:
    first, second = merge_all([delta(start=0, tokens=(1, 2)), delta(start=5, tokens=(3,))])
    assert (first.start_index, second.start_index) == (0, 5)


def test_attempts_of_a_task_are_kept_apart() -> None:
    old, new = TaskDelta("t", 1, "o", tokens=[1]), TaskDelta("t", 2, "o", tokens=[1])
    assert [item.attempt for item in merge_all([old, new])] == [1, 2]


def test_large_backlogs_are_cut_into_messages() -> None:
    outbox = Outbox()
    for number in range(10):
        outbox.add_delta(delta(f"t{number}", tokens=tuple(range(100))))
    assert len(outbox.take_deltas(values=250)) == 3
    assert len(outbox) == 7


async def test_a_gateway_that_reads_no_refusals_is_not_read_either() -> None:
    outbox = Outbox()
    for number in range(MAX_DELTAS):
        outbox.add_delta(delta(f"t{number}", finish=FinishReason.ERROR))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await outbox.room()
    outbox.take_deltas()
    async with asyncio.timeout(1):
        await outbox.room()


@pytest.mark.parametrize("end", [Outbox.close, Outbox.take_deltas])
async def test_waiters_for_room_are_let_go(end: Callable[[Outbox], object]) -> None:
    outbox = Outbox()
    for number in range(MAX_DELTAS):
        outbox.add_delta(delta(f"t{number}"))
    waiting = asyncio.create_task(outbox.room())
    await asyncio.sleep(0)
    end(outbox)
    async with asyncio.timeout(1):
        await waiting


async def test_the_writer_is_woken_once_for_many_deltas() -> None:
    outbox = Outbox()
    for number in range(5):
        outbox.add_delta(delta(f"t{number}"))
    async with asyncio.timeout(1):
        await outbox.wait(60)
    started = asyncio.get_running_loop().time()
    await outbox.wait(0.02)
    assert asyncio.get_running_loop().time() - started >= 0.015


# -- KV events -----------------------------------------------------------------------------------


def block(number: int) -> bytes:
    return number.to_bytes(16, "little")


class Follower:
    """What a gateway does with the events (controlplane's prefix view)."""

    def __init__(self) -> None:
        self.held: set[bytes] = set()
        self.next: int | None = None

    def apply(self, events: KVEvents) -> None:
        if events.cleared:
            self.held, self.next = set(events.stored), events.sequence
            return
        assert self.next == events.sequence, "a gap reached the gateway"
        self.held = (self.held | set(events.stored)) - set(events.removed)
        self.next = events.sequence + len(events.stored) + len(events.removed)


class Cache:
    """The engine's side: numbered changes, and snapshots of now."""

    def __init__(self) -> None:
        self.held: set[bytes] = set()
        self.next = 1

    def change(self, numbers: list[int]) -> KVEvents:
        """Toggles blocks."""
        blocks = {block(number) for number in numbers}
        events = KVEvents(self.next, stored=sorted(blocks - self.held), removed=sorted(blocks & self.held))
        self.held ^= blocks
        self.next += len(blocks)
        return events

    def snapshot(self) -> KVEvents:
        return KVEvents(self.next, stored=sorted(self.held), cleared=True)


_actions = st.one_of(
    st.tuples(st.just("change"), st.lists(st.integers(0, 12), min_size=1, max_size=5)),
    st.tuples(st.sampled_from(["read", "begin", "finish", "late"]), st.just([0])),
)


@settings(max_examples=300, deadline=None)
@given(actions=st.lists(_actions, max_size=80), backlog=st.integers(1, 30))
def test_a_follower_ends_up_with_exactly_what_the_cache_holds(
    actions: list[tuple[str, list[int]]], backlog: int
) -> None:
    outbox, cache, follower = Outbox(kv_backlog=backlog), Cache(), Follower()
    snapshot: KVEvents | None = None
    late: list[KVEvents] = []  # events on their way from the engine's thread

    def arrive() -> None:
        while late:
            outbox.add_kv(late.pop(0))

    def read() -> None:
        events = outbox.take_kv()
        if events is not None:
            follower.apply(events)

    for action, numbers in actions:
        if action == "change":
            late.append(cache.change(numbers))
        elif action == "late":
            arrive()
        elif action == "read":
            read()
        elif action == "begin" and outbox.kv_state is KVState.NEEDS_SNAPSHOT:
            outbox.begin_snapshot()
            snapshot = cache.snapshot()
        elif action == "finish" and snapshot is not None:
            outbox.finish_snapshot(snapshot)
            snapshot = None
    arrive()
    if snapshot is not None:
        outbox.finish_snapshot(snapshot)
    if outbox.kv_state is KVState.NEEDS_SNAPSHOT:
        outbox.begin_snapshot()
        outbox.finish_snapshot(cache.snapshot())
    while not outbox.empty:
        read()
    assert follower.held == cache.held
    assert follower.next == cache.next


def test_a_backlog_beyond_its_bound_becomes_a_snapshot() -> None:
    outbox, cache = Outbox(kv_backlog=4), Cache()
    outbox.begin_snapshot()
    outbox.finish_snapshot(cache.snapshot())
    outbox.add_kv(cache.change([1, 2, 3]))
    outbox.add_kv(cache.change([4, 5]))
    assert outbox.kv_state is KVState.NEEDS_SNAPSHOT and outbox.take_kv() is None
    assert outbox.kv_reason == "slow_reader"


def test_what_was_removed_and_is_stored_again_needs_its_own_message() -> None:
    outbox, cache = Outbox(), Cache()
    outbox.begin_snapshot()
    outbox.finish_snapshot(cache.snapshot())
    for numbers in ([1, 2], [1], [1], [3]):  # stored, removed, stored again
        outbox.add_kv(cache.change(numbers))
    follower, messages = Follower(), 0
    while (events := outbox.take_kv()) is not None:
        follower.apply(events)
        messages += 1
    assert follower.held == cache.held and messages == 3  # snapshot, and two of changes
