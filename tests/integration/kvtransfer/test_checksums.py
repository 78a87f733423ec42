"""Checksums over shared memory: told by the sender with its announcements, compared after the copy."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from kvtransfer.errors import TransferError, TransferErrorCode
from kvtransfer.transports import shm
from tests.support.kv import LAYOUT, StagedStore, block_bytes, receiving, serving

BLOCKS = list(range(3, 63, 2))
TOKENS = len(BLOCKS) * LAYOUT.block_tokens


@pytest.mark.parametrize("staged", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("checksum", [True, False])
async def test_a_bit_that_changed_in_the_copy_is_noticed_where_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checksum: bool, staged: bool
) -> None:
    wrap: Any = StagedStore if staged else lambda pool: pool
    copy = shm.copy_pieces

    def damage(target: memoryview, *rest: Any) -> int:
        copied = copy(target, *rest)
        target[7 if staged else BLOCKS[5] * LAYOUT.block_bytes + 7] ^= 4
        return copied

    monkeypatch.setattr(shm, "copy_pieces", damage)
    async with (
        serving(tmp_path) as host,
        receiving(tmp_path, transports="shm", checksum=checksum, wrap=wrap) as (receiver, _pool),
    ):
        host.offer_all("t", BLOCKS, TOKENS)
        if not checksum:
            await host.pull(receiver, "t", BLOCKS, TOKENS)
            return
        with pytest.raises(TransferError, match="changed on the way") as raised:
            await host.pull(receiver, "t", BLOCKS, TOKENS)
        assert raised.value.code is TransferErrorCode.CHECKSUM
        assert await host.outcome("t") == "aborted"


async def test_a_block_that_is_filled_while_it_is_copied_counts_when_it_is_full(tmp_path: Path) -> None:
    async with (
        serving(tmp_path) as host,
        receiving(tmp_path, transports="shm", checksum=True) as (receiver, pool),
    ):
        host.sender.offer("t")
        pulling = asyncio.create_task(host.pull(receiver, "t", [8, 9, 10], 2 * LAYOUT.block_tokens + 3))
        for tokens in range(4, 2 * LAYOUT.block_tokens + 4, 5):
            first = (tokens - 1) // LAYOUT.block_tokens
            host.sender.announce("t", first, [20 + first], tokens)
            await asyncio.sleep(0.01)
            host.pool.view(20 + first, 1)[tokens % LAYOUT.block_bytes] ^= 255  # the next tokens of the block
        host.sender.announce("t", 0, [20, 21, 22], 2 * LAYOUT.block_tokens + 3)
        host.sender.complete("t", 2 * LAYOUT.block_tokens + 3)
        await pulling
        assert block_bytes(pool, [8, 9, 10]) == block_bytes(host.pool, [20, 21, 22])
