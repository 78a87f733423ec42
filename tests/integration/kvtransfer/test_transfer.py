"""Transfers that succeed: right bytes over every transport (needs loopback and a second process)."""

from __future__ import annotations

import asyncio
import gc
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from prometheus_client import REGISTRY

from kvtransfer.pool import HostPool
from tests.support.kv import LAYOUT, SenderProcess, StagedStore, block_bytes, receiving, serving

BLOCK_TOKENS = LAYOUT.block_tokens
TRANSPORTS = ["shm", "unix", "tcp", "grpc"]


@pytest.fixture(scope="module")
def sender_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[SenderProcess, Path]]:
    folder = tmp_path_factory.mktemp("shm")
    with SenderProcess(folder, num_blocks=256) as process:
        yield process, folder


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_random_block_lists_arrive_bit_exact_while_chunks_are_announced_late(
    sender_process: tuple[SenderProcess, Path], transport: Any
) -> None:
    process, folder = sender_process
    rng = random.Random(transport)
    async with receiving(folder, num_blocks=256, transports=transport, checksum=True) as (receiver, pool):
        for round_ in range(12):
            transfer_id = f"{transport}-{round_}"
            tokens = rng.randint(1, 120 * BLOCK_TOKENS)
            needed = LAYOUT.blocks_for(tokens)
            skip = rng.choice([0, 0, rng.randint(0, needed)])
            src, dst = rng.sample(range(256), needed), rng.sample(range(256), needed)
            if round_ % 2:
                src, dst = sorted(src), sorted(dst)
            before = block_bytes(pool, dst[:skip])
            untouched = [block for block in range(256) if block not in dst]
            rest = block_bytes(pool, untouched)
            process("offer", transfer_id)
            pulling = asyncio.create_task(
                process.pull(receiver, transfer_id, dst, tokens, skip_blocks=skip, deadline=None)
            )
            at = 0
            while at < needed:
                step = rng.randint(1, max(1, needed // 3))
                await asyncio.to_thread(
                    process,
                    "announce",
                    transfer_id,
                    at,
                    src[at : at + step],
                    min(tokens, (at + step) * BLOCK_TOKENS),
                )
                await asyncio.sleep(rng.choice([0, 0.005]))
                at += step
            await asyncio.to_thread(process, "complete", transfer_id, tokens)
            result = await pulling
            assert result.transport == transport
            assert result.bytes == (needed - skip) * LAYOUT.block_bytes
            assert block_bytes(pool, dst[skip:]) == process("digest", src[skip:])
            assert block_bytes(pool, dst[:skip]) == before
            assert block_bytes(pool, untouched) == rest
    async with asyncio.timeout(5):
        while process("active"):
            await asyncio.sleep(0.01)
    assert {outcome for released, outcome in process("released") if released.startswith(transport)} == {
        "acked"
    }


@pytest.mark.parametrize(
    ("transport", "staged"),
    [
        ("shm", "destination"),
        ("unix", "source"),
        ("tcp", "both"),
        ("grpc", "source"),
        ("grpc", "destination"),
        ("grpc", "both"),
    ],
)
async def test_device_memory_goes_through_load_and_store(tmp_path: Path, transport: Any, staged: str) -> None:
    def wrap(end: str) -> Callable[[HostPool], Any]:
        return StagedStore if staged in (end, "both") else lambda pool: pool

    async with (
        serving(tmp_path, wrap=wrap("source")) as host,
        receiving(tmp_path, wrap=wrap("destination"), transports=transport) as (receiver, pool),
    ):
        src, dst = random.Random(3).sample(range(128), 70), list(range(5, 75))
        host.offer_all("t", src, 70 * BLOCK_TOKENS)
        result = await host.pull(receiver, "t", dst, 70 * BLOCK_TOKENS)
        assert result.transport == transport
        assert block_bytes(pool, dst) == block_bytes(host.pool, src)
        assert await host.outcome("t") == "acked"


async def test_one_contiguous_run_is_one_move(tmp_path: Path) -> None:
    async with serving(tmp_path) as host, receiving(tmp_path) as (receiver, _pool):
        host.offer_all("t", range(10, 110), 1600)
        result = await host.pull(receiver, "t", list(range(20, 120)), 1600)
        assert (result.moves, result.transport) == (1, "shm")


async def test_a_watch_may_overtake_its_offer(tmp_path: Path) -> None:
    async with serving(tmp_path) as host, receiving(tmp_path) as (receiver, pool):
        pulling = asyncio.create_task(host.pull(receiver, "t", [9], 3))
        await asyncio.sleep(0.1)
        host.offer_all("t", [4], 3)
        await pulling
        assert block_bytes(pool, [9]) == block_bytes(host.pool, [4])


async def test_a_block_announced_again_is_copied_again(tmp_path: Path) -> None:
    async with serving(tmp_path) as host, receiving(tmp_path) as (receiver, pool):
        host.sender.offer("t")
        host.sender.announce("t", 0, [1, 2], 20)
        pulling = asyncio.create_task(host.pull(receiver, "t", [11, 12, 13], 40))
        await asyncio.sleep(0.1)
        host.pool.store(2, bytes(LAYOUT.block_bytes))  # the next chunk fills the rest of the block
        host.sender.announce("t", 1, [2, 3], 40)
        host.sender.complete("t", 40)
        await pulling
        assert block_bytes(pool, [11, 12, 13]) == block_bytes(host.pool, [1, 2, 3])


async def test_everything_skipped_still_releases_the_sender(tmp_path: Path) -> None:
    async with serving(tmp_path) as host, receiving(tmp_path) as (receiver, _pool):
        host.offer_all("t", [1, 2], 32)
        result = await host.pull(receiver, "t", [1, 2], 32, skip_blocks=2)
        assert (result.bytes, result.moves) == (0, 0)
        assert await host.outcome("t") == "acked"


@pytest.mark.parametrize(("data_listen", "expected"), [(("127.0.0.1", 0), "tcp"), (None, "grpc")])
async def test_executors_without_a_shared_folder_use_the_network(
    tmp_path: Path, data_listen: tuple[str, int] | None, expected: str
) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    theirs.mkdir()
    async with serving(theirs, data_listen=data_listen) as host, receiving(ours) as (receiver, _pool):
        host.offer_all("t", [1], 16)
        assert (await host.pull(receiver, "t", [1], 16)).transport == expected


async def test_a_pool_that_cannot_be_mapped_is_read_over_a_unix_socket(tmp_path: Path) -> None:
    async with serving(tmp_path, wrap=StagedStore) as host, receiving(tmp_path) as (receiver, pool):
        host.offer_all("t", [3, 4], 32)
        assert (await host.pull(receiver, "t", [5, 6], 32)).transport == "unix"
        assert block_bytes(pool, [5, 6]) == block_bytes(host.pool, [3, 4])


async def test_a_folder_that_vanished_falls_back_to_tcp_and_is_counted(tmp_path: Path) -> None:
    def fallbacks() -> list[float]:
        name = "deepflow_kv_transport_fallbacks_total"
        return [
            REGISTRY.get_sample_value(name, {"transport": transport, "reason": "socket"}) or 0.0
            for transport in ("shm", "unix")
        ]

    before = fallbacks()
    async with serving(tmp_path) as host, receiving(tmp_path) as (receiver, _pool):
        for name in os.listdir(tmp_path):
            os.unlink(tmp_path / name)
        host.offer_all("t", [1], 16)
        assert (await host.pull(receiver, "t", [1], 16)).transport == "tcp"
    assert fallbacks() == [count + 1 for count in before]


async def test_a_sender_that_reloaded_is_shaken_hands_with_anew(tmp_path: Path) -> None:
    async with serving(tmp_path) as host, receiving(tmp_path) as (receiver, pool):
        host.offer_all("t0", [1], 16)
        await host.pull(receiver, "t0", [1], 16)
        host.service.detach_store()
        old, host.pool = host.pool, HostPool.create(LAYOUT, 64)
        old.close()
        host.pool.store(1, b"\7" * LAYOUT.block_bytes)
        host.service.attach_store(host.pool)
        host.offer_all("t1", [1], 16)
        result = await host.pull(receiver, "t1", [1], 16)
        assert result.transport == "shm"
        assert block_bytes(pool, [1]) == b"\7" * LAYOUT.block_bytes


async def test_metrics_say_which_transport_carried_what(tmp_path: Path) -> None:
    def sample(name: str, **labels: str) -> float:
        return REGISTRY.get_sample_value(name, labels) or 0.0

    def samples() -> list[float]:
        return [
            sample("deepflow_kv_transfers_total", transport="shm", outcome="ok"),
            sample("deepflow_kv_bytes_total", transport="shm"),
            sample("deepflow_kv_moves_per_transfer_sum", transport="shm"),
            sample("deepflow_kv_active_leases"),
            sample("deepflow_kv_inflight_bytes"),
            sample("deepflow_kv_active_pulls"),
        ]

    before = samples()
    async with serving(tmp_path) as host, receiving(tmp_path) as (receiver, _pool):
        host.offer_all("t", [1, 2, 9], 48)
        await host.pull(receiver, "t", [4, 5, 6], 48)
        await host.outcome("t")
    grown = [after - earlier for earlier, after in zip(before, samples(), strict=True)]
    assert grown == [1, 3 * LAYOUT.block_bytes, 2, 0, 0, 0]


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_nothing_grows_over_200_transfers(tmp_path: Path, transport: Any) -> None:
    process = psutil.Process()
    async with serving(tmp_path) as host, receiving(tmp_path, transports=transport) as (receiver, _pool):
        rng = random.Random(7)

        async def transfers(first: int, count: int) -> None:
            for number in range(first, first + count):
                host.offer_all(f"t{number}", rng.sample(range(128), 40), 640)
                await host.pull(receiver, f"t{number}", rng.sample(range(128), 40), 640)

        await transfers(0, 60)
        gc.collect()
        fds, memory = len(os.listdir("/proc/self/fd")), process.memory_info().rss
        tasks = len(asyncio.all_tasks())
        await transfers(60, 200)
        await host.outcome("t259")
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) <= fds
        async with asyncio.timeout(5):  # the last Finish's tasks end after its outcome
            while len(asyncio.all_tasks()) > tasks:
                await asyncio.sleep(0.01)
        assert process.memory_info().rss - memory < 8 << 20
        assert host.sender.active == 0
