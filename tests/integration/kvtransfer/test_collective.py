"""Reads through groups of torch.distributed: real processes over gloo, and device pages with torch's CPU in
the device's place."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from flowserve.devices.accelerator import DeviceStore
from kvtransfer.errors import TransferError, TransferErrorCode
from kvtransfer.layout import KVLayout
from kvtransfer.pool import HostPool
from kvtransfer.receiver import Receiver
from kvtransfer.transports import collective_serve, pair
from kvtransfer.transports.collective import FRAME_BYTES, CollectiveTransport
from tests.support.kv import SenderProcess, StagedStore, block_bytes, receiving, serving

LAYOUT = KVLayout("model@0001", "float32", block_tokens=32, layers=16, kv_heads=4, head_dim=64)
"""Pages of 1 MiB: eight a frame."""
BLOCKS = 40
TOKENS = LAYOUT.block_tokens
assert FRAME_BYTES // LAYOUT.block_bytes == 8


class Pages(DeviceStore):
    """A device's store over the bytes of a test's pool."""

    def __init__(self, pool: HostPool) -> None:
        flat = torch.frombuffer(pool.pages, dtype=torch.float32)
        super().__init__(pool.layout, flat.view(pool.num_blocks, *pool.layout.shape))


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SenderProcess]:
    folder = tmp_path_factory.mktemp("collective")
    with SenderProcess(folder, layout=LAYOUT, num_blocks=BLOCKS, library="collective") as sender:
        yield sender


def to_receive(**options: Any) -> Any:
    return receiving(None, layout=LAYOUT, num_blocks=BLOCKS, transports="collective", **options)


def pair_of(receiver: Receiver) -> Any:
    (peer,) = receiver.peers._peers.values()
    assert isinstance(peer.transport, CollectiveTransport)
    return peer.transport._end


async def test_frames_of_another_process_arrive_bit_exact_through_one_pair(process: SenderProcess) -> None:
    rng = random.Random(4)
    async with to_receive(te_id="te-one", checksum=True) as (receiver, pool):
        pairs = set()
        for number in range(6):
            count = rng.randint(1, BLOCKS)
            src, dst = rng.sample(range(BLOCKS), count), rng.sample(range(BLOCKS), count)
            rest = [block for block in range(BLOCKS) if block not in dst]
            untouched = block_bytes(pool, rest)
            process.offer_all(f"one-{number}", src, count * TOKENS)
            result = await process.pull(receiver, f"one-{number}", dst, count * TOKENS)
            assert (result.transport, result.bytes) == ("collective", count * LAYOUT.block_bytes)
            assert block_bytes(pool, dst) == process("digest", src)
            assert block_bytes(pool, rest) == untouched
            pairs.add(pair_of(receiver).group)
        assert len(pairs) == 1


async def test_pulls_at_once_share_the_pair_in_turn(process: SenderProcess) -> None:
    async with to_receive(te_id="te-many") as (receiver, pool):
        thirds = [list(range(first, first + 10)) for first in (0, 10, 20)]
        for number, blocks in enumerate(thirds):
            process.offer_all(f"many-{number}", blocks, 10 * TOKENS)
        await asyncio.gather(
            *(process.pull(receiver, f"many-{n}", blocks, 10 * TOKENS) for n, blocks in enumerate(thirds))
        )
        assert block_bytes(pool, range(30)) == process("digest", list(range(30)))


async def test_a_reused_block_reaches_no_pool_and_leaves_the_pair_in_step(process: SenderProcess) -> None:
    blocks = list(range(BLOCKS))
    async with to_receive(te_id="te-moved") as (receiver, pool):
        process.offer_all("moved-0", blocks, BLOCKS * TOKENS)
        await process.pull(receiver, "moved-0", blocks, BLOCKS * TOKENS)
        group = pair_of(receiver).group
        process("offer", "moved-1")
        process("announce", "moved-1", 0, blocks, BLOCKS * TOKENS)
        process("bump", 3)
        process("complete", "moved-1", BLOCKS * TOKENS)
        pool.pages[:] = bytes(len(pool.pages))
        with pytest.raises(TransferError) as raised:
            await process.pull(receiver, "moved-1", blocks, BLOCKS * TOKENS)
        assert raised.value.code is TransferErrorCode.GENERATION_MOVED
        assert not any(pool.pages[:: LAYOUT.head_bytes])
        process.offer_all("moved-2", blocks, BLOCKS * TOKENS)
        await process.pull(receiver, "moved-2", blocks, BLOCKS * TOKENS)
        assert pair_of(receiver).group == group
        assert block_bytes(pool, blocks) == process("digest", blocks)


async def test_a_block_reused_while_its_frame_is_sent_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    blocks = list(range(BLOCKS))
    gather = collective_serve.gather
    async with (
        serving(layout=LAYOUT, num_blocks=BLOCKS, library="collective") as host,
        to_receive() as (receiver, pool),
    ):
        sent = 0

        def reuse(plan: Any, frame: Any) -> torch.Tensor:
            nonlocal sent
            sent += 1
            if sent == 3:
                host.pool.bump(20)
            return gather(plan, frame)

        monkeypatch.setattr(collective_serve, "gather", reuse)
        host.offer_all("t", blocks, BLOCKS * TOKENS)
        with pytest.raises(TransferError) as raised:
            await host.pull(receiver, "t", blocks, BLOCKS * TOKENS)
        assert raised.value.code is TransferErrorCode.GENERATION_MOVED
        assert block_bytes(pool, range(16)) == block_bytes(host.pool, range(16))
        assert not any(pool.pages[16 * LAYOUT.block_bytes :: LAYOUT.head_bytes])
        assert await host.outcome("t") == "aborted"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
async def test_a_sender_that_dies_while_it_sends_is_lost_and_nothing_is_written_any_more(
    tmp_path: Path, number: signal.Signals
) -> None:
    blocks = list(range(0, BLOCKS, 2))  # no two in one run: each is loaded by itself, slowly
    options: dict[str, Any] = {"library": "collective", "staged_delay": 0.05}
    with SenderProcess(tmp_path, layout=LAYOUT, num_blocks=BLOCKS, **options) as sender:
        async with to_receive(peer_timeout=2.5) as (receiver, pool):
            sender.offer_all("t", blocks, len(blocks) * TOKENS)
            pulling = asyncio.create_task(sender.pull(receiver, "t", blocks, len(blocks) * TOKENS))
            await written(pool)
            assert sender.process.pid is not None
            os.kill(sender.process.pid, number)
            with pytest.raises(TransferError) as raised:
                async with asyncio.timeout(20):
                    await pulling
            assert raised.value.code is TransferErrorCode.PEER_LOST
            pool.pages[:] = bytes(len(pool.pages))
            os.kill(sender.process.pid, signal.SIGCONT)
            await asyncio.sleep(0.3)
            assert not any(pool.pages[:: LAYOUT.head_bytes])


async def test_a_cancelled_copy_gives_its_pair_up_and_the_next_one_meets_anew() -> None:
    blocks = list(range(0, BLOCKS, 2))
    async with (
        serving(
            layout=LAYOUT, num_blocks=BLOCKS, library="collective", wrap=lambda pool: StagedStore(pool, 0.02)
        ) as host,
        to_receive() as (receiver, pool),
    ):
        host.offer_all("t", blocks, len(blocks) * TOKENS)
        pulling = asyncio.create_task(host.pull(receiver, "t", blocks, len(blocks) * TOKENS))
        await written(pool)
        pulling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pulling
        assert pair_of(receiver) is None
        assert await host.outcome("t") == "aborted"
        host.offer_all("u", blocks, len(blocks) * TOKENS)
        await host.pull(receiver, "u", blocks, len(blocks) * TOKENS)
        assert block_bytes(pool, blocks) == block_bytes(host.pool, blocks)
        groups = host.service._groups
        assert groups is not None
        assert list(groups._meetings) == [pair_of(receiver).group]
        groups.close()  # as for room, or for a receiver that seemed gone
        host.offer_all("v", blocks[:3], 3 * TOKENS)
        await host.pull(receiver, "v", blocks[:3], 3 * TOKENS)


async def test_device_pages_are_gathered_and_put_where_they_lie() -> None:
    rng = random.Random(9)
    src, dst = rng.sample(range(BLOCKS), 20), rng.sample(range(BLOCKS), 20)
    async with (
        serving(layout=LAYOUT, num_blocks=BLOCKS, library="collective", wrap=Pages) as host,
        to_receive(wrap=Pages, checksum=True) as (receiver, pool),
    ):
        host.offer_all("t", src, 20 * TOKENS)
        await host.pull(receiver, "t", dst, 20 * TOKENS)
        assert block_bytes(pool, dst) == block_bytes(host.pool, src)


@pytest.mark.parametrize("wrap", [lambda pool: pool, Pages], ids=["host", "device"])
async def test_a_rank_receives_its_heads_alone(wrap: Any) -> None:
    rank = KVLayout(
        "model@0001",
        "float32",
        block_tokens=32,
        layers=16,
        kv_heads=2,
        head_dim=64,
        first_head=2,
        total_heads=4,
    )
    async with (
        serving(layout=LAYOUT, num_blocks=BLOCKS, library="collective", wrap=wrap) as host,
        receiving(None, layout=rank, num_blocks=BLOCKS, transports="collective", wrap=wrap) as (
            receiver,
            pool,
        ),
    ):
        blocks = [1, 5, 6, 7, 20]
        host.offer_all("t", blocks, 5 * TOKENS)
        result = await host.pull(receiver, "t", blocks, 5 * TOKENS)
        assert result.bytes == 5 * LAYOUT.block_bytes // 2
        theirs = torch.frombuffer(host.pool.pages, dtype=torch.float32).view(BLOCKS, *LAYOUT.shape)
        ours = torch.frombuffer(pool.pages, dtype=torch.float32).view(BLOCKS, *rank.shape)
        assert torch.equal(
            ours[blocks].view(torch.int32), theirs[blocks][:, :, :, 2:].contiguous().view(torch.int32)
        )


async def test_what_cannot_be_is_refused_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refusal(match: str, **options: Any) -> None:
        async with (
            serving(layout=LAYOUT, num_blocks=BLOCKS, **options) as host,
            to_receive() as (receiver, _pool),
        ):
            host.offer_all("t", [1], TOKENS)
            with pytest.raises(TransferError, match=match):
                await host.pull(receiver, "t", [1], TOKENS)

    await refusal("collective is demanded but: .* does not offer it")
    real, asked = pair.backends, []

    def only_the_sender(store: Any) -> list[str]:
        asked.append(store)
        return real(store) if len(asked) == 1 else ["nccl"]

    monkeypatch.setattr(pair, "backends", only_the_sender)
    await refusal("collective is demanded but: gloo there, nccl here", library="collective")
    monkeypatch.setattr(pair, "backends", lambda store: [])  # a torch without any
    await refusal("collective is demanded but: .* does not offer it", library="collective")
    monkeypatch.setattr(pair, "backends", lambda store: ["nccl"])  # as if there were devices
    await refusal("collective is demanded but: nccl: ", library="collective")


async def written(pool: HostPool) -> None:
    """Waits until the first frame is in place."""
    async with asyncio.timeout(60):
        while not any(pool.pages[: LAYOUT.head_bytes]):
            await asyncio.sleep(0.005)
