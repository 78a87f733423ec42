"""Prefill and decode ends of KV transfers as processes of their own, to be killed, stopped and slowed.

Each has a real pool, a real sender or receiver, and a free list that treats blocks as an engine does:
they are reused only after the transfer's one terminal event, with a new generation and other bytes, so
that whatever reads or writes a block too late shows. A parent talks to them over a pipe.
"""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import os
import random
import resource
import signal
import threading
from collections.abc import Awaitable, Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np

from kvtransfer.auth import TokenAuth
from kvtransfer.channel import SERVER_OPTIONS
from kvtransfer.errors import TransferError
from kvtransfer.layout import KVLayout
from kvtransfer.pool import HostPool
from kvtransfer.receiver import Receiver
from kvtransfer.sender import Sender
from kvtransfer.service import KVTransferService
from tests.support.kv import TOKEN, StagedStore

LAYOUT = KVLayout("faults@1", "float32", block_tokens=16, layers=2, kv_heads=2, head_dim=16)
"""Pages of 8 KiB."""
LEASE_SECONDS = 0.5
PEER_SECONDS = 0.8
GARBAGE = 0xEE
SLOW_SECONDS = 0.05
TOO_LITTLE = "pool_full"
START_SECONDS = 240.0
"""A machine whose every core has ten others waiting took more than 60."""
_ids = itertools.count()


def page(seed: int, index: int) -> bytes:
    """What block `index` of the transfer `seed` holds: another page for each."""
    words = np.arange(LAYOUT.block_bytes // 8, dtype=np.uint64)
    with np.errstate(over="ignore"):
        mixed = (words + np.uint64(seed * 1_000_003 + index * 7919)) * np.uint64(0x9E3779B97F4A7C15)
    return mixed.tobytes()


class Blocks:
    """A pool's free list, taken from at random so that runs are short. Thread-safe."""

    def __init__(self, pool: HostPool, rng: random.Random) -> None:
        self._pool = pool
        self._rng = rng
        self._free = list(range(pool.num_blocks))
        self._lock = threading.Lock()

    def take(self, count: int) -> list[int] | None:
        """None if there are not so many. A taken block has a new generation."""
        with self._lock:
            if count > len(self._free):
                return None
            if self._rng.random() < 0.5:
                self._rng.shuffle(self._free)
            else:
                self._free.sort(reverse=True)
            taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self._pool.bump(block)
        return taken

    def give(self, blocks: list[int]) -> None:
        for block in blocks:
            self._pool.bump(block)
            self._pool.store(block, bytes([GARBAGE]) * LAYOUT.block_bytes)
        with self._lock:
            assert not set(blocks) & set(self._free), "freed twice"
            self._free.extend(blocks)

    @property
    def free(self) -> int:
        return len(self._free)


class Prefill:
    """The sender's process: computes chunks into its pool as an engine would."""

    def __init__(
        self, shm_dir: Path, blocks: int, seed: int, incarnation: str, tell: Callable[..., None]
    ) -> None:
        self.pool = HostPool.create(LAYOUT, blocks)
        self.blocks = Blocks(self.pool, random.Random(seed))
        self.held: dict[str, list[int]] = {}
        self.tell = tell
        self.sender = Sender(
            self.pool, "te-p", incarnation, lease_seconds=LEASE_SECONDS, on_released=self._released
        )
        self.service = KVTransferService(
            self.sender, token=TOKEN, shm_dir=shm_dir, data_listen=("127.0.0.1", 0)
        )
        self.running: set[asyncio.Task[None]] = set()

    async def start(self) -> dict[str, Any]:
        self.server = grpc.aio.server(interceptors=[TokenAuth(TOKEN)], options=SERVER_OPTIONS)
        self.service.add_to_server(self.server)
        port = self.server.add_insecure_port("127.0.0.1:0")
        await self.server.start()
        await self.service.start()
        return {"port": port}

    def _released(self, transfer_id: str, outcome: str) -> None:
        self.blocks.give(self.held.pop(transfer_id))
        self.tell("released", transfer_id, outcome)

    async def prefill(self, transfer_id: str, seed: int, blocks: int, chunk: int, pause: float) -> str:
        """Offers, and computes in the background. Says at once whether there were blocks."""
        taken = self.blocks.take(blocks)
        if taken is None:
            return TOO_LITTLE
        self.held[transfer_id] = taken
        self.sender.offer(transfer_id)
        task = asyncio.create_task(self._compute(transfer_id, seed, taken, chunk, pause))
        self.running.add(task)
        task.add_done_callback(self.running.discard)
        return "ok"

    async def _compute(
        self, transfer_id: str, seed: int, blocks: list[int], chunk: int, pause: float
    ) -> None:
        for first in range(0, len(blocks), chunk):
            await asyncio.sleep(pause)
            if transfer_id not in self.held:
                return  # aborted
            part = blocks[first : first + chunk]
            for index, block in enumerate(part, first):
                self.pool.store(block, page(seed, index))
            self.sender.announce(transfer_id, first, part, (first + len(part)) * LAYOUT.block_tokens)
        self.sender.complete(transfer_id, len(blocks) * LAYOUT.block_tokens, transfer_id.encode())

    async def abort(self, transfer_id: str) -> None:
        self.sender.withdraw(transfer_id, "aborted by the schedule")

    async def state(self) -> dict[str, Any]:
        return {"active": self.sender.active, "free": self.blocks.free, **usage()}


class Decode:
    """The receiver's process: reserves blocks, pulls, compares every byte, frees."""

    def __init__(
        self, shm_dir: Path, blocks: int, seed: int, transports: Sequence[Any], tell: Callable[..., None]
    ) -> None:
        self.pool = HostPool.create(LAYOUT, blocks)
        self.blocks = Blocks(self.pool, random.Random(seed))
        self.slow = SlowStore(self.pool, SLOW_SECONDS)
        self.tell = tell
        self.receivers = {
            (name, slow): Receiver(
                self.slow if slow else self.pool,
                "te-d",
                f"d{seed}-{name}-{slow}",
                token=TOKEN,
                transports=name,
                shm_dir=shm_dir,
                peer_timeout=PEER_SECONDS,
                lease_seconds=LEASE_SECONDS,
                checksum=True,
                max_pulls=4,
                max_waiting=2,
            )
            for name in transports
            for slow in (False, True)
        }
        self.pulls: dict[str, asyncio.Task[str]] = {}

    async def start(self) -> dict[str, Any]:
        return {}

    async def pull(
        self, key: str, transport: str, slow: bool, address: str, incarnation: str, transfer_id: str,
        attempt: int, seed: int, blocks: int, skip: int, seconds: float,
    ) -> str:  # fmt: skip
        """Pulls in the background; its end is told as `done`."""
        taken = self.blocks.take(blocks)
        if taken is None:
            return TOO_LITTLE
        source = (self.receivers[transport, slow], address, incarnation, transfer_id, attempt)
        task = asyncio.create_task(self._pull(source, seed, taken, skip, seconds))
        self.pulls[key] = task
        # Not in the coroutine: one that is cancelled before its first step never runs.
        task.add_done_callback(lambda done: self._done(key, taken, done))
        return "ok"

    def _done(self, key: str, blocks: list[int], pull: asyncio.Task[str]) -> None:
        del self.pulls[key]
        outcome = "cancelled" if pull.cancelled() else str(pull.exception() or pull.result())
        if self.slow.writing & set(blocks):
            outcome = "written after its end"
        self.blocks.give(blocks)
        self.tell("done", key, outcome)

    async def _pull(
        self, source: tuple[Receiver, str, str, str, int], seed: int, blocks: list[int], skip: int,
        seconds: float,
    ) -> str:  # fmt: skip
        receiver, address, incarnation, transfer_id, attempt = source
        loop = asyncio.get_running_loop()
        for index, block in enumerate(blocks[:skip]):
            self.pool.store(block, page(seed, index))  # found in cache: must stay as it is
        try:
            result = await receiver.pull(
                address, "te-p", incarnation, transfer_id, blocks, len(blocks) * LAYOUT.block_tokens, skip,
                deadline=loop.time() + seconds, attempt=attempt,
            )  # fmt: skip
            good = result.payload == transfer_id.encode() and all(
                bytes(self.pool.view(block, 1)) == page(seed, index) for index, block in enumerate(blocks)
            )
        except TransferError as error:
            return error.code.name
        return "ok" if good else "corrupt"

    async def cancel(self, key: str) -> None:
        if key in self.pulls:
            self.pulls[key].cancel()

    async def state(self) -> dict[str, Any]:
        active = sum(receiver.active for receiver in self.receivers.values())
        return {"active": active + len(self.pulls), "free": self.blocks.free, **usage()}


class SlowStore(StagedStore):
    """A slow reader: each write takes its time. Says what is being written."""

    def __init__(self, pool: HostPool, delay: float) -> None:
        super().__init__(pool, delay)
        self.writing: set[int] = set()

    def store(self, start: int, data: bytes | bytearray | memoryview) -> None:
        blocks = set(range(start, start + len(data) // LAYOUT.block_bytes))
        self.writing |= blocks
        super().store(start, data)
        self.writing -= blocks


def usage() -> dict[str, int]:
    """Open descriptors and the resident set's peak in KiB of this process."""
    return {
        "fds": len(os.listdir("/proc/self/fd")),
        "rss": int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() // 1024,
    }


# -- the parent's side -------------------------------------------------------------------------------


class Node:
    """One such process. `on_event(*message)` hears what it tells; all on one loop."""

    def __init__(self, kind: type[Prefill] | type[Decode], on_event: Callable[..., None], *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_main, args=(theirs, kind, args), daemon=True)
        self.process.start()
        theirs.close()
        self._on_event = on_event
        self._replies: dict[int, asyncio.Future[Any]] = {}
        self.alive = True
        asyncio.get_running_loop().add_reader(self._pipe.fileno(), self._read)

    async def started(self) -> dict[str, Any]:
        found: dict[str, Any] = await self.call("start", seconds=START_SECONDS)
        return found

    async def call(self, method: str, *args: Any, seconds: float = 20.0) -> Any:
        """Raises ConnectionError if the process is dead, TimeoutError if it does not answer."""
        if not self.alive:
            raise ConnectionError("the process is dead")
        number = next(_ids)
        future = self._replies[number] = asyncio.get_running_loop().create_future()
        try:
            self._pipe.send((number, method, args))
        except OSError as error:
            raise ConnectionError("the process is dead") from error
        async with asyncio.timeout(seconds):
            result = await future
        if isinstance(result, Exception):
            raise result
        return result

    def _read(self) -> None:
        try:
            number, *message = self._pipe.recv()
        except (EOFError, OSError):
            self._lost()
            return
        if number is None:
            self._on_event(*message)
        elif number in self._replies and not self._replies[number].done():
            self._replies.pop(number).set_result(message[0])

    def _lost(self) -> None:
        if self.alive:
            self.alive = False
            asyncio.get_running_loop().remove_reader(self._pipe.fileno())
            for future in self._replies.values():
                if not future.done():
                    future.set_result(ConnectionError("the process died"))

    def signal(self, number: signal.Signals) -> None:
        if self.process.pid is not None and self.process.is_alive():
            os.kill(self.process.pid, number)

    def kill(self) -> None:
        self._lost()
        self.process.kill()
        self.process.join(10)
        self._pipe.close()


def _main(pipe: Connection, kind: type[Prefill] | type[Decode], args: tuple[Any, ...]) -> None:
    asyncio.run(_serve(pipe, kind, args))


async def _serve(pipe: Connection, kind: Any, args: tuple[Any, ...]) -> None:
    loop = asyncio.get_running_loop()
    writing = threading.Lock()

    def send(*message: Any) -> None:
        with writing:
            pipe.send(message)

    node = kind(*args, lambda *message: send(None, *message))

    async def answer(number: int, call: Callable[..., Awaitable[Any]], values: tuple[Any, ...]) -> None:
        try:
            result = await call(*values)
        except Exception as error:  # the parent's to judge
            result = error
        send(number, result)

    def listen() -> None:
        while True:
            number, method, values = pipe.recv()
            asyncio.run_coroutine_threadsafe(answer(number, getattr(node, method), values), loop)

    try:
        await asyncio.to_thread(listen)
    except EOFError:
        os._exit(0)  # the parent is gone
