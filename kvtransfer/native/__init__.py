"""Many copies in one call without the interpreter lock, and memory mapped in ahead of its use.

Called by the transports. `copy.c` is built by setup.py where there is a C compiler; without it numpy
copies piece by piece, which is as right and slower for small blocks. `DEEPFLOW_NATIVE=0` asks for that.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import mmap
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

logger = logging.getLogger(__name__)

VERSION = 1
"""Of the functions of `copy.c`; changes with their arguments."""
DISABLE_ENV = "DEEPFLOW_NATIVE"
FALLBACK_SLICE_BYTES = 8 << 20
"""Largest piece of one numpy copy: below 1 ms at 10 GB/s, so a cancelled copy stops that soon."""
KEPT_BYTES = 32 << 20
"""The largest the GNU C library takes for the second bound; several times what a Read has in flight."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
MADV_POPULATE_READ, MADV_POPULATE_WRITE = 22, 23  # linux/mman.h, Linux 5.14

Pieces = npt.NDArray[np.int64]
"""Rows of (source offset, target offset, bytes)."""


class Stop:
    """Asks a running copy to end; set from any thread."""

    def __init__(self) -> None:
        self.flag = ctypes.c_int32(0)

    def set(self) -> None:
        self.flag.value = 1

    def is_set(self) -> bool:
        return bool(self.flag.value)


@functools.cache
def _library() -> ctypes.CDLL | None:
    if os.environ.get(DISABLE_ENV) == "0":
        return None
    for path in sorted(Path(__file__).parent.glob("_copy*.so")):
        try:
            library = ctypes.CDLL(os.fspath(path))
            if library.dfkv_version() != VERSION:
                continue
        except (OSError, AttributeError) as error:
            logger.warning("%s cannot be used: %s", path.name, error)
            continue
        library.dfkv_copy.restype = ctypes.c_int64
        library.dfkv_copy.argtypes = (
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_void_p,
        )
        return library
    logger.warning("the compiled copy is not there: numpy copies")
    return None


def available() -> bool:
    """Whether the compiled copy is used in this process."""
    return _library() is not None


def copy_pieces(target: memoryview, source: memoryview, pieces: Pieces, stop: Stop) -> int:
    """Copies `pieces` from `source` to `target`; returns the bytes copied, all unless `stop` was set.

    Raises ValueError for a piece outside either buffer. Blocks; the interpreter lock is free meanwhile.
    """
    if not len(pieces):
        return 0
    to, origin = np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8)
    ends = pieces[:, :2] + pieces[:, 2:]
    if pieces.min() < 0 or ends[:, 0].max() > len(origin) or ends[:, 1].max() > len(to):
        raise ValueError("a piece lies outside its buffer")
    library = _library()
    if library is None:
        return _copy_with_numpy(to, origin, pieces, stop)
    rows = np.ascontiguousarray(pieces, np.int64)
    copied: int = library.dfkv_copy(
        to.ctypes.data, origin.ctypes.data, rows.ctypes.data, len(rows), ctypes.addressof(stop.flag)
    )
    return copied


def _copy_with_numpy(
    target: npt.NDArray[np.uint8], source: npt.NDArray[np.uint8], pieces: Pieces, stop: Stop
) -> int:
    copied = 0
    for start, end, size in pieces.tolist():
        for offset in range(0, size, FALLBACK_SLICE_BYTES):
            if stop.is_set():
                return copied
            step = min(FALLBACK_SLICE_BYTES, size - offset)
            np.copyto(
                target[end + offset : end + offset + step], source[start + offset : start + offset + step]
            )
            copied += step
    return copied


def populate_read(mapping: memoryview) -> None:
    """Maps every page of `mapping` in, so that the first copy out of it takes no faults. Blocks.

    Only a hint: what the kernel refuses is touched page by page instead.
    """
    view = np.frombuffer(mapping, np.uint8)
    if not len(view):
        return
    start = view.ctypes.data
    first = start - start % mmap.PAGESIZE
    if not _advise(first, start - first + len(view), MADV_POPULATE_READ):
        view[:: mmap.PAGESIZE].sum(dtype=np.int64)


def protect(mapping: memoryview) -> None:
    """Makes a whole writable mapping read-only: writing to it ends the process. Raises OSError."""
    view = np.frombuffer(mapping, np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(len(view)), mmap.PROT_READ):
        raise OSError(ctypes.get_errno(), "mprotect")


def populate_write(mapping: memoryview) -> bool:
    """Takes and maps every page of writable memory, whatever is written to it meanwhile; its content stays.
    Blocks. False where the kernel cannot, or has not the memory: writes then fault page by page."""
    view = np.frombuffer(mapping, np.uint8)
    first = view.ctypes.data - view.ctypes.data % mmap.PAGESIZE
    return _advise(first, view.ctypes.data - first + len(view), MADV_POPULATE_WRITE)


def _advise(address: int, size: int, advice: int) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    return bool(libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), advice) == 0)


@functools.cache
def keep_freed_memory() -> None:
    """Lets the allocator keep what large messages free, for the life of the process.

    gRPC allocates and frees every message of a Read. By default the C library gives such blocks back to
    the kernel, which hands the next ones out page by page, zeroed: 80 faults a MiB at the receiver, none
    with these bounds (counted). At most `KEPT_BYTES` are kept for each of the library's arenas.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return  # not the GNU C library
    for option, value in ((M_TRIM_THRESHOLD, KEPT_BYTES), (M_MMAP_THRESHOLD, KEPT_BYTES)):
        if not mallopt(option, value):
            logger.info("the allocator keeps its own bounds")
