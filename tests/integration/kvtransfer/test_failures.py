"""Transfers that fail: a typed error in bounded time, and nothing left behind (needs real processes)."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from deepflow.v1 import kvtransfer_pb2 as pb
from deepflow.v1 import kvtransfer_pb2_grpc as pb_grpc

from kvtransfer import peers
from kvtransfer.auth import TokenAuth, call_metadata
from kvtransfer.channel import open_channel
from kvtransfer.errors import TransferError, TransferErrorCode, TransportUnavailable
from kvtransfer.pool import HostPool
from kvtransfer.receiver import Receiver
from kvtransfer.shm import request_pool
from tests.support.kv import LAYOUT, TOKEN, SenderProcess, StagedStore, block_bytes, receiving, serving

Code = TransferErrorCode
TRANSPORTS = ["shm", "unix", "tcp", "grpc"]
ALL_BLOCKS = list(range(128))
ALL_TOKENS = 128 * LAYOUT.block_tokens


async def failing(pull: Coroutine[Any, Any, Any], *codes: TransferErrorCode) -> TransferError:
    with pytest.raises(TransferError) as raised:
        await pull
    assert raised.value.code in codes, raised.value
    return raised.value


async def until(condition: Callable[[], object], seconds: float = 5.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


# -- a sender that dies or hangs -----------------------------------------------------------------


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_sender_killed_while_it_prefills_is_lost_at_once(tmp_path: Path, transport: Any) -> None:
    with SenderProcess(tmp_path) as process:
        async with receiving(tmp_path, transports=transport) as (receiver, _pool):
            process("offer", "t")
            process("announce", "t", 0, [1, 2, 3], 48)
            pulling = asyncio.create_task(process.pull(receiver, "t", [1, 2, 3, 4], 64))
            await asyncio.sleep(0.2)
            process.kill()
            started = time.monotonic()
            await failing(pulling, Code.PEER_LOST)
            assert time.monotonic() - started < 2
            assert receiver.active == 0


async def test_a_sender_killed_while_it_is_read_is_lost_at_once(tmp_path: Path) -> None:
    with SenderProcess(tmp_path, staged_delay=0.5) as process:
        async with receiving(tmp_path, num_blocks=128) as (receiver, _pool):
            process.offer_all("t", ALL_BLOCKS, ALL_TOKENS)
            pulling = asyncio.create_task(process.pull(receiver, "t", ALL_BLOCKS, ALL_TOKENS))
            await asyncio.sleep(0.25)
            assert not pulling.done()
            process.kill()
            started = time.monotonic()
            await failing(pulling, Code.PEER_LOST)
            assert time.monotonic() - started < 2
            await failing(process.pull(receiver, "t2", [1], 16), Code.PEER_LOST)


async def test_a_stopped_sender_is_lost_within_the_peer_timeout(tmp_path: Path) -> None:
    with SenderProcess(tmp_path) as process:
        async with receiving(tmp_path, peer_timeout=1.0) as (receiver, _pool):
            process("offer", "t")
            pulling = asyncio.create_task(process.pull(receiver, "t", [1], 16))
            await asyncio.sleep(0.2)
            os.kill(process.process.pid or 0, signal.SIGSTOP)
            started = time.monotonic()
            await failing(pulling, Code.PEER_LOST)
            assert time.monotonic() - started < 2
            process.kill()


async def test_nobody_at_the_address_is_a_lost_peer(tmp_path: Path) -> None:
    async with receiving(tmp_path) as (receiver, _pool):
        started = time.monotonic()
        await failing(receiver.pull("127.0.0.1:1", "te-p", "p1", "t", [1], 16), Code.PEER_LOST)
        assert time.monotonic() - started < 2


async def test_another_incarnation_at_the_address_is_a_lost_peer(tmp_path: Path) -> None:
    async with serving(tmp_path) as host, receiving(tmp_path) as (receiver, _pool):
        error = await failing(receiver.pull(host.address, "te-p", "p0", "t", [1], 16), Code.PEER_LOST)
        assert "te-p/p1 answers there" in error.message


# -- reused blocks, leases, deadlines ------------------------------------------------------------


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_blocks_reused_before_the_copy_are_noticed(tmp_path: Path, transport: Any) -> None:
    async with serving(tmp_path) as host, receiving(tmp_path, transports=transport) as (receiver, _pool):
        host.offer_all("t", [1, 2, 3], 48)
        host.pool.bump(2)
        await failing(host.pull(receiver, "t", [1, 2, 3], 48), Code.GENERATION_MOVED)
        assert await host.outcome("t") == "aborted"


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_blocks_reused_during_the_copy_never_corrupt_silently(tmp_path: Path, transport: Any) -> None:
    """The destination is slow; its first store makes the sender reuse the last block."""
    async with serving(tmp_path) as host:

        class Trap(StagedStore):
            def store(self, start: int, data: bytes | bytearray | memoryview) -> None:
                if not self.stores:
                    host.pool.bump(127)
                    host.pool.store(127, bytes(LAYOUT.block_bytes))
                super().store(start, data)

        layout = LAYOUT
        async with receiving(tmp_path, layout=layout, wrap=Trap, transports=transport) as (receiver, pool):
            host.offer_all("t", ALL_BLOCKS, ALL_TOKENS)
            good = block_bytes(host.pool, ALL_BLOCKS)
            (result,) = await asyncio.gather(
                host.pull(receiver, "t", ALL_BLOCKS, ALL_TOKENS), return_exceptions=True
            )
            if isinstance(result, TransferError):
                assert result.code is Code.GENERATION_MOVED
                assert await host.outcome("t") == "aborted"
            else:  # every byte had left the sender before: then they are the old ones
                assert transport != "shm"
                assert block_bytes(pool, ALL_BLOCKS) == good


async def test_blocks_reused_between_the_pieces_of_a_read_are_noticed(tmp_path: Path) -> None:
    reads = 0

    class Trap(StagedStore):
        def load(self, start: int, count: int) -> bytearray:
            nonlocal reads
            reads += 1
            if reads == 1:
                self.pool.bump(start + count - 1)
            return super().load(start, count)

    async with serving(tmp_path, wrap=Trap) as host, receiving(tmp_path) as (receiver, _pool):
        host.offer_all("t", ALL_BLOCKS, ALL_TOKENS)
        await failing(host.pull(receiver, "t", ALL_BLOCKS, ALL_TOKENS), Code.GENERATION_MOVED)


async def test_a_lease_that_ran_out_releases_and_is_told(tmp_path: Path) -> None:
    async with serving(tmp_path, lease_seconds=0.2) as host, receiving(tmp_path) as (receiver, _pool):
        host.offer_all("t", [1], 16)
        assert await host.outcome("t") == "expired"
        error = await failing(host.pull(receiver, "t", [1], 16), Code.LEASE_EXPIRED)
        assert "0.2 s" in error.message
        assert host.released == [("t", "expired")]


async def test_a_slow_receiver_keeps_its_lease(tmp_path: Path) -> None:
    async with (
        serving(tmp_path, lease_seconds=0.3) as host,
        receiving(
            tmp_path, wrap=lambda pool: StagedStore(pool, 0.9), lease_seconds=0.3, transports="shm"
        ) as (receiver, pool),
    ):
        host.offer_all("t", [1, 2], 32)
        await host.pull(receiver, "t", [3, 4], 32)
        assert block_bytes(pool, [3, 4]) == block_bytes(host.pool, [1, 2])
        assert await host.outcome("t") == "acked"


async def test_a_deadline_ends_a_pull_and_leaves_a_running_prefill_to_the_next(tmp_path: Path) -> None:
    async with serving(tmp_path) as host, receiving(tmp_path) as (receiver, pool):
        host.sender.offer("t")
        started = time.monotonic()
        await failing(host.pull(receiver, "t", [1], 16, deadline=started + 0.2, attempt=2), Code.DEADLINE)
        assert time.monotonic() - started < 1
        await asyncio.sleep(0.2)  # its Finish arrives
        assert host.released == [] and host.sender.active == 1
        host.sender.announce("t", 0, [1], 16)
        host.sender.complete("t", 16)
        await host.pull(receiver, "t", [5], 16, attempt=3)
        assert block_bytes(pool, [5]) == block_bytes(host.pool, [1])
        assert await host.outcome("t") == "acked"


async def test_a_killed_receivers_transfer_is_taken_over_by_the_next_attempt(tmp_path: Path) -> None:
    """Nobody says that the first receiver is gone: its claim must not keep the second one out."""
    async with (
        serving(tmp_path) as host,
        receiving(tmp_path) as (first, _),
        receiving(tmp_path, te_id="te-other") as (second, pool),
    ):
        host.sender.offer("t")
        host.sender.announce("t", 0, [1], 16)
        pulling = asyncio.create_task(host.pull(first, "t", [1, 2], 32, attempt=2))
        await asyncio.sleep(0.1)
        late = asyncio.create_task(host.pull(second, "t", [8, 9], 32, attempt=3))
        await failing(pulling, Code.BUSY)
        host.sender.announce("t", 1, [2], 32)
        host.sender.complete("t", 32, b"state")
        assert (await late).payload == b"state"
        assert block_bytes(pool, [8, 9]) == block_bytes(host.pool, [1, 2])
        assert await host.outcome("t") == "acked"


async def test_a_deadline_in_the_past_still_frees_the_sender(tmp_path: Path) -> None:
    async with serving(tmp_path) as host, receiving(tmp_path) as (receiver, _pool):
        host.offer_all("t", [1], 16)
        await failing(host.pull(receiver, "t", [1], 16, deadline=time.monotonic() - 1), Code.DEADLINE)
        assert await host.outcome("t") == "aborted"


# -- cancelling ----------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_cancelled_pull_returns_only_when_nothing_writes(tmp_path: Path, transport: Any) -> None:
    stores: list[StagedStore] = []

    def slow(pool: HostPool) -> StagedStore:
        stores.append(StagedStore(pool, 0.3))
        return stores[0]

    async with (
        serving(tmp_path) as host,
        receiving(tmp_path, wrap=slow, transports=transport) as (receiver, pool),
    ):
        host.offer_all("t", ALL_BLOCKS, ALL_TOKENS)
        pulling = asyncio.create_task(host.pull(receiver, "t", ALL_BLOCKS, ALL_TOKENS))
        await until(lambda: stores[0].storing)
        pulling.cancel()
        await asyncio.sleep(0.02)
        pulling.cancel()  # impatient callers get no exception from the quarantine
        with pytest.raises(asyncio.CancelledError):
            await pulling
        assert stores[0].storing == 0
        after = bytes(pool.pages)
        assert await host.outcome("t") == "aborted"
        await asyncio.sleep(0.4)
        assert bytes(pool.pages) == after
        assert receiver.active == 0


async def test_a_withdrawn_transfer_is_told_with_its_reason(tmp_path: Path) -> None:
    async with serving(tmp_path) as host, receiving(tmp_path) as (receiver, _pool):
        host.sender.offer("t")
        pulling = asyncio.create_task(host.pull(receiver, "t", [1], 16))
        await asyncio.sleep(0.1)
        await asyncio.to_thread(host.sender.withdraw, "t", "the client went away")
        error = await failing(pulling, Code.ABORTED)
        assert "the client went away" in error.message
        assert host.released == [("t", "withdrawn")]


async def test_detaching_the_pool_ends_pulls_with_an_error(tmp_path: Path) -> None:
    async with serving(tmp_path) as host, receiving(tmp_path) as (receiver, _pool):
        host.sender.offer("t")
        pulling = asyncio.create_task(host.pull(receiver, "t", [1], 16))
        await asyncio.sleep(0.1)
        await receiver.detach_store()
        await failing(pulling, Code.ABORTED)
        await failing(host.pull(receiver, "t", [1], 16), Code.INTERNAL)
        assert host.released == [] and host.sender.active == 1  # the prefill computes on


# -- refusals ------------------------------------------------------------------------------------


async def test_a_mismatched_layout_is_refused_with_every_reason_and_released(tmp_path: Path) -> None:
    other = dataclasses.replace(LAYOUT, layers=3, head_dim=16, specs=())
    async with serving(tmp_path) as host, receiving(tmp_path, layout=other) as (receiver, _pool):
        host.offer_all("t", [1], 16)
        error = await failing(host.pull(receiver, "t", [1], 16), Code.LAYOUT_MISMATCH)
        assert "layers 2 here, 3 there; head_dim 8 here, 16 there" in error.message
        assert not error.retryable
        assert await host.outcome("t") == "aborted"


async def test_an_unknown_transfer_fails_after_the_grace(tmp_path: Path) -> None:
    async with serving(tmp_path, watch_grace=0.1) as host, receiving(tmp_path) as (receiver, _pool):
        started = time.monotonic()
        await failing(host.pull(receiver, "nothing", [1], 16), Code.UNKNOWN_TRANSFER)
        assert time.monotonic() - started < 1


async def test_a_transfer_has_one_receiver(tmp_path: Path) -> None:
    async with (
        serving(tmp_path) as host,
        receiving(tmp_path) as (first, _),
        receiving(tmp_path, te_id="te-other") as (second, _),
    ):
        host.sender.offer("t")
        pulling = asyncio.create_task(host.pull(first, "t", [1], 16))
        await asyncio.sleep(0.1)
        await failing(host.pull(second, "t", [1], 16), Code.BUSY)
        await asyncio.sleep(0.1)  # its Finish must not end the first one's transfer
        host.sender.announce("t", 0, [1], 16)
        host.sender.complete("t", 16)
        await pulling
        assert await host.outcome("t") == "acked"
        await failing(host.pull(second, "t", [1], 16), Code.UNKNOWN_TRANSFER)


async def test_a_transfer_shorter_than_needed_is_an_error(tmp_path: Path) -> None:
    async with serving(tmp_path) as host, receiving(tmp_path) as (receiver, _pool):
        host.offer_all("t", [1], 16)
        await failing(host.pull(receiver, "t", [1, 2], 17), Code.ABORTED)


async def test_pulls_beyond_the_bounds_are_refused(tmp_path: Path) -> None:
    async with (
        serving(tmp_path) as host,
        receiving(tmp_path, max_pulls=1, max_waiting=1) as (receiver, _pool),
    ):
        for name in "ab":
            host.sender.offer(name)
        host.offer_all("c", [2], 16)
        running = [asyncio.create_task(host.pull(receiver, name, [1], 16)) for name in "ab"]
        await asyncio.sleep(0.1)
        await failing(host.pull(receiver, "c", [1], 16), Code.BUSY)
        assert await host.outcome("c") == "aborted"
        for task in running:
            task.cancel()
        await asyncio.wait(running)
        assert receiver.active == 0


async def test_senseless_arguments_are_the_callers_error(tmp_path: Path) -> None:
    async with serving(tmp_path) as host, receiving(tmp_path) as (receiver, _pool):
        for dst, length, skip in (([1], 17, 0), ([1], 0, 0), ([1], 16, -1)):
            with pytest.raises(ValueError):
                await host.pull(receiver, "t", dst, length, skip_blocks=skip)


# -- credentials and the raw protocol ------------------------------------------------------------


@pytest.fixture
async def raw(tmp_path: Path) -> AsyncIterator[tuple[Any, pb_grpc.KVTransferStub]]:
    async with serving(tmp_path) as host, open_channel(host.address) as channel:
        yield host, pb_grpc.KVTransferStub(channel)


async def test_a_wrong_token_is_refused_everywhere(tmp_path: Path) -> None:
    async with serving(tmp_path) as host, receiving(tmp_path, token="wrong") as (receiver, _pool):
        host.offer_all("t", [1], 16)
        error = await failing(host.pull(receiver, "t", [1], 16), Code.INTERNAL)
        assert "cluster token" in error.message
        (socket,) = (path for path in tmp_path.iterdir() if not path.name.endswith(".data.sock"))
        with pytest.raises(TransportUnavailable, match="wrong cluster token"):
            await request_pool(socket, "p1", "wrong")
        with pytest.raises(TransportUnavailable, match="another incarnation"):
            await request_pool(socket, "p2", TOKEN)
        assert host.released == []


async def test_calls_without_token_or_with_another_protocol_are_refused(raw: Any) -> None:
    _host, stub = raw
    for metadata, expected in (
        ((), grpc.StatusCode.UNAUTHENTICATED),
        ((("authorization", f"Basic {TOKEN}"),), grpc.StatusCode.UNAUTHENTICATED),
        (
            (("authorization", f"Bearer {TOKEN}"), ("x-deepflow-protocol", "99")),
            grpc.StatusCode.FAILED_PRECONDITION,
        ),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.Renew(pb.RenewRequest(), metadata=metadata)
        assert raised.value.code() is expected
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            async for _ in stub.Watch(pb.WatchRequest(), metadata=metadata):
                pass
        assert raised.value.code() is expected


def test_an_empty_cluster_token_is_no_token() -> None:
    with pytest.raises(ValueError):
        TokenAuth("")


async def test_finish_is_idempotent_and_generated_stubs_speak_the_protocol(raw: Any) -> None:
    host, stub = raw
    host.offer_all("t", [1, 2], 32)
    metadata = call_metadata(TOKEN)
    updates = [
        update.WhichOneof("update")
        async for update in stub.Watch(pb.WatchRequest(transfer_id="t", receiver="x/1"), metadata=metadata)
    ]
    assert updates == ["chunk", "complete"]
    read = pb.ReadRequest(
        transfer_id="t",
        receiver="x/1",
        runs=[pb.BlockRun(start=1, count=2)],
        generations=[0, 0],
        checksum=True,
    )
    data = b"".join([chunk.data async for chunk in stub.Read(read, metadata=metadata, timeout=5)])
    assert data == block_bytes(host.pool, [1, 2])
    finish = pb.FinishRequest(transfer_id="t", receiver="x/1", ok=True)
    assert (await stub.Finish(finish, metadata=metadata)).first
    assert not (await stub.Finish(finish, metadata=metadata)).first
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await stub.Renew(pb.RenewRequest(transfer_id="t", receiver="x/1"), metadata=metadata)
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND
    assert host.released == [("t", "acked")]


async def test_a_read_needs_a_deadline_and_announced_blocks(raw: Any) -> None:
    host, stub = raw
    host.offer_all("t", [1], 16)
    read = pb.ReadRequest(
        transfer_id="t", receiver="x/1", runs=[pb.BlockRun(start=2, count=1)], generations=[0]
    )
    for timeout, expected in ((None, grpc.StatusCode.INVALID_ARGUMENT), (5, grpc.StatusCode.ABORTED)):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            async for _ in stub.Read(read, metadata=call_metadata(TOKEN), timeout=timeout):
                pass
        assert raised.value.code() is expected


async def test_idle_peers_beyond_the_bound_are_closed(tmp_path: Path) -> None:
    async with (
        serving(tmp_path, te_id="te-a") as a,
        serving(tmp_path, te_id="te-b") as b,
        serving(tmp_path, te_id="te-c") as c,
        receiving(tmp_path, max_peers=2) as (receiver, _pool),
    ):
        for round_ in range(2):
            for host in (a, b, c):
                host.offer_all(f"t{round_}", [1], 16)
                await host.pull(receiver, f"t{round_}", [1], 16)
                await host.outcome(f"t{round_}")
        assert len(receiver.peers) == 2


def mapped_pools() -> int:
    """KV pools that this process maps, its own included."""
    return sum("memfd:deepflow-kv" in line for line in Path("/proc/self/maps").read_text().splitlines())


@pytest.mark.parametrize("how", ["killed", "retired"])
async def test_the_memory_of_a_peer_that_is_gone_is_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(peers, "SWEEP_SECONDS", 0.05)
    async with serving(tmp_path, te_id="te-stays") as stays, receiving(tmp_path) as (receiver, _pool):
        stays.offer_all("s", [1], 16)
        await stays.pull(receiver, "s", [1], 16)
        before = mapped_pools()
        if how == "killed":
            with SenderProcess(tmp_path) as process:
                process.offer_all("t", [1], 16)
                assert (await process.pull(receiver, "t", [1], 16)).transport == "shm"
                assert mapped_pools() == before + 1
                process.kill()
                async with asyncio.timeout(10):
                    while mapped_pools() > before:
                        gc.collect()
                        await asyncio.sleep(0.05)
        else:
            async with serving(tmp_path, te_id="te-goes") as goes:
                goes.offer_all("t", [1], 16)
                await goes.pull(receiver, "t", [1], 16)
                assert len(receiver.peers) == 2
                goes.service.detach_store()
                goes.pool.close()
                async with asyncio.timeout(10):
                    while len(receiver.peers) == 2:
                        await asyncio.sleep(0.05)
        await asyncio.sleep(0.3)  # one that lives is kept
        assert receiver.transport_to(stays.address, "te-stays", "p1") == "shm"


async def test_a_receiver_that_closes_leaves_no_task(tmp_path: Path) -> None:
    async with serving(tmp_path) as host:
        before = asyncio.all_tasks()
        pool = HostPool.create(LAYOUT, 8)
        receiver = Receiver(pool, "te-d", "d1", token=TOKEN, shm_dir=tmp_path)
        host.offer_all("t", [1], 16)
        await host.pull(receiver, "t", [1], 16)
        await receiver.close()
        await receiver.close()
        assert {t for t in asyncio.all_tasks() - before if t.get_name().startswith("kv-")} == set()
        assert host.released == [("t", "acked")]
        pool.close()


async def test_bytes_in_flight_are_bounded(tmp_path: Path) -> None:
    """One page at a time: ten pulls at once are ten copies after each other, and all of them arrive."""
    async with (
        serving(tmp_path) as host,
        receiving(
            tmp_path, max_inflight_bytes=LAYOUT.block_bytes, wrap=lambda pool: StagedStore(pool, 0.01)
        ) as (receiver, pool),
    ):
        for number in range(10):
            host.offer_all(f"t{number}", [number], 16)
        pulls = [host.pull(receiver, f"t{number}", [number + 50], 16) for number in range(10)]
        running = asyncio.gather(*pulls)
        most = 0
        while not running.done():
            most = max(most, receiver._budget.used)
            await asyncio.sleep(0.001)
        assert 0 < most <= LAYOUT.block_bytes
        assert block_bytes(pool, range(50, 60)) == block_bytes(host.pool, range(10))
