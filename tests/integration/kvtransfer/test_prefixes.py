"""Cached prefixes that are lent and fetched over the pull protocol (needs loopback)."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvtransfer.errors import TransferError, TransferErrorCode
from kvtransfer.prefixes import Address, PrefixFetcher
from kvtransfer.rates import FIRST_RATES, TransportRates
from tests.support.kv import LAYOUT, SenderHost, block_bytes, receiving, serving

NAMES = [bytes([number]) * 16 for number in range(40)]


class Lender:
    """A cache that holds the first `held` of NAMES in odd blocks."""

    def __init__(self, held: int) -> None:
        self.held = held
        self.host: SenderHost | None = None
        self.blocks = [2 * number + 1 for number in range(held)]
        self.gate: Callable[[], object] = lambda: None
        self.lent = 0

    def __call__(self, identities: Sequence[bytes]) -> tuple[str, int]:
        self.gate()
        first = NAMES.index(identities[0])
        count = min(len(identities), self.held - first)
        if count < 1:
            raise TransferError(TransferErrorCode.NOT_CACHED, "nothing of it is here")
        assert self.host is not None
        self.lent += 1
        transfer_id = f"prefix.{self.lent}"
        self.host.offer_all(transfer_id, self.blocks[first : first + count], count * LAYOUT.block_tokens)
        return transfer_id, count


def address(host: SenderHost) -> Address:
    return (host.address, host.sender.te_id, host.sender.incarnation)


@pytest.mark.parametrize("transport", ["shm", "tcp", "grpc"])
async def test_the_cached_part_of_a_prefix_comes_bit_exact(tmp_path: Path, transport: Any) -> None:
    lender = Lender(30)
    async with (
        serving(tmp_path, lend=lender) as host,
        receiving(tmp_path, transports=transport) as (receiver, pool),
    ):
        lender.host = host
        fetcher = PrefixFetcher(receiver)
        assert fetcher.expected_seconds(address(host), 1) > 0.1, "a first contact costs a handshake"
        blocks = list(range(100, 60, -1))
        rest = block_bytes(pool, blocks[25:])
        came = await fetcher.fetch(
            address(host), NAMES[5:], blocks[:35], asyncio.get_running_loop().time() + 20
        )
        assert came.blocks == 25 and came.transport == transport
        assert block_bytes(pool, blocks[:25]) == block_bytes(host.pool, lender.blocks[5:])
        assert block_bytes(pool, blocks[25:]) == rest
        assert await host.outcome("prefix.1") == "acked"
        assert fetcher.expected_seconds(address(host), 1) < 10


async def test_what_is_not_cached_is_told_as_such_and_the_peer_stays_in_favour(tmp_path: Path) -> None:
    async with serving(tmp_path, lend=Lender(3)) as host, receiving(tmp_path) as (receiver, _):
        fetcher = PrefixFetcher(receiver)
        with pytest.raises(TransferError) as missed:
            await fetcher.fetch(address(host), NAMES[3:5], [1, 2], asyncio.get_running_loop().time() + 20)
        assert missed.value.code is TransferErrorCode.NOT_CACHED
        assert fetcher.expected_seconds(address(host), 1) < math.inf


async def test_a_peer_that_is_gone_is_left_alone_for_a_while(tmp_path: Path) -> None:
    async with receiving(tmp_path) as (receiver, _):
        now = [asyncio.get_running_loop().time()]
        fetcher = PrefixFetcher(receiver, clock=lambda: now[0])
        gone = ("127.0.0.1:1", "te-gone", "x")
        with pytest.raises(TransferError) as lost:
            await fetcher.fetch(gone, NAMES, list(range(40)), now[0] + 20)
        assert lost.value.code is TransferErrorCode.PEER_LOST
        assert fetcher.expected_seconds(gone, 1) == math.inf
        now[0] += 60
        assert fetcher.expected_seconds(gone, 1) < math.inf


async def test_pages_of_another_layout_are_not_cache(tmp_path: Path) -> None:
    other = replace(LAYOUT, dtype="float32" if LAYOUT.dtype != "float32" else "float16")
    async with serving(tmp_path, lend=Lender(3)) as host, receiving(tmp_path, layout=other) as (receiver, _):
        with pytest.raises(TransferError) as refused:
            await PrefixFetcher(receiver).fetch(
                address(host), NAMES[:2], [1, 2], asyncio.get_running_loop().time() + 20
            )
        assert refused.value.code is TransferErrorCode.LAYOUT_MISMATCH
    async with serving(tmp_path) as host, receiving(tmp_path) as (receiver, _):
        with pytest.raises(TransferError) as nothing:
            await PrefixFetcher(receiver).fetch(
                address(host), NAMES[:2], [1, 2], asyncio.get_running_loop().time() + 20
            )
        assert nothing.value.code is TransferErrorCode.NOT_CACHED


async def test_a_transfer_that_nobody_hears_of_is_taken_back(tmp_path: Path) -> None:
    lender = Lender(30)
    entered, gate = threading.Event(), threading.Event()
    lender.gate = lambda: (entered.set(), gate.wait(10))
    async with serving(tmp_path, lend=lender) as host, receiving(tmp_path) as (receiver, _):
        lender.host = host
        deadline = asyncio.get_running_loop().time() + 30
        fetch = asyncio.create_task(
            PrefixFetcher(receiver).fetch(address(host), NAMES, list(range(40)), deadline)
        )
        assert await asyncio.to_thread(entered.wait, 10)
        fetch.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fetch
        await asyncio.sleep(0.2)
        gate.set()
        assert await host.outcome("prefix.1") == "withdrawn"


def test_rates_follow_what_was_measured_and_forget_what_kept_them_from_use() -> None:
    rates = TransportRates()
    first = rates.seconds("tcp", 100 << 20)
    for _ in range(40):
        rates.copied("tcp", 8 << 20, 1.0)
        rates.fetched("tcp", 0.5)
    slow = rates.seconds("tcp", 100 << 20)
    assert slow > 12 and first < 1
    rates.copied("tcp", 1000, 1e-9)
    assert rates.seconds("tcp", 100 << 20) == slow, "small copies say nothing of a rate"
    for _ in range(400):
        rates.declined("tcp")
    assert rates.seconds("tcp", 100 << 20) < 1.2 * first
    assert rates.seconds("new", 0) > 0 and "new" not in FIRST_RATES
