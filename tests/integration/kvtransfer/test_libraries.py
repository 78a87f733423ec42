"""The plug of one-sided libraries: real NIXL where it is installed, and one that reads our own memory."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvtransfer.errors import TransferError, TransferErrorCode
from kvtransfer.transports import onesided
from tests.support.kv import LAYOUT, SenderProcess, StagedStore, block_bytes, receiving, serving

BLOCKS = list(range(0, 120, 3))
TOKENS = len(BLOCKS) * LAYOUT.block_tokens


class Neighbour:
    """Reads the memory of this process: what a library does, without the network."""

    before_read: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self, name: str) -> None:
        self.name = name
        self.registered: list[tuple[int, int]] = []

    def register(self, address: int, size: int) -> None:
        self.registered.append((address, size))

    def describe(self) -> bytes:
        return self.name.encode()

    def connect(self, description: bytes) -> str:
        return description.decode()

    def read(self, peer: str, rows: np.ndarray, deadline: float) -> None:
        Neighbour.before_read()
        for remote, local, size in rows.tolist():
            assert any(base <= local and local + size <= base + length for base, length in self.registered)
            ctypes.memmove(local, remote, size)


@pytest.fixture
def neighbour(monkeypatch: pytest.MonkeyPatch) -> type[Neighbour]:
    monkeypatch.setitem(onesided.LIBRARIES, "nixl", Neighbour)
    monkeypatch.setattr(Neighbour, "before_read", staticmethod(lambda: None))
    monkeypatch.setattr(onesided, "STAGED_BYTES", 7 * LAYOUT.block_bytes)
    return Neighbour


@pytest.mark.parametrize("staged", [False, True], ids=["host", "device"])
async def test_pages_arrive_through_the_staging_buffer(
    tmp_path: Path, neighbour: type[Neighbour], staged: bool
) -> None:
    wrap: Any = StagedStore if staged else lambda pool: pool
    async with (
        serving(tmp_path, library="nixl") as host,
        receiving(tmp_path, transports="nixl", wrap=wrap) as (receiver, pool),
    ):
        for number in range(2):
            host.offer_all(f"t{number}", BLOCKS, TOKENS)
            result = await host.pull(receiver, f"t{number}", BLOCKS[::-1], TOKENS)
            assert result.transport == "nixl"
        assert block_bytes(pool, BLOCKS[::-1]) == block_bytes(host.pool, BLOCKS)


async def test_blocks_reused_while_the_library_reads_reach_no_pool(
    tmp_path: Path, neighbour: type[Neighbour], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tmp_path, library="nixl") as host:
        monkeypatch.setattr(neighbour, "before_read", staticmethod(lambda: host.pool.bump(BLOCKS[0])))
        async with receiving(tmp_path, transports="nixl") as (receiver, pool):
            host.offer_all("t", BLOCKS, TOKENS)
            with pytest.raises(TransferError) as raised:
                await host.pull(receiver, "t", BLOCKS, TOKENS)
            assert raised.value.code is TransferErrorCode.GENERATION_MOVED
            assert not any(pool.pages)


async def test_a_read_that_does_not_end_gives_its_buffer_up(
    tmp_path: Path, neighbour: type[Neighbour], monkeypatch: pytest.MonkeyPatch
) -> None:
    def hang() -> None:
        raise TimeoutError("no end")

    monkeypatch.setattr(onesided, "_given_up", [])
    async with (
        serving(tmp_path, library="nixl") as host,
        receiving(tmp_path, transports="nixl") as (receiver, pool),
    ):
        monkeypatch.setattr(neighbour, "before_read", staticmethod(hang))
        host.offer_all("t", BLOCKS, TOKENS)
        with pytest.raises(TransferError) as raised:
            await host.pull(receiver, "t", BLOCKS, TOKENS)
        assert raised.value.code is TransferErrorCode.PEER_LOST
        assert len(onesided._given_up) == 1
        monkeypatch.setattr(neighbour, "before_read", staticmethod(lambda: None))
        host.offer_all("u", BLOCKS, TOKENS)
        await host.pull(receiver, "u", BLOCKS, TOKENS)  # a new handshake, a new buffer
        assert block_bytes(pool, BLOCKS) == block_bytes(host.pool, BLOCKS)


async def test_a_library_that_is_not_there_is_named(tmp_path: Path) -> None:
    if importlib.util.find_spec("mooncake") is not None:
        pytest.skip("Mooncake is installed here")
    async with (
        serving(tmp_path, library="mooncake") as host,
        receiving(tmp_path, transports="mooncake") as (receiver, _pool),
    ):
        host.offer_all("t", [1], 16)
        with pytest.raises(TransferError, match="mooncake is demanded but"):
            await host.pull(receiver, "t", [1], 16)


@pytest.mark.parametrize(
    ("library", "module"), [("nixl", "nixl._api"), ("mooncake", "mooncake.engine")], ids=["nixl", "mooncake"]
)
async def test_an_installed_library_reads_another_process(tmp_path: Path, library: Any, module: str) -> None:
    pytest.importorskip(module, exc_type=ImportError)
    with SenderProcess(tmp_path, library=library) as process:
        async with receiving(tmp_path, transports=library) as (receiver, pool):
            process.offer_all("t", BLOCKS, TOKENS)
            result = await process.pull(receiver, "t", BLOCKS, TOKENS)
            assert result.transport == library
            assert block_bytes(pool, BLOCKS) == process("digest", BLOCKS)
            process("offer", "u")
            process("announce", "u", 0, BLOCKS, TOKENS)
            process("bump", BLOCKS[1])
            process("complete", "u", TOKENS)
            with pytest.raises(TransferError) as raised:
                await process.pull(receiver, "u", BLOCKS, TOKENS)
            assert raised.value.code is TransferErrorCode.GENERATION_MOVED
