"""Tensor parallel: one model over several processes, each with a device and its share of heads and KV.

`open_ranks` gives a model and a pool that `LocalExecutor` runs like any other: this process is rank 0 and
the master (DeepServe section 4, SPMD master-executor); every rank gets the same batch and computes its
part, sums and joined logits come from `flowserve.devices.collective`, and rank 0 alone samples.

Each rank's pool holds its KV heads of every block. Transfers and the cache see one store with all heads
(`RankStore`), so executors of any degree exchange KV with each other. What it costs: bytes pass through
rank 0's host memory, and the pool cannot be mapped by peers, which read it over gRPC.

A rank that ends takes the executor with it: a step raises ExecutorLost, and the shell's watchdog gives
the process up.
"""

from __future__ import annotations

import contextlib
import logging
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from socket import socketpair

import numpy as np
import numpy.typing as npt
import torch

from flowserve.devices import Device, Model, Pool, rank_device
from flowserve.devices.collective import Group
from flowserve.executor.batch import Ints, RaggedBatch
from flowserve.executor.interface import ExecutorLost
from flowserve.executor.rank import (
    Forward,
    LoadBlocks,
    Logits,
    Prepare,
    RankSpec,
    Sleep,
    StoreBlocks,
    Wake,
)
from flowserve.models.config import ModelConfig
from flowserve.models.loader import DTYPES
from flowserve.models.shard import shard_config
from flowserve.models.weights import WeightSource
from kvtransfer.layout import DTYPE_BYTES, KVLayout
from kvtransfer.pool import BlockStore

log = logging.getLogger(__name__)

MAX_RANKS = 64
"""More than any host has devices (ours)."""
LOAD_SECONDS = 1800.0
"""For a rank's libraries and weights: as long as the supervisor waits for a load."""
END_SECONDS = 5.0
"""Between asking a rank to end and killing it (ours)."""

Bytes = npt.NDArray[np.uint8]


class Rank:
    """The driver's end of one rank's process, which waits for its model once libraries and device are up."""

    def __init__(self, number: int, device: str) -> None:
        """`device` is the rank's own."""
        steps, theirs = socketpair()
        pages, their_pages = socketpair()
        with theirs, their_pages:
            fds = (theirs.fileno(), their_pages.fileno())
            # Not -m: run as __main__, its messages would be other classes than those imported here.
            program = "from flowserve.executor.rank import main; main()"
            command = [sys.executable, "-P", "-c", program, *map(str, fds), device]
            self._process = subprocess.Popen(command, pass_fds=fds, stdin=subprocess.DEVNULL)
        self.number, self.device = number, device
        self._steps, self._pages = Connection(steps.detach()), Connection(pages.detach())

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        return self._process.pid

    def check(self) -> None:
        """Raises ExecutorLost."""
        if (code := self._process.poll()) is not None:
            raise ExecutorLost(f"rank {self.number} has ended with code {code}")

    def send(self, request: RankSpec | Prepare | Forward | Logits | Sleep | Wake) -> None:
        with self._lost():
            self._steps.send(request)

    def wait_ready(self) -> None:
        """Until the rank has reached its next point of loading, or sleeps. Raises what it could not do."""
        with self._lost():
            if not self._steps.poll(LOAD_SECONDS):
                raise ExecutorLost(f"rank {self.number} did not load in {LOAD_SECONDS:.0f} s")
            error = self._steps.recv()
        if error is not None:
            raise error

    def ask(self, request: LoadBlocks | StoreBlocks, data: bytes | memoryview | None = None) -> None:
        with self._lost():
            self._pages.send(request)
            if data is not None:
                self._pages.send_bytes(data)

    def loaded(self) -> bytes:
        with self._lost():
            return self._pages.recv_bytes()

    def stored(self) -> None:
        with self._lost():
            self._pages.recv()

    def end(self) -> None:
        """Asks the process to end."""
        with contextlib.suppress(OSError):
            self._steps.send(None)

    def close(self) -> None:
        """Waits for the process's end, kills it after END_SECONDS."""
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._steps.close()
        self._pages.close()

    @contextlib.contextmanager
    def _lost(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, OSError) as error:
            raise ExecutorLost(f"rank {self.number} is gone: {error or 'its end is closed'}") from error


class WarmRanks:
    """Ranks that wait for a model, whichever it is and over however many of them (DeepServe, section 6.1:
    executors that are warm for any parallelism). From any thread, one at a time."""

    def __init__(self, device: str, count: int) -> None:
        """Starts `count` processes beyond the first rank; `device` is the first rank's."""
        self._device = device
        self._waiting = [self._start(number) for number in range(1, count + 1)]

    def take(self, count: int) -> list[Rank]:
        """Ranks 1 to `count`: those that wait, and new ones for what is lacking."""
        waiting = {rank.number: rank for rank in self._waiting if rank.alive}
        self._waiting = [rank for number, rank in waiting.items() if number > count]
        return [waiting.get(number) or self._start(number) for number in range(1, count + 1)]

    def close(self) -> None:
        """Ends those that still wait."""
        close_ranks(self._waiting)
        self._waiting = []

    def _start(self, number: int) -> Rank:
        return Rank(number, rank_device(self._device, number))


class RankModel:
    """A Model over all ranks. `forward` is called from one thread."""

    def __init__(self, config: ModelConfig, local: Model, ranks: Sequence[Rank], group: Group) -> None:
        self.config = config
        self._local, self._ranks, self._group = local, ranks, group
        self._closed = False

    def forward(self, batch: RaggedBatch, pages: torch.Tensor) -> torch.Tensor:
        """Float32 logits [rows, vocab]; `pages` are rank 0's. Raises ExecutorLost."""
        return self._step(Forward(batch), lambda: self._local.forward(batch, pages))

    def logits(self, rows: Ints) -> torch.Tensor:
        """Float32 logits [len(rows), vocab] of tokens of the last `forward`. Raises ExecutorLost."""
        return self._step(Logits(rows), lambda: self._local.logits(rows))

    def _step(self, request: Forward | Logits, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        for rank in self._ranks:  # before anybody waits in a collective for one that is not there
            rank.check()
        for rank in self._ranks:
            rank.send(request)
        try:
            return compute()
        except Exception as error:  # whatever it was, the ranks no longer stand at the same place
            raise ExecutorLost(f"a step over {len(self._ranks) + 1} ranks broke off: {error}") from error

    def sleep(self) -> None:
        """All ranks; their pools go too. Raises ExecutorLost."""
        for rank in self._ranks:
            rank.send(Sleep())
        self._local.sleep()
        for rank in self._ranks:
            rank.wait_ready()

    def wake(self) -> None:
        """All ranks, with empty pools. Raises PoolError, ExecutorLost."""
        for rank in self._ranks:
            rank.send(Wake())
        self._local.wake()
        for rank in self._ranks:
            rank.wait_ready()

    def prepare(self, device: Device, pool: Pool, max_len: int) -> None:
        """What is to be recorded is recorded, by all at once."""
        for rank in self._ranks:
            rank.send(Prepare())
        device.prepare(self._local, pool, max_len)

    def pool(self, layout: KVLayout, local: Pool) -> RankPool:
        """All ranks' pools as one of all heads, as `layout`; `local` is rank 0's."""
        return RankPool(local, RankStore(layout, local.store, self._ranks))

    def close(self) -> None:
        """Ends the ranks' processes; idempotent."""
        if not self._closed:
            self._closed = True
            close_ranks(self._ranks)
            self._group.close()
            self._local.close()


class RankStore:
    """A BlockStore of all KV heads over the ranks' pools. `view` is None: bytes are put together by copying.

    Requests are taken one after the other: a rank answers on one connection.
    """

    def __init__(self, layout: KVLayout, local: BlockStore, ranks: Sequence[Rank]) -> None:
        self._layout, self._local, self._ranks = layout, local, ranks
        self._asking = threading.Lock()

    @property
    def layout(self) -> KVLayout:
        return self._layout

    @property
    def num_blocks(self) -> int:
        return self._local.num_blocks

    def generation(self, block: int) -> int:
        return self._local.generation(block)

    def bump(self, block: int) -> None:
        self._local.bump(block)

    def view(self, start: int, count: int) -> None:
        return None

    def load(self, start: int, count: int) -> bytearray:
        """Raises IndexError, ExecutorLost."""
        self._check(start, count)
        data = bytearray(count * self._layout.block_bytes)
        parts = self._by_rank(np.frombuffer(data, np.uint8))
        with self._asking:
            for rank in self._ranks:
                rank.ask(LoadBlocks(start, count))
            pieces = [self._local.load(start, count), *(rank.loaded() for rank in self._ranks)]
        for part, piece in zip(parts, pieces, strict=True):
            part[:] = np.frombuffer(piece, np.uint8).reshape(part.shape)
        return data

    def store(self, start: int, data: bytes | bytearray | memoryview) -> None:
        """Raises ValueError, IndexError, ExecutorLost."""
        count, rest = divmod(len(data), self._layout.block_bytes)
        if rest:
            raise ValueError(f"{len(data)} bytes are not whole blocks of {self._layout.block_bytes}")
        self._check(start, count)
        own, *others = (part.tobytes() for part in self._by_rank(np.frombuffer(data, np.uint8)))
        with self._asking:
            for rank, piece in zip(self._ranks, others, strict=True):
                rank.ask(StoreBlocks(start), piece)
            self._local.store(start, own)
            for rank in self._ranks:
                rank.stored()

    def _by_rank(self, data: Bytes) -> list[Bytes]:
        """Views [blocks * layers * 2, heads of a rank, bytes of a head] of whole blocks, rank by rank."""
        head = self._layout.block_tokens * self._layout.head_dim * DTYPE_BYTES[self._layout.dtype]
        heads = data.reshape(-1, self._layout.kv_heads, head)
        return np.split(heads, len(self._ranks) + 1, axis=1)

    def _check(self, start: int, count: int) -> None:
        if start < 0 or count < 0 or start + count > self.num_blocks:
            raise IndexError(f"blocks {start}+{count} outside a pool of {self.num_blocks}")


class RankPool:
    """Rank 0's pages, and the store over all ranks'."""

    def __init__(self, local: Pool, store: RankStore) -> None:
        self._local = local
        self.store = store

    @property
    def pages(self) -> torch.Tensor:
        return self._local.pages

    def close(self) -> None:
        self._local.close()


def close_ranks(ranks: Sequence[Rank]) -> None:
    for rank in ranks:
        rank.end()
    for rank in ranks:
        rank.close()


def open_ranks(
    path: Path,
    source: WeightSource,
    device: Device,
    *,
    size: int,
    layout: KVLayout,
    num_blocks: int,
    max_len: int,
    threads: int,
    warm: WarmRanks | None = None,
) -> tuple[RankModel, RankPool, Callable[[], RankPool]]:
    """Takes `size - 1` processes of `warm`, or starts them, and loads the model into all; `layout` has all KV
    heads. The third wakes all and gives their new pools, after `RankModel.sleep`.

    Raises what `open_device`, `make_model` and `make_pool` raise, here or in a rank; UnsupportedModel where
    the model cannot be shared out; ExecutorLost for a rank that died or hangs.
    """
    if not 2 <= size <= MAX_RANKS:
        raise ValueError(f"tensor parallel over {size} ranks: 2 to {MAX_RANKS} are possible")
    share = replace(layout, kv_heads=shard_config(source.config, size).kv_heads, specs=())
    threads = max(1, threads // size)  # of the executor's
    device.set_threads(threads)
    ranks: list[Rank] = []
    pool: Pool | None = None
    group: Group | None = None
    with tempfile.TemporaryDirectory(prefix="deepflow-ranks-") as folder:  # only this user may open it
        meeting_file = Path(folder) / "meet"
        try:
            ranks = (warm or WarmRanks(device.name, 0)).take(size - 1)
            for rank in ranks:
                number, name = rank.number, rank.device
                rank.send(
                    RankSpec(number, size, meeting_file, path, name, share, num_blocks, max_len, threads)
                )
            pool = device.make_pool(share, num_blocks)
            for rank in ranks:
                rank.wait_ready()
            group = device.join(0, size, meeting_file)
            model = device.make_model(
                source,
                dtype=DTYPES[layout.dtype],
                max_len=max_len,
                block_tokens=layout.block_tokens,
                threads=threads,
                group=group,
            )
            for rank in ranks:
                rank.wait_ready()
            together = RankModel(source.config, model, ranks, group)
            together.prepare(device, pool, max_len)
        except BaseException:
            close_ranks(ranks)
            if group is not None:
                group.close()
            if pool is not None:
                pool.close()
            raise
    log.info("%d ranks, processes %s", size, ", ".join(str(rank.pid) for rank in ranks))

    def remake() -> RankPool:
        fresh = device.make_pool(share, num_blocks)
        try:
            together.wake()
            together.prepare(device, fresh, max_len)
        except BaseException:
            fresh.close()
            raise
        return together.pool(layout, fresh)

    return together, together.pool(layout, pool), remake
