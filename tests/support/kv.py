"""Both ends of KV transfers for tests: a real gRPC sender in this process or in one of its own."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import multiprocessing
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np

from kvtransfer.auth import TokenAuth
from kvtransfer.channel import SERVER_OPTIONS
from kvtransfer.layout import KVLayout
from kvtransfer.pool import HostPool
from kvtransfer.receiver import PullResult, Receiver
from kvtransfer.sender import Sender
from kvtransfer.service import KVTransferService

TOKEN = "kv-test-token"
LAYOUT = KVLayout("model@0001", "float32", block_tokens=16, layers=2, kv_heads=2, head_dim=8)
"""Pages of 4 KiB: a transfer of many blocks stays small."""


class StagedStore:
    """A pool that cannot be viewed, as a device's: everything goes through `load` and `store`."""

    def __init__(self, pool: HostPool, delay: float = 0.0) -> None:
        self.pool = pool
        self.delay = delay
        self.layout = pool.layout
        self.num_blocks = pool.num_blocks
        self.stores = 0
        self.storing = 0

    def generation(self, block: int) -> int:
        return self.pool.generation(block)

    def bump(self, block: int) -> None:
        self.pool.bump(block)

    def view(self, start: int, count: int) -> None:
        return None

    def load(self, start: int, count: int) -> bytearray:
        time.sleep(self.delay)
        return self.pool.load(start, count)

    def store(self, start: int, data: bytes | bytearray | memoryview) -> None:
        self.storing += 1
        time.sleep(self.delay)
        self.pool.store(start, data)
        self.stores += 1
        self.storing -= 1


def fill_random(pool: HostPool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    np.frombuffer(pool.pages, np.uint8)[:] = rng.integers(0, 256, len(pool.pages), np.uint8)


def block_bytes(pool: HostPool, blocks: Sequence[int]) -> bytes:
    return b"".join(bytes(pool.view(block, 1)) for block in blocks)


@dataclass
class SenderHost:
    """A sender that serves on `address` in this process."""

    pool: HostPool
    sender: Sender
    service: KVTransferService
    address: str
    released: list[tuple[str, str]] = field(default_factory=list)

    def offer_all(self, transfer_id: str, blocks: Sequence[int], tokens: int) -> None:
        self.sender.offer(transfer_id)
        self.sender.announce(transfer_id, 0, blocks, tokens)
        self.sender.complete(transfer_id, tokens)

    async def pull(
        self, receiver: Receiver, transfer_id: str, dst: Sequence[int], length: int, **kwargs: Any
    ) -> PullResult:
        return await receiver.pull(
            self.address, self.sender.te_id, self.sender.incarnation, transfer_id, dst, length, **kwargs
        )

    async def outcome(self, transfer_id: str, timeout: float = 5.0) -> str:
        """How the transfer ended at the sender; waits for it."""
        async with asyncio.timeout(timeout):
            while True:
                for released, outcome in self.released:
                    if released == transfer_id:
                        return outcome
                await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def serving(
    shm_dir: Path | None = None,
    *,
    layout: KVLayout = LAYOUT,
    num_blocks: int = 128,
    lease_seconds: float = 30.0,
    token: str = TOKEN,
    te_id: str = "te-p",
    incarnation: str = "p1",
    wrap: Callable[[HostPool], Any] = lambda pool: pool,
    seed: int = 1,
    **options: Any,
) -> AsyncIterator[SenderHost]:
    pool = HostPool.create(layout, num_blocks)
    fill_random(pool, seed)
    released: list[tuple[str, str]] = []
    sender = Sender(
        wrap(pool),
        te_id,
        incarnation,
        lease_seconds=lease_seconds,
        on_released=lambda transfer_id, outcome: released.append((transfer_id, outcome)),
    )
    options.setdefault("data_listen", ("127.0.0.1", 0))
    if options.get("library") == "collective":  # loads torch: an engine has by the time a peer shakes hands
        await asyncio.to_thread(importlib.import_module, "kvtransfer.transports.pair")
    service = KVTransferService(sender, token=token, shm_dir=shm_dir, **options)
    server = grpc.aio.server(interceptors=[TokenAuth(token)], options=SERVER_OPTIONS)
    service.add_to_server(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    await service.start()
    try:
        yield SenderHost(pool, sender, service, f"127.0.0.1:{port}", released)
    finally:
        await service.stop()
        await server.stop(0)
        pool.close()


@contextlib.asynccontextmanager
async def receiving(
    shm_dir: Path | None = None,
    *,
    layout: KVLayout = LAYOUT,
    num_blocks: int = 128,
    token: str = TOKEN,
    te_id: str = "te-d",
    wrap: Callable[[HostPool], Any] = lambda pool: pool,
    **options: Any,
) -> AsyncIterator[tuple[Receiver, HostPool]]:
    pool = HostPool.create(layout, num_blocks)
    receiver = Receiver(wrap(pool), te_id, "d1", token=token, shm_dir=shm_dir, **options)
    try:
        yield receiver, pool
    finally:
        await receiver.close()
        pool.close()


class SenderProcess:
    """A sender in a process of its own, which can be killed or stopped. Calls are the Sender's methods."""

    def __init__(self, shm_dir: Path | None, **options: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_main, args=(theirs, shm_dir, options), daemon=True)
        self.process.start()
        theirs.close()
        assert self._pipe.poll(60)
        self.address, self.fd_path = self._pipe.recv()

    def __call__(self, method: str, *args: Any) -> Any:
        self._pipe.send((method, args))
        assert self._pipe.poll(10), f"{method} does not answer"
        result = self._pipe.recv()
        if isinstance(result, Exception):
            raise result
        return result

    def offer_all(self, transfer_id: str, blocks: Sequence[int], tokens: int) -> None:
        self("offer", transfer_id)
        self("announce", transfer_id, 0, list(blocks), tokens)
        self("complete", transfer_id, tokens)

    async def pull(
        self, receiver: Receiver, transfer_id: str, dst: Sequence[int], length: int, **kwargs: Any
    ) -> PullResult:
        return await receiver.pull(self.address, "te-p", "p1", transfer_id, dst, length, **kwargs)

    def __enter__(self) -> SenderProcess:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def kill(self) -> None:
        self.process.kill()
        self.process.join(10)

    def close(self) -> None:
        self.kill()
        self._pipe.close()
        self.process.close()


def _main(pipe: Connection, shm_dir: Path | None, options: dict[str, Any]) -> None:
    asyncio.run(_serve(pipe, shm_dir, options))


async def _serve(pipe: Connection, shm_dir: Path | None, options: dict[str, Any]) -> None:
    delay = options.pop("staged_delay", None)
    if delay is not None:
        options["wrap"] = lambda pool: StagedStore(pool, delay)
    async with serving(shm_dir, **options) as host:
        pipe.send((host.address, f"/proc/{os.getpid()}/fd/{host.pool.fd}"))
        own: dict[str, Callable[..., Any]] = {
            "bump": host.pool.bump,
            "released": lambda: list(host.released),
            "digest": lambda blocks: block_bytes(host.pool, blocks),
            "active": lambda: host.sender.active,
        }

        def answer() -> None:
            """The engine's thread of this process."""
            while True:
                method, args = pipe.recv()
                call = own.get(method) or getattr(host.sender, method)
                try:
                    result = call(*args)
                except Exception as error:
                    result = error
                pipe.send(result)

        await asyncio.to_thread(answer)
