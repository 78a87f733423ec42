"""The sender's registry: every transfer ends exactly once (needs nothing; time is made up)."""

from __future__ import annotations

import asyncio
import time

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from kvtransfer.errors import TransferError, TransferErrorCode
from kvtransfer.layout import KVLayout
from kvtransfer.pool import HostPool
from kvtransfer.runs import Run
from kvtransfer.sender import Sender

LAYOUT = KVLayout("m@1", "float32", block_tokens=4, layers=1, kv_heads=1, head_dim=2)
LEASE = 10.0
POOL = HostPool.create(LAYOUT, 32, prefault=False)


class Bench:
    """A sender on a clock that is moved by hand."""

    def __init__(self, max_transfers: int = 8) -> None:
        self.now = 0.0
        self.released: list[tuple[str, str]] = []
        self.sender = Sender(
            POOL,
            "te",
            "i",
            lease_seconds=LEASE,
            clock=lambda: self.now,
            on_released=lambda transfer_id, outcome: self.released.append((transfer_id, outcome)),
            max_transfers=max_transfers,
        )

    def offer_all(self, transfer_id: str) -> None:
        self.sender.offer(transfer_id)
        self.sender.announce(transfer_id, 0, [1, 2], 8)
        self.sender.complete(transfer_id, 8)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def code(raised: pytest.ExceptionInfo[TransferError]) -> TransferErrorCode:
    return raised.value.code


def test_an_acknowledged_transfer_is_released_once(bench: Bench) -> None:
    bench.offer_all("a")
    assert bench.sender.finish("a", "r1", ok=True)
    assert not bench.sender.finish("a", "r1", ok=True)
    assert not bench.sender.finish("a", "r1", ok=False)
    bench.sender.withdraw("a", "late")
    bench.now = 1000
    assert bench.sender.reap() == 0
    assert bench.released == [("a", "acked")]


def test_no_lease_runs_while_the_prefill_computes(bench: Bench) -> None:
    bench.sender.offer("a")
    bench.now = 1000
    assert bench.sender.reap() == 0
    bench.sender.announce("a", 0, [1], 4)
    bench.sender.complete("a", 4)
    bench.now = 1000 + LEASE - 0.1
    assert bench.sender.reap() == 0
    bench.now = 1000 + LEASE
    assert bench.sender.reap() == 1
    assert bench.released == [("a", "expired")]


def test_renewals_extend_the_lease_and_a_late_one_is_refused(bench: Bench) -> None:
    bench.offer_all("a")
    for _ in range(5):
        bench.now += LEASE - 1
        assert bench.sender.renew("a", "r1") == LEASE
    bench.now += LEASE + 1
    with pytest.raises(TransferError) as raised:
        bench.sender.renew("a", "r1")
    assert code(raised) is TransferErrorCode.LEASE_EXPIRED
    assert bench.released == [("a", "expired")]


def test_a_second_receiver_is_refused(bench: Bench) -> None:
    bench.offer_all("a")
    bench.sender.claim("a", "r1")
    bench.sender.claim("a", "r1")
    for call in (
        lambda: bench.sender.claim("a", "r2"),
        lambda: bench.sender.renew("a", "r2"),
        lambda: bench.sender.finish("a", "r2", ok=False),
        lambda: bench.sender.check_read("a", "r2", [Run(1, 1)], [0]),
    ):
        with pytest.raises(TransferError) as raised:
            call()
        assert code(raised) is TransferErrorCode.BUSY
    assert bench.released == []


def test_only_announced_blocks_in_their_generation_are_read(bench: Bench) -> None:
    bench.offer_all("a")
    generations = [POOL.generation(1), POOL.generation(2)]
    assert bench.sender.check_read("a", "r1", [Run(1, 2)], generations) is POOL
    for runs, given in (([Run(1, 3)], [*generations, 0]), ([Run(1, 2)], [0]), ([Run(0, 2**31)], generations)):
        with pytest.raises(TransferError) as raised:
            bench.sender.check_read("a", "r1", runs, given)
        assert code(raised) is TransferErrorCode.ABORTED
    with pytest.raises(TransferError) as raised:
        bench.sender.check_read("a", "r1", [Run(1, 2)], [generations[0] + 1, generations[1]])
    assert code(raised) is TransferErrorCode.GENERATION_MOVED


def test_an_incomplete_transfer_cannot_be_acknowledged(bench: Bench) -> None:
    bench.sender.offer("a")
    with pytest.raises(TransferError) as raised:
        bench.sender.finish("a", "r1", ok=True)
    assert code(raised) is TransferErrorCode.ABORTED
    assert bench.released == []


def test_a_receiver_that_gives_up_early_leaves_the_transfer_to_the_next(bench: Bench) -> None:
    bench.sender.offer("a")
    bench.sender.announce("a", 0, [1], 4)
    assert bench.sender.progress("a", "r1", 0, attempt=2).chunks
    assert bench.sender.finish("a", "r1", ok=False, reason="not wanted")
    assert bench.released == []
    assert bench.sender.progress("a", "r2", 0, attempt=1).failure is None
    bench.sender.complete("a", 4, b"token")
    assert bench.sender.progress("a", "r2", 0, attempt=1).payload == b"token"
    assert bench.sender.finish("a", "r2", ok=False)  # complete: now its end is the transfer's
    assert bench.released == [("a", "aborted")]
    bench.sender.withdraw("a", "late")
    progress = bench.sender.progress("a", "r2", 0, attempt=1)
    assert progress.failure is not None and progress.failure.code is TransferErrorCode.ABORTED


def test_a_later_attempt_takes_over_from_a_receiver_that_is_gone(bench: Bench) -> None:
    bench.offer_all("a")
    assert bench.sender.progress("a", "dead", 0, attempt=2).failure is None
    woken: list[str] = []
    bench.sender.subscribe("a", lambda: woken.append("dead"))
    assert bench.sender.progress("a", "same", 0, attempt=2).failure is not None
    assert bench.sender.progress("a", "next", 0, attempt=3).failure is None
    assert woken == ["dead"]
    for late in (
        lambda: bench.sender.finish("a", "dead", ok=False),
        lambda: bench.sender.renew("a", "dead"),
        lambda: bench.sender.claim("a", "dead", 2),
    ):
        with pytest.raises(TransferError) as raised:
            late()
        assert code(raised) is TransferErrorCode.BUSY
    assert bench.sender.finish("a", "next", ok=True)
    assert bench.released == [("a", "acked")]


def test_announcements_that_follow_each_other_are_read_as_one_run(bench: Bench) -> None:
    bench.sender.offer("a")
    bench.sender.announce("a", 0, [4, 5], 8)
    assert bench.sender.progress("a", "r1", 0).seen == 1
    bench.sender.announce("a", 2, [6], 12)
    bench.sender.announce("a", 3, [9], 16)
    late = bench.sender.progress("a", "r1", 0)
    assert (late.seen, [c.runs for c in late.chunks]) == (3, [(Run(4, 3), Run(9, 1))])
    assert (late.chunks[0].first_block, late.chunks[0].tokens, len(late.chunks[0].generations)) == (0, 16, 4)
    assert [c.runs for c in bench.sender.progress("a", "r1", 1).chunks] == [(Run(6, 1), Run(9, 1))]


def test_a_partly_filled_block_may_be_announced_again(bench: Bench) -> None:
    bench.sender.offer("a")
    bench.sender.announce("a", 0, [1, 2], 6)
    bench.sender.announce("a", 1, [2, 3], 12)
    bench.sender.complete("a", 12)
    progress = bench.sender.progress("a", "r1", 0)
    assert [(c.first_block, c.runs, c.tokens) for c in progress.chunks] == [
        (0, (Run(1, 2),), 6),
        (1, (Run(2, 2),), 12),
    ]
    assert (progress.tokens, progress.blocks) == (12, 3)


def test_misuse_is_refused(bench: Bench) -> None:
    bench.sender.offer("a")
    for call in (
        lambda: bench.sender.offer("a"),
        lambda: bench.sender.announce("a", 1, [1], 4),
        lambda: bench.sender.complete("a", 1),
    ):
        with pytest.raises(ValueError):
            call()
    bench.sender.announce("a", 0, [1], 4)
    bench.sender.complete("a", 4)
    with pytest.raises(ValueError):
        bench.sender.announce("a", 1, [2], 8)


def test_transfers_are_bounded() -> None:
    bench = Bench(max_transfers=2)
    bench.sender.offer("a")
    bench.sender.offer("b")
    with pytest.raises(TransferError) as raised:
        bench.sender.offer("c")
    assert code(raised) is TransferErrorCode.BUSY
    bench.sender.withdraw("a", "")
    bench.sender.offer("c")
    assert bench.sender.active == 2


def test_detaching_the_store_withdraws_everything(bench: Bench) -> None:
    bench.offer_all("a")
    bench.sender.offer("b")
    pool_id = bench.sender.pool_id
    bench.sender.detach_store()
    assert sorted(bench.released) == [("a", "withdrawn"), ("b", "withdrawn")]
    with pytest.raises(TransferError):
        bench.sender.offer("c")
    bench.sender.attach_store(POOL)
    assert bench.sender.pool_id not in ("", pool_id)


def test_a_failing_callback_does_not_keep_a_transfer() -> None:
    def fail(_transfer_id: str, _outcome: str) -> None:
        raise RuntimeError("the shell's fault")

    sender = Sender(POOL, "te", "i", on_released=fail)
    sender.offer("a")
    sender.withdraw("a", "")
    assert sender.active == 0


async def test_drain_waits_for_the_last_transfer_or_the_deadline() -> None:
    sender = Sender(POOL, "te", "i", on_released=lambda *_: None)
    assert await sender.drain(None) == 0
    sender.offer("a")
    assert await sender.drain(time.monotonic() + 0.05) == 1
    waiting = asyncio.create_task(sender.drain(time.monotonic() + 5))
    await asyncio.sleep(0)
    await asyncio.to_thread(sender.withdraw, "a", "")
    assert await waiting == 0


class ExactlyOneEnd(RuleBasedStateMachine):
    """Any order of calls from engine, receivers and time: one end each, never after it, none missing."""

    transfers = Bundle("transfers")

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench(max_transfers=6)
        self.count = 0
        self.offered: set[str] = set()
        self.complete: set[str] = set()
        self.expires: dict[str, float] = {}

    @rule(target=transfers)
    def offer(self) -> str:
        transfer_id = f"t{self.count}"
        self.count += 1
        try:
            self.bench.sender.offer(transfer_id)
            self.offered.add(transfer_id)
        except TransferError as error:
            assert error.code is TransferErrorCode.BUSY
            assert self.bench.sender.active == 6
        return transfer_id

    @rule(transfer_id=transfers, tokens=st.integers(1, 20))
    def announce_and_complete(self, transfer_id: str, tokens: int) -> None:
        if transfer_id in self.complete:
            return
        blocks = list(range(LAYOUT.blocks_for(tokens)))
        self.bench.sender.announce(transfer_id, 0, blocks, tokens)
        self.bench.sender.complete(transfer_id, tokens)
        self.complete.add(transfer_id)
        if transfer_id in self.living():
            self.expires[transfer_id] = self.bench.now + LEASE

    @rule(transfer_id=transfers, receiver=st.sampled_from(["r1", "r2"]), ok=st.booleans())
    def finish(self, transfer_id: str, receiver: str, ok: bool) -> None:
        lived = transfer_id in self.living() and not self.overdue(transfer_id)
        try:
            first = self.bench.sender.finish(transfer_id, receiver, ok)
        except TransferError as error:
            assert lived
            assert error.code in (
                TransferErrorCode.BUSY,
                TransferErrorCode.ABORTED,
            )
        else:
            assert first == lived
            if lived and not ok and transfer_id not in self.complete:
                assert transfer_id in self.living()  # given up: the prefill goes on

    @rule(transfer_id=transfers, receiver=st.sampled_from(["r1", "r2"]))
    def renew(self, transfer_id: str, receiver: str) -> None:
        try:
            self.bench.sender.renew(transfer_id, receiver)
        except TransferError:
            return
        assert not self.overdue(transfer_id)
        if transfer_id in self.expires:
            self.expires[transfer_id] = self.bench.now + LEASE

    @rule(transfer_id=transfers)
    def withdraw(self, transfer_id: str) -> None:
        self.bench.sender.withdraw(transfer_id, "over")

    @rule(transfer_id=transfers, receiver=st.sampled_from(["r1", "r2"]), attempt=st.integers(0, 5))
    def watch(self, transfer_id: str, receiver: str, attempt: int) -> None:
        progress = self.bench.sender.progress(transfer_id, receiver, 0, attempt)
        assert progress.failure is None or progress.tokens is None

    @rule(seconds=st.floats(0, 2 * LEASE))
    def wait(self, seconds: float) -> None:
        self.bench.now += seconds

    @rule()
    def reap(self) -> None:
        self.bench.sender.reap()
        assert not any(self.overdue(transfer_id) for transfer_id in self.living())

    def living(self) -> set[str]:
        return self.offered - {transfer_id for transfer_id, _ in self.bench.released}

    def overdue(self, transfer_id: str) -> bool:
        return self.bench.now >= self.expires.get(transfer_id, float("inf"))

    @invariant()
    def each_ends_at_most_once_and_the_rest_is_active(self) -> None:
        ids = [transfer_id for transfer_id, _ in self.bench.released]
        assert len(ids) == len(set(ids))
        assert set(ids) <= self.offered
        assert self.bench.sender.active == len(self.living())

    def teardown(self) -> None:
        for transfer_id in self.living():
            self.bench.sender.withdraw(transfer_id, "teardown")
        assert {transfer_id for transfer_id, _ in self.bench.released} == self.offered
        assert self.bench.sender.active == 0


TestExactlyOneEnd = ExactlyOneEnd.TestCase
TestExactlyOneEnd.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
