"""Pages of one layout put into a pool of another: block size, dtype, and the heads of a rank may differ.

The receiver fetches the sender's pages (of the wanted heads alone) into a small staging pool of the
sender's layout, over whichever transport, and places them from there. So no transport knows of layouts,
and generations are checked before a converted value reaches the pool.

Values are widened exactly; narrowed ones are rounded to the nearest, ties to even. A value that does
not fit the narrower type fails the transfer: attention over infinities would be silently wrong.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from kvtransfer.errors import TransferError, TransferErrorCode
from kvtransfer.layout import DTYPE_BYTES, KVLayout
from kvtransfer.pool import BlockStore
from kvtransfer.runs import align
from kvtransfer.transports.base import Job, Transport, run_quarantined

STAGED_BYTES = 8 << 20
"""Bytes that are staged at a time: enough for a rate near the transport's, small beside a pool (ours)."""

_BITS: dict[int, type[np.unsignedinteger[Any]]] = {2: np.uint16, 4: np.uint32}
Array = npt.NDArray[Any]

_store_lock = threading.Lock()
"""Device pages are read, changed and written back; ranks of one sender share them."""


class Staging:
    """A BlockStore in plain memory that a transport fills and `Reshaper.place` reads."""

    def __init__(self, layout: KVLayout, num_blocks: int) -> None:
        self._layout = layout
        self._num_blocks = num_blocks
        self._pages = memoryview(bytearray(num_blocks * layout.block_bytes))

    @property
    def layout(self) -> KVLayout:
        return self._layout

    @property
    def num_blocks(self) -> int:
        return self._num_blocks

    def generation(self, block: int) -> int:
        return 0

    def bump(self, block: int) -> None:
        """Nobody else reads it."""

    def view(self, start: int, count: int) -> memoryview:
        size = self._layout.block_bytes
        return self._pages[start * size : (start + count) * size]

    def load(self, start: int, count: int) -> bytes:
        return bytes(self.view(start, count))

    def store(self, start: int, data: bytes | bytearray | memoryview) -> None:
        self.view(start, len(data) // self._layout.block_bytes)[:] = data


@dataclass(frozen=True, slots=True)
class Targets:
    """This pool's blocks of a transfer, by index; those before index `first` are not touched."""

    store: BlockStore
    blocks: Sequence[int]
    first: int


class Reshaper:
    """From `theirs` to `ours`, which `KVLayout.check_compatible` has found convertible."""

    def __init__(self, theirs: KVLayout, ours: KVLayout) -> None:
        self._theirs = theirs
        self._ours = ours
        common = ours.common_heads(theirs)
        self.heads = (common.start - theirs.first_head, len(common))
        """(first, count) of the sender's heads that are fetched."""
        self._to = common.start - ours.first_head
        self.staged = KVLayout(
            theirs.model_revision,
            theirs.dtype,
            theirs.block_tokens,
            theirs.layers,
            len(common),
            theirs.head_dim,
        )
        """Layout of what is fetched."""

    def wanted(self, first: int, length: int) -> range:
        """The transfer's blocks, in the sender's count, that hold our blocks from index `first` on, up to
        `length` tokens."""
        start = first * self._ours.block_tokens
        return range(start // self._theirs.block_tokens, self._theirs.blocks_for(max(start, length)))

    def _batches(self, pairs: Sequence[tuple[int, int]]) -> Iterator[Sequence[tuple[int, int]]]:
        """Cuts (index, source block) pairs into what is staged at a time."""
        step = max(1, STAGED_BYTES // self.staged.block_bytes)
        return (pairs[at : at + step] for at in range(0, len(pairs), step))

    async def copy(
        self,
        transport: Transport,
        job: Job,
        pairs: Sequence[tuple[int, int]],
        targets: Targets,
        workers: ThreadPoolExecutor,
    ) -> int:
        """Brings the transfer's blocks `pairs`, (index, source block), to their targets.

        `job` says the rest; its moves and destination are made here, a staging pool at a time. Returns
        the moves. Raises and is quarantined as `Transport.copy`.
        """
        moves = 0
        for some in self._batches(pairs):
            staging = Staging(self.staged, len(some))
            aligned = align([source for _, source in some], range(len(some)))
            await transport.copy(replace(job, moves=aligned, destination=staging, heads=self.heads))
            indices = [index for index, _ in some]
            await run_quarantined(workers, functools.partial(self.place, staging, indices, targets))
            moves += len(aligned)
        return moves

    def place(self, staging: Staging, indices: Sequence[int], targets: Targets) -> None:
        """Puts staged page `i`, the transfer's block `indices[i]`, where its tokens belong. Blocks.

        Raises TransferError for a value that does not fit.
        """
        store, dst_blocks, first = targets.store, targets.blocks, targets.first
        pages = _pages(staging.view(0, len(indices)), self.staged)
        values = convert(pages, self.staged.dtype, self._ours.dtype)
        size, into = self._theirs.block_tokens, self._ours.block_tokens
        for page, index in zip(values, indices, strict=True):
            token, end = max(index * size, first * into), (index + 1) * size
            while token < end and token // into < len(dst_blocks):
                block = token // into
                count = min(end, (block + 1) * into) - token
                part = page[:, :, :, token - index * size : token - index * size + count]
                self._write(store, dst_blocks[block], token - block * into, part)
                token += count

    def _write(self, store: BlockStore, block: int, token: int, part: Array) -> None:
        view = store.view(block, 1)
        if view is not None:
            self._fill(view, token, part)
            return
        with _store_lock:
            page = bytearray(store.load(block, 1))
            self._fill(memoryview(page), token, part)
            store.store(block, page)

    def _fill(self, page: memoryview, token: int, part: Array) -> None:
        heads, tokens = part.shape[2:4]
        _pages(page, self._ours)[0, :, :, self._to : self._to + heads, token : token + tokens] = part


def _pages(data: memoryview, layout: KVLayout) -> Array:
    """Bit patterns of whole pages: (page, layer, K/V, head, token, dim)."""
    return np.frombuffer(data, _BITS[DTYPE_BYTES[layout.dtype]]).reshape(-1, *layout.shape)


def convert(bits: Array, source: str, target: str) -> Array:
    """Bit patterns of `source` numbers as those of `target`. Raises TransferError where one does not fit."""
    if source == target:
        return bits
    values = _widened(bits, source)
    if target == "float32":
        return values.view(np.uint32)
    if target == "float16":
        with np.errstate(over="ignore"):
            narrow: Array = values.astype(np.float16)
        infinite, result = np.isinf(narrow), narrow.view(np.uint16)
    else:
        wide = values.view(np.uint32)
        rounded = (wide + (np.uint32(0x7FFF) + ((wide >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
        # Rounding up the bits of a not-a-number could make another number of it.
        result = np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)
        infinite = (result & 0x7FFF) == 0x7F80
    if (infinite & np.isfinite(values)).any():
        raise TransferError(
            TransferErrorCode.LAYOUT_MISMATCH, f"a {source} value of the sender's pool does not fit {target}"
        )
    return result


def _widened(bits: Array, source: str) -> npt.NDArray[np.float32]:
    if source == "bfloat16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if source == "float16":
        return bits.view(np.float16).astype(np.float32)
    return bits.view(np.float32)
