"""Ends whose pools differ: block size, dtype, tensor-parallel degree, device (needs loopback)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvtransfer.errors import TransferError, TransferErrorCode
from kvtransfer.layout import KVLayout
from kvtransfer.pool import HostPool
from tests.support.kv import LAYOUT, StagedStore, receiving, serving

HEADS = dataclasses.replace(LAYOUT, kv_heads=4, total_heads=4)
TOKENS = 200


def numbers(pool: HostPool) -> np.ndarray:
    return np.frombuffer(pool.pages, np.float32 if pool.layout.dtype == "float32" else np.float16).reshape(
        pool.num_blocks, *pool.layout.shape
    )


def tokens_of(pool: HostPool, blocks: list[int], count: int) -> np.ndarray:
    """(layer, K/V, head, token, dim) of a transfer's first `count` tokens."""
    pages = numbers(pool)[blocks].transpose(1, 2, 3, 0, 4, 5)
    return pages.reshape(*pages.shape[:3], -1, pages.shape[-1])[:, :, :, :count]


def fill(pool: HostPool) -> None:
    values = np.random.default_rng(3).standard_normal(numbers(pool).shape)
    numbers(pool)[:] = values.astype(np.float16)  # exact in both types


@pytest.mark.parametrize("transport", ["shm", "unix", "tcp", "grpc"])
@pytest.mark.parametrize(
    "change", [{"block_tokens": 32}, {"block_tokens": 6}, {"dtype": "float16"}], ids=["32", "6", "float16"]
)
@pytest.mark.parametrize("device", [False, True], ids=["host", "device"])
async def test_other_block_sizes_and_types_arrive_right(
    tmp_path: Path, transport: Any, change: dict[str, Any], device: bool
) -> None:
    layout = dataclasses.replace(LAYOUT, **change)
    async with (
        serving(tmp_path) as host,
        receiving(
            tmp_path,
            layout=layout,
            wrap=StagedStore if device else lambda pool: pool,
            transports=transport,
            checksum=True,
        ) as (receiver, pool),
    ):
        fill(host.pool)
        src = list(range(100, 113))
        dst = list(range(layout.blocks_for(TOKENS) + 3, 3, -1))[: layout.blocks_for(TOKENS)]
        host.sender.offer("t")
        host.sender.announce("t", 0, src[:5], 5 * 16)  # in two chunks, the second begins within a block
        host.sender.announce("t", 5, src[5:], TOKENS)
        host.sender.complete("t", TOKENS)
        result = await host.pull(receiver, "t", dst, TOKENS, skip_blocks=1)
        assert result.transport == transport
        skipped = layout.block_tokens
        found, expected = tokens_of(pool, dst, TOKENS), tokens_of(host.pool, src, TOKENS)
        assert (found[:, :, :, skipped:] == expected[:, :, :, skipped:]).all()
        assert not found[:, :, :, :skipped].any()
        assert await host.outcome("t") == "acked"


@pytest.mark.parametrize("transport", ["shm", "unix", "tcp", "grpc"])
async def test_two_ranks_fill_one_pool_and_one_pool_fills_two_ranks(tmp_path: Path, transport: Any) -> None:
    def rank(number: int) -> KVLayout:
        return dataclasses.replace(HEADS, kv_heads=2, first_head=2 * number)

    blocks = list(range(13))
    async with (
        serving(tmp_path, layout=rank(0), te_id="te-p0", seed=1) as p0,
        serving(tmp_path, layout=rank(1), te_id="te-p1", seed=2) as p1,
        receiving(tmp_path, layout=HEADS, transports=transport) as (receiver, whole),
    ):
        for host in (p0, p1):
            fill(host.pool)
            host.offer_all("t", blocks, TOKENS)
            await host.pull(receiver, "t", blocks, TOKENS)
        found = tokens_of(whole, blocks, TOKENS)
        for number, host in enumerate((p0, p1)):
            assert (found[:, :, 2 * number : 2 * number + 2] == tokens_of(host.pool, blocks, TOKENS)).all()
    async with (
        serving(tmp_path, layout=HEADS) as host,
        receiving(tmp_path, layout=rank(1), transports=transport) as (receiver, part),
    ):
        fill(host.pool)
        host.offer_all("t", blocks, TOKENS)
        result = await host.pull(receiver, "t", blocks, TOKENS)
        assert result.bytes == 13 * rank(1).block_bytes  # the other rank's heads stay where they are
        assert (tokens_of(part, blocks, TOKENS) == tokens_of(host.pool, blocks, TOKENS)[:, :, 2:]).all()


async def test_a_value_that_does_not_fit_fails_the_transfer(tmp_path: Path) -> None:
    layout = dataclasses.replace(LAYOUT, dtype="float16")
    async with serving(tmp_path) as host, receiving(tmp_path, layout=layout) as (receiver, _pool):
        numbers(host.pool)[:] = 1e6
        host.offer_all("t", [1], 16)
        with pytest.raises(TransferError, match="does not fit float16") as raised:
            await host.pull(receiver, "t", [1], 16)
        assert raised.value.code is TransferErrorCode.LAYOUT_MISMATCH
        assert not raised.value.retryable
        assert await host.outcome("t") == "aborted"
