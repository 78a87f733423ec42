"""Reads out of a peer's registered memory by a library that is there: NIXL, or Mooncake's transfer engine.

Chosen by configuration alone (`--kv-transport nixl` or `mooncake` at both ends), for fabrics that those
libraries know and ours do not. The sender registers its pool and its table of generations; the receiver
reads pages into a staging buffer of its own, then the generations of those blocks, and only then copies
into its pool. So a read that a library cannot cancel may end as late as it likes: it writes into a buffer
that was given up, never into blocks that somebody else owns by then.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kvtransfer.errors import TransferError, TransferErrorCode, TransportUnavailable
from kvtransfer.layout import KVLayout
from kvtransfer.native import Pieces, Stop
from kvtransfer.pool import HostPool
from kvtransfer.transports.base import Job, place, run_quarantined
from kvtransfer.transports.shm import head_pieces

STAGED_BYTES = 16 << 20
"""Bytes read at a time: large against a read's preparation, small beside a pool (ours)."""
MOONCAKE_BATCH = 512
"""Entries of one batch: 4,096 overflow its TCP queue (measured)."""
POLL_SECONDS = 20e-6
"""Between two looks at a NIXL read that was not ready at once."""

_given_up: list[object] = []
"""Buffers that a read may still write into. One for each read that a library did not end: the peer was
lost, and its transport with it, so that their number is that of lost peers."""


class Library(Protocol):
    """One library's endpoint in this process. Methods block; not thread-safe."""

    def register(self, address: int, size: int) -> None: ...

    def describe(self) -> bytes:
        """What a peer needs to read what is registered here."""
        ...

    def connect(self, description: bytes) -> str:
        """A name for the peer that was described."""
        ...

    def read(self, peer: str, rows: npt.NDArray[np.int64], deadline: float) -> None:
        """Reads rows of (remote address, local address, bytes). `deadline` is on time.monotonic.

        Raises OSError for a read that failed, TimeoutError for one that may still be under way.
        """
        ...


class Nixl:
    def __init__(self, name: str) -> None:
        api = _load("nixl._api", "nixl")
        self._agent: Any = api.nixl_agent(name, api.nixl_agent_config(backends=["UCX"]))

    def register(self, address: int, size: int) -> None:
        self._agent.register_memory([(address, size, 0, "")], "DRAM")

    def describe(self) -> bytes:
        metadata: bytes = self._agent.get_agent_metadata()
        return metadata

    def connect(self, description: bytes) -> str:
        peer = self._agent.add_remote_agent(description)
        return peer.decode() if isinstance(peer, bytes) else str(peer)

    def read(self, peer: str, rows: npt.NDArray[np.int64], deadline: float) -> None:
        columns = rows.astype(np.uint64)
        device = np.zeros(len(rows), np.uint64)
        local = np.stack((columns[:, 1], columns[:, 2], device), axis=1)
        remote = np.stack((columns[:, 0], columns[:, 2], device), axis=1)
        agent = self._agent
        try:
            handle = agent.initialize_xfer(
                "READ", agent.get_xfer_descs(local, "DRAM"), agent.get_xfer_descs(remote, "DRAM"), peer
            )
            state = agent.transfer(handle)
            while state == "PROC":
                if time.monotonic() > deadline:
                    raise TimeoutError("a NIXL read did not end in time")
                time.sleep(POLL_SECONDS)
                state = agent.check_xfer_state(handle)
            agent.release_xfer_handle(handle)
        except TimeoutError:
            raise
        except Exception as error:  # the library's errors are of many classes; the read is over
            raise OSError(f"NIXL: {error}") from error
        if state != "DONE":
            raise OSError(f"a NIXL read ended as {state}")


class Mooncake:
    def __init__(self, name: str) -> None:
        module = _load("mooncake.engine", "mooncake-transfer-engine")
        self._engine: Any = module.TransferEngine()
        self._host = name.rpartition("@")[2]
        if self._engine.initialize(self._host, "P2PHANDSHAKE", "tcp", ""):
            raise TransportUnavailable("library", "Mooncake's transfer engine does not start")

    def register(self, address: int, size: int) -> None:
        if self._engine.register_memory(address, size):
            raise TransportUnavailable("library", "Mooncake does not register the pool")

    def describe(self) -> bytes:
        return f"{self._host}:{self._engine.get_rpc_port()}".encode()

    def connect(self, description: bytes) -> str:
        return description.decode()

    def read(self, peer: str, rows: npt.NDArray[np.int64], deadline: float) -> None:
        """The library has a timeout of its own (MC_TRANSFER_TIMEOUT); the deadline is looked at between
        batches."""
        for at in range(0, len(rows), MOONCAKE_BATCH):
            if time.monotonic() > deadline:
                raise TimeoutError("Mooncake reads did not end in time")
            remote, local, sizes = rows[at : at + MOONCAKE_BATCH].T.tolist()
            if self._engine.batch_transfer_sync_read(peer, local, remote, sizes):
                raise OSError("a Mooncake read failed")


LIBRARIES: dict[str, Callable[[str], Library]] = {"nixl": Nixl, "mooncake": Mooncake}


def _load(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise TransportUnavailable("library", f"{package} is not there: {error}") from error


@dataclass(frozen=True, slots=True)
class Registered:
    """A sender's pool as its peers are told of it."""

    description: bytes
    pages: int  # address
    table: int  # address of the generations


class Source:
    """The sender's half: a library with the pool registered. Nothing of ours runs when a peer reads; the
    library serves its peers for as long as this lives."""

    def __init__(self, library: str, owner: str, host: str, pool: HostPool) -> None:
        """`owner` names the executor, `host` its address. Blocks: the library pins the pages.

        Raises TransportUnavailable.
        """
        self._library: Library = LIBRARIES[library](f"{owner}/{secrets.token_hex(4)}@{host}")
        pages, table = pool.addresses()
        try:
            self._library.register(pages, len(pool.pages))
            self._library.register(table, 8 * pool.num_blocks)
            self.registered = Registered(self._library.describe(), pages, table)
        except TransportUnavailable:
            raise
        except Exception as error:  # the libraries' errors are of many classes
            raise TransportUnavailable("library", f"{library}: {error}") from error


class OneSidedTransport:
    """The receiver's half. One copy at a time for each peer: they share the staging buffer."""

    def __init__(self, name: str, library: Library, peer: str, source: Registered, layout: KVLayout) -> None:
        self._name = name
        self._library = library
        self._peer = peer
        self._source = source
        self._layout = layout
        self._staging = np.zeros(max(STAGED_BYTES, layout.block_bytes), np.uint8)
        self._seen = np.zeros(len(self._staging) // layout.head_bytes + 1, np.uint64)
        self._lock = asyncio.Lock()
        self._workers = ThreadPoolExecutor(1, thread_name_prefix=f"kv-{name}")
        self._lost = False

    @classmethod
    async def open(
        cls, name: str, owner: str, host: str, source: Registered, layout: KVLayout
    ) -> OneSidedTransport:
        """`layout` is the sender's. Raises TransportUnavailable."""

        def make() -> OneSidedTransport:
            try:
                library: Library = LIBRARIES[name](f"{owner}/{secrets.token_hex(4)}@{host}")
                made = cls(name, library, library.connect(source.description), source, layout)
                for buffer in (made._staging, made._seen):
                    library.register(buffer.ctypes.data, buffer.nbytes)
            except TransportUnavailable:
                raise
            except Exception as error:  # the libraries' errors are of many classes
                raise TransportUnavailable("library", f"{name}: {error}") from error
            return made

        return await asyncio.to_thread(make)

    @property
    def name(self) -> str:
        return self._name

    async def copy(self, job: Job) -> None:
        stop = Stop()
        async with self._lock:
            await run_quarantined(self._workers, functools.partial(self._copy, job, stop), stop.set)

    async def close(self) -> None:
        self._workers.shutdown(wait=False)

    def _copy(self, job: Job, stop: Stop) -> None:
        if self._lost:
            raise TransferError(TransferErrorCode.PEER_LOST, f"{self._name}: the peer was lost before")
        deadline = time.monotonic() + job.timeout()
        try:
            for src, dst in self._batches(job):
                if stop.is_set():
                    return
                self._read_pages(job, src, deadline)
                self._verify(src, np.array([job.generations[block] for block in src], np.uint64), deadline)
                place(job.destination, dst, self._staging.data)
        except OSError as error:  # TimeoutError among them: the read may still be under way
            self._lost = True
            _given_up.append((self._library, self._staging, self._seen))
            raise TransferError(TransferErrorCode.PEER_LOST, f"{self._name}: {error}") from error

    def _batches(self, job: Job) -> Iterator[tuple[list[int], list[int]]]:
        """(source, target) blocks that are staged at a time."""
        step = max(1, len(self._staging) // job.block_bytes)
        pairs = [(m.src + at, m.dst + at) for m in job.moves for at in range(m.count)]
        for first in range(0, len(pairs), step):
            src, dst = zip(*pairs[first : first + step], strict=True)
            yield list(src), list(dst)

    def _read_pages(self, job: Job, src: list[int], deadline: float) -> None:
        moves = runs_as_rows(src)
        rows = head_pieces(moves, self._layout, job.heads) if job.heads[1] else moves * job.block_bytes
        self._read(rows, self._source.pages, self._staging, deadline)

    def _read(self, rows: Pieces, there: int, here: npt.NDArray[Any], deadline: float) -> None:
        """Rows of (offset from the address `there`, offset in `here`, bytes)."""
        bases = np.array((there, here.ctypes.data, 0), np.int64)
        self._library.read(self._peer, rows + bases, deadline)

    def _verify(self, src: list[int], expected: npt.NDArray[np.uint64], deadline: float) -> None:
        """After the pages are here: the generations they had then are those that were announced."""
        rows = runs_as_rows(src) * 8
        self._read(rows, self._source.table, self._seen, deadline)
        if not (self._seen[: len(src)] == expected).all():
            raise TransferError(
                TransferErrorCode.GENERATION_MOVED, "the sender reused blocks while they were read"
            )


def runs_as_rows(blocks: list[int]) -> Pieces:
    """Rows of (block, position, count): contiguous blocks in one row, put one after the other."""
    src = np.array(blocks, np.int64)
    first = np.flatnonzero(np.concatenate(([True], src[1:] != src[:-1] + 1)))
    return np.stack((src[first], first, np.diff(first, append=len(src))), axis=1)
