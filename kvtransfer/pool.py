"""A pool of KV pages in memory that another process on the host can map read-only.

`flowserve.devices` computes in it (a tensor over `HostPool.pages`), the cache (`flowserve.rtc`)
numbers its blocks and bumps their generations, the sender announces blocks out of it, and a peer
that was passed the descriptor copies straight from it (DistFlow/FlowKV: same-host pipeline).

Memory file:  header page | generation table, uint64 per block | pages, C order, page-aligned

Generations are the safety of one-sided copies. The owner bumps a block's generation *before* its
content may change from what was announced; a reader compares the announced generation before and
after its copy. A fence on both sides keeps that order on weakly ordered CPUs (aarch64).
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import struct
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from kvtransfer.layout import KVLayout
from kvtransfer.native import populate_read, populate_write

MAGIC = b"DFKVPOOL"
HEADER_VERSION = 1
PAGE = mmap.PAGESIZE
_HEADER = struct.Struct("<8sII32sQQQQ")  # magic, version, retired, digest, blocks, block bytes, 2 offsets
_RETIRED_OFFSET = 12
F_ADD_SEALS, F_GET_SEALS = 1033, 1034
F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_FUTURE_WRITE = 0x2, 0x4, 0x10  # linux/fcntl.h

PREFAULT_SLICE_BYTES = 16 << 20
"""Taken between two looks at whether to stop (ours): about 5 ms."""

_fence_lock = threading.Lock()


def fence() -> None:
    """A full memory barrier: a release followed by an acquire of a lock orders all accesses around it."""
    with _fence_lock:
        pass
    with _fence_lock:
        pass


class PoolError(Exception):
    """A pool cannot be created, or a memory file is not the pool it should be."""


class BlockStore(Protocol):
    """What transfers ask of a pool. Two implementations: HostPool here, device pools in `flowserve.devices`.

    Blocks are numbered from 0. Methods may be called from any thread; `load` and `store` may block
    (device copies) and are called on worker threads for stores whose `view` returns None.
    """

    @property
    def layout(self) -> KVLayout: ...

    @property
    def num_blocks(self) -> int: ...

    def generation(self, block: int) -> int:
        """Counts the changes of the block's content since the pool was made."""
        ...

    def view(self, start: int, count: int) -> memoryview | None:
        """`count` blocks from `start` as host memory without a copy; None where memory is a device's."""
        ...

    def load(self, start: int, count: int) -> bytes | bytearray | memoryview:
        """A copy of `count` blocks from `start`, `count * layout.block_bytes` bytes."""
        ...

    def store(self, start: int, data: bytes | bytearray | memoryview) -> None:
        """Writes whole blocks from `start` on; `data` holds a multiple of `layout.block_bytes` bytes."""
        ...

    def bump(self, block: int) -> None:
        """Content of `block` may change from now on: readers of the old content must notice."""
        ...


def generations_hold(store: BlockStore, blocks: Sequence[int], expected: Sequence[int]) -> bool:
    """Whether every block of `store` still has the generation it was announced with."""
    if isinstance(store, HostPool):
        return store.generations_equal(blocks, expected)
    fence()
    return all(store.generation(block) == wanted for block, wanted in zip(blocks, expected, strict=True))


def copy_bytes(destination: memoryview, source: bytes | bytearray | memoryview) -> None:
    """One memcpy of equal-sized buffers, without the interpreter lock (numpy releases it)."""
    np.copyto(np.frombuffer(destination, np.uint8), np.frombuffer(source, np.uint8))


def _round_up(value: int) -> int:
    return -(-value // PAGE) * PAGE


class HostPool:
    """A BlockStore in a memory file. Made by `create` (owner, writable) or `attach` (peer, read-only)."""

    def __init__(
        self, mapping: mmap.mmap, layout: KVLayout, num_blocks: int, fd: int, writable: bool
    ) -> None:
        """Use `create` or `attach`. The views keep `mapping` alive. Owns `fd` from now on, unless -1."""
        table, pages, _ = _offsets(layout, num_blocks)
        self._layout = layout
        self._num_blocks = num_blocks
        self._fd = fd
        self._writable = writable
        self._lock = threading.Lock()
        self._closed = False
        whole = memoryview(mapping)
        self._retired = whole[_RETIRED_OFFSET : _RETIRED_OFFSET + 4].cast("I")
        self._generations = whole[table : table + 8 * num_blocks].cast("Q")
        self._pages = whole[pages : pages + num_blocks * layout.block_bytes]
        whole.release()

    @classmethod
    def create(cls, layout: KVLayout, num_blocks: int, prefault: bool = True) -> HostPool:
        """Allocates a pool; with `prefault` every page is touched (blocks for about 1 s per GB: no loop).

        Raises PoolError where the memory cannot be had.
        """
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be positive, is {num_blocks}")
        table, pages, size = _offsets(layout, num_blocks)
        available = available_memory()
        if size > available:  # memory files know no limit: beyond it the kernel kills, it does not refuse
            raise PoolError(f"cannot allocate a KV pool of {size} bytes: {available} are available")
        fd = os.memfd_create("deepflow-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size)
            if prefault:
                os.posix_fallocate(fd, 0, size)  # zeroed by the kernel, without the interpreter lock
            mapping = mmap.mmap(fd, size)
            mapping[: _HEADER.size] = _HEADER.pack(
                MAGIC, HEADER_VERSION, 0, layout.digest(), num_blocks, layout.block_bytes, table, pages
            )
            if prefault:
                np.frombuffer(mapping, np.uint8)[_HEADER.size :: PAGE] = 0
            fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW)
            with contextlib.suppress(OSError):  # Linux before 5.1: peers are then trusted not to write
                fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_FUTURE_WRITE)
        except OSError as error:
            os.close(fd)
            raise PoolError(f"cannot allocate a KV pool of {size} bytes: {error}") from error
        return cls(mapping, layout, num_blocks, fd, writable=True)

    @classmethod
    def attach(cls, fd: int, layout: KVLayout, num_blocks: int) -> HostPool:
        """Maps a peer's pool read-only. `fd` stays the caller's, who may close it afterwards.

        Raises PoolError for a file that is not a pool of this layout and size, or that could shrink
        under the mapping. Every page is mapped in (about 0.1 s per GB: no loop), so that the first copy
        out of it is as fast as the next.
        """
        table, pages, size = _offsets(layout, num_blocks)
        try:
            actual = os.fstat(fd).st_size
            if actual != size:
                raise PoolError(f"pool has {actual} bytes, {size} expected")
            if not fcntl.fcntl(fd, F_GET_SEALS) & F_SEAL_SHRINK:
                raise PoolError("pool is not sealed against shrinking")
            mapping = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ)
        except OSError as error:
            raise PoolError(f"cannot map the peer's pool: {error}") from error
        header = _HEADER.unpack(mapping[: _HEADER.size])
        expected = (MAGIC, HEADER_VERSION, layout.digest(), num_blocks, layout.block_bytes, table, pages)
        if (*header[:2], *header[3:]) != expected:
            mapping.close()
            raise PoolError("pool header does not match the layout and size of the handshake")
        populate_read(memoryview(mapping))
        return cls(mapping, layout, num_blocks, -1, writable=False)

    @property
    def layout(self) -> KVLayout:
        return self._layout

    @property
    def num_blocks(self) -> int:
        return self._num_blocks

    @property
    def fd(self) -> int:
        """Descriptor of the memory file, to pass to a peer; -1 for an attached or closed pool."""
        return self._fd

    @property
    def pages(self) -> memoryview:
        """All pages, `num_blocks * layout.block_bytes` bytes; writable for the owner only."""
        return self._pages

    def prefault(self, stopped: Callable[[], bool]) -> bool:
        """Takes the memory of a pool made without `prefault`, while it is in use, until `stopped`. Blocks
        (about 0.3 s per GB), on any thread but the loop's. False where the kernel would not: blocks are
        then taken page by page as they are written."""
        pages = self._pages
        for start in range(0, len(pages), PREFAULT_SLICE_BYTES):
            if stopped():
                return True
            if not populate_write(pages[start : start + PREFAULT_SLICE_BYTES]):
                return False
        return True

    def addresses(self) -> tuple[int, int]:
        """Where the pages and the table of generations lie in this process, for libraries that pin memory."""
        pages = np.frombuffer(self._pages, np.uint8).ctypes.data
        return pages, np.frombuffer(self._generations, np.uint64).ctypes.data

    @property
    def retired(self) -> bool:
        """The owner closed the pool: nothing in it may be trusted any more."""
        return bool(self._retired[0])

    def generation(self, block: int) -> int:
        return self._generations[block]

    def generations_equal(self, blocks: Sequence[int], expected: Sequence[int]) -> bool:
        """Whether every block still has the generation it was announced with, and the owner lives."""
        fence()
        table = np.frombuffer(self._generations, np.uint64)
        same = bool((table[np.asarray(blocks, np.int64)] == np.asarray(expected, np.uint64)).all())
        return same and not self.retired

    def bump(self, block: int) -> None:
        with self._lock:
            self._generations[block] += 1
        fence()

    def view(self, start: int, count: int) -> memoryview:
        self._check_range(start, count)
        size = self._layout.block_bytes
        return self._pages[start * size : (start + count) * size]

    def load(self, start: int, count: int) -> bytearray:
        source = self.view(start, count)
        data = bytearray(len(source))
        copy_bytes(memoryview(data), source)
        return data

    def store(self, start: int, data: bytes | bytearray | memoryview) -> None:
        count, rest = divmod(len(data), self._layout.block_bytes)
        if rest:
            raise ValueError(f"{len(data)} bytes are not whole blocks of {self._layout.block_bytes}")
        copy_bytes(self.view(start, count), data)

    def close(self) -> None:
        """Gives the memory back; idempotent. An owner first retires the pool, so that peers notice.

        A tensor or view that still lies over the pages keeps the memory until it is dropped.
        """
        if self._closed:
            return
        self._closed = True
        if self._writable:
            self._retired[0] = 1
            np.frombuffer(self._generations, np.uint64)[:] += np.uint64(1)
            fence()
        # References are dropped, nothing is unmapped by force: torch.frombuffer keeps the buffer's
        # object but no export, so an explicit close would unmap memory under a living tensor.
        self._pages, self._generations = memoryview(b""), memoryview(b"").cast("Q")
        self._retired = memoryview(b"\1\0\0\0").cast("I")
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _check_range(self, start: int, count: int) -> None:
        if start < 0 or count < 0 or start + count > self._num_blocks:
            raise IndexError(f"blocks {start}+{count} outside a pool of {self._num_blocks}")


def available_memory() -> int:
    """Bytes this process may still allocate: the host's, or its control group's where that is less."""
    fields = Path("/proc/meminfo").read_text().split()
    available = int(fields[fields.index("MemAvailable:") + 1]) * 1024
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # no group (v2) limit: "max", or no such file
        limit = int((group / "memory.max").read_text())
        available = min(available, limit - int((group / "memory.current").read_text()))
    return available


def _offsets(layout: KVLayout, num_blocks: int) -> tuple[int, int, int]:
    """Offsets of the generation table and the pages, and the file's size."""
    table = PAGE
    pages = table + _round_up(8 * num_blocks)
    return table, pages, pages + _round_up(num_blocks * layout.block_bytes)
