"""Checksums of whole blocks, from the sender's pool to the receiver's, for transports that have none.

The sender tells them with an announcement (`kvtransfer.service`), the receiver compares what it copied
(`kvtransfer.receiver`). They cover what generations do not: bytes that changed without a new owner.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from kvtransfer.errors import TransferError, TransferErrorCode
from kvtransfer.pool import BlockStore
from kvtransfer.runs import blocks_of
from kvtransfer.sender import Chunk

UNCHECKED = ("shm", "nixl", "mooncake")
"""Transports without a checksum of their own."""


def checksums(store: BlockStore, chunk: Chunk, tokens: int | None) -> list[int]:
    """Of each block that is full with `tokens` tokens of its transfer, 0 for others; None: of all blocks.

    Blocks the thread: a device's pages are copied to the host. A block that is reused meanwhile has
    another generation by then, which the copy notices.
    """
    full = None if tokens is None else tokens // store.layout.block_tokens - chunk.first_block
    return [
        _checksum(store, block) if full is None or at < full else 0
        for at, block in enumerate(blocks_of(chunk.runs))
    ]


def compare(store: BlockStore, blocks: Sequence[int], expected: Sequence[int]) -> None:
    """Blocks the thread, as `checksums`. Raises TransferError(CHECKSUM)."""
    for block, wanted in zip(blocks, expected, strict=True):
        if wanted and _checksum(store, block) != wanted:
            raise TransferError(TransferErrorCode.CHECKSUM, f"block {block} changed on the way")


def _checksum(store: BlockStore, block: int) -> int:
    """CRC-32 of a block's bytes, plus 2^32 so that none is 0."""
    view = store.view(block, 1)
    return zlib.crc32(store.load(block, 1) if view is None else view) | 1 << 32
