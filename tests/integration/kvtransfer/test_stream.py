"""The data sockets against peers that misbehave: bounded, refused with a reason, never a wrong byte."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from deepflow.v1 import kvtransfer_pb2 as pb

from kvtransfer.errors import TransferError, TransferErrorCode, TransportUnavailable
from kvtransfer.pool import HostPool
from kvtransfer.runs import Move
from kvtransfer.sender import Sender
from kvtransfer.transports import stream_server
from kvtransfer.transports import stream_wire as wire
from kvtransfer.transports.base import Job
from kvtransfer.transports.stream import StreamEnd, StreamTransport, read_exactly
from kvtransfer.transports.stream_server import StreamServer
from tests.support.kv import LAYOUT, TOKEN, block_bytes, fill_random

BLOCKS = 64


@contextlib.asynccontextmanager
async def streaming() -> AsyncIterator[tuple[Sender, HostPool, tuple[str, int]]]:
    """A sender with one complete transfer "t" of all its blocks, served over TCP."""
    pool = HostPool.create(LAYOUT, BLOCKS)
    fill_random(pool, 5)
    sender = Sender(pool, "te-p", "p1", on_released=lambda *_: None)
    server = StreamServer(sender, TOKEN)
    port = server.listen_tcp("127.0.0.1", 0)
    sender.offer("t")
    sender.announce("t", 0, list(range(BLOCKS)), BLOCKS * LAYOUT.block_tokens)
    sender.complete("t", BLOCKS * LAYOUT.block_tokens)
    try:
        yield sender, pool, ("127.0.0.1", port)
    finally:
        await server.stop()
        pool.close()


@contextlib.contextmanager
def job_into(pool: HostPool, moves: list[Move], checksum: bool = True):  # type: ignore[no-untyped-def]  # of tests
    workers = ThreadPoolExecutor(2)
    blocks = [block for move in moves for block in range(move.src, move.src + move.count)]
    try:
        yield workers, Job("t", "te-d/d1", moves, dict.fromkeys(blocks, 0), pool, checksum, lambda: 10.0)
    finally:
        workers.shutdown()


def end(address: tuple[str, int], token: str = TOKEN, incarnation: str = "p1") -> StreamEnd:
    return StreamEnd("tcp", address, incarnation, token)


async def connected(address: tuple[str, int]) -> socket.socket:
    connection = socket.socket()
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, address)
    return connection


async def test_one_connection_serves_copy_after_copy() -> None:
    async with streaming() as (_sender, source, address):
        pool = HostPool.create(LAYOUT, BLOCKS)
        with job_into(pool, [Move(0, 10, 20), Move(40, 3, 5)]) as (workers, job):
            transport = await StreamTransport.open(end(address), workers, 5.0)
            for _ in range(3):
                await transport.copy(job)
            assert len(transport._idle) == 1
            await transport.close()
            assert block_bytes(pool, range(10, 30)) == block_bytes(source, range(20))
            assert block_bytes(pool, range(3, 8)) == block_bytes(source, range(40, 45))
        pool.close()


async def test_a_connection_that_the_sender_closed_meanwhile_is_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stream_server, "IDLE_SECONDS", 0.05)
    async with streaming() as (_sender, source, address):
        pool = HostPool.create(LAYOUT, BLOCKS)
        with job_into(pool, [Move(0, 0, BLOCKS)]) as (workers, job):
            transport = await StreamTransport.open(end(address), workers, 5.0)
            await asyncio.sleep(0.2)
            await transport.copy(job)
            assert bytes(pool.pages) == bytes(source.pages)
            await transport.close()
        pool.close()


@pytest.mark.parametrize(
    ("token", "incarnation", "reason"),
    [("wrong", "p1", "wrong cluster token"), (TOKEN, "p0", "another incarnation"), ("", "p1", "token")],
)
async def test_who_cannot_prove_the_token_reads_nothing(token: str, incarnation: str, reason: str) -> None:
    async with streaming() as (_sender, _pool, address):
        with ThreadPoolExecutor(1) as workers, pytest.raises(TransportUnavailable, match=reason) as raised:
            await StreamTransport.open(end(address, token, incarnation), workers, 5.0)
        assert raised.value.reason == "refused"


async def test_what_is_no_kv_sender_is_not_told_the_token() -> None:
    heard = b""

    async def stranger(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal heard
        writer.write(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")
        heard = await reader.read()
        writer.close()

    server = await asyncio.start_server(stranger, "127.0.0.1", 0)
    async with server:
        address = server.sockets[0].getsockname()
        with ThreadPoolExecutor(1) as workers, pytest.raises(TransportUnavailable, match="no KV sender"):
            await StreamTransport.open(end(address), workers, 5.0)
    assert heard == b""


async def test_lengths_beyond_their_bounds_end_the_connection() -> None:
    async with streaming() as (_sender, _pool, address):
        loop = asyncio.get_running_loop()
        oversized = wire.HELLO.pack(bytes(32), wire.MAX_INCARNATION_BYTES + 1)
        for message in (oversized, b"\0" * 7):
            with await connected(address) as connection:
                await read_exactly(connection, wire.GREETING.size)
                await loop.sock_sendall(connection, message)
                connection.shutdown(socket.SHUT_WR)
                assert await asyncio.wait_for(loop.sock_recv(connection, 1), 5) == b""
        for request in (wire.LENGTH.pack(wire.MAX_REQUEST_BYTES + 1), wire.LENGTH.pack(4) + b"\xff" * 4):
            with await connected(address) as connection:
                nonce = wire.check_greeting(await read_exactly(connection, wire.GREETING.size))
                hello = wire.HELLO.pack(wire.mac(TOKEN, nonce, b"p1"), 2) + b"p1"
                await loop.sock_sendall(connection, hello)
                await read_exactly(connection, wire.STATUS.size)
                await loop.sock_sendall(connection, request)
                assert await asyncio.wait_for(loop.sock_recv(connection, 1), 5) == b""


async def test_blocks_that_were_not_announced_are_not_sent() -> None:
    async with streaming() as (sender, _source, address):
        sender.offer("u")
        sender.announce("u", 0, [1], 16)
        pool = HostPool.create(LAYOUT, BLOCKS)
        with job_into(pool, [Move(1, 0, 2)]) as (workers, job):
            transport = await StreamTransport.open(end(address), workers, 5.0)
            other = Job("u", job.receiver, job.moves, job.generations, pool, False, job.timeout)
            with pytest.raises(TransferError, match="does not have") as raised:
                await transport.copy(other)
            assert raised.value.code is TransferErrorCode.ABORTED
            assert bytes(pool.pages) == bytes(len(pool.pages))
            await transport.close()
        pool.close()


async def test_a_sender_that_stalls_is_lost_within_the_bound() -> None:
    async with streaming() as (_sender, _source, address):
        pool = HostPool.create(LAYOUT, BLOCKS)
        with job_into(pool, [Move(0, 0, BLOCKS)]) as (workers, job):
            transport = await StreamTransport.open(end(address), workers, 0.2)
            ours, theirs = socket.socketpair()  # accepts the request and never answers
            for half in (ours, theirs):
                half.setblocking(False)
            transport._idle[-1].close()
            transport._idle[-1] = ours
            with pytest.raises(TransferError, match="no byte in") as raised:
                await transport.copy(job)
            assert raised.value.code is TransferErrorCode.PEER_LOST
            theirs.close()
            await transport.close()
        pool.close()


@pytest.mark.parametrize("damage", [0, 1])
async def test_bytes_that_change_on_the_way_are_noticed(damage: int) -> None:
    """A relay between both ends flips a bit in the payload's middle."""
    async with streaming() as (_sender, _source, address):

        async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            there_reader, there_writer = await asyncio.open_connection(*address)

            async def down() -> None:
                at = 0
                while piece := bytearray(await there_reader.read(1 << 16)):
                    if at <= 100_000 < at + len(piece):
                        piece[100_000 - at] ^= damage
                    at += len(piece)
                    writer.write(piece)
                writer.close()

            pump = asyncio.create_task(down())
            while piece := await reader.read(1 << 16):
                there_writer.write(piece)
            there_writer.close()
            await pump

        server = await asyncio.start_server(relay, "127.0.0.1", 0)
        pool = HostPool.create(LAYOUT, BLOCKS)
        async with server:
            with job_into(pool, [Move(0, 0, BLOCKS)]) as (workers, job):
                transport = await StreamTransport.open(end(server.sockets[0].getsockname()), workers, 5.0)
                if damage:
                    with pytest.raises(TransferError) as raised:
                        await transport.copy(job)
                    assert raised.value.code is TransferErrorCode.CHECKSUM
                else:
                    await transport.copy(job)
                await transport.close()
        pool.close()


async def test_a_listener_gives_its_sockets_back(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    sender = Sender(None, "te-p", "p1", on_released=lambda *_: None)
    server = StreamServer(sender, TOKEN)
    server.listen_unix(tmp_path / "x.sock")
    port = server.listen_tcp("127.0.0.1", 0)
    with await connected(("127.0.0.1", port)) as connection:
        await read_exactly(connection, wire.GREETING.size)
        await server.stop()
    assert os.listdir(tmp_path) == []
    assert len(os.listdir("/proc/self/fd")) <= before
    with pytest.raises(OSError):
        await connected(("127.0.0.1", port))


async def test_a_malformed_request_leaves_the_transfer_alone() -> None:
    async with streaming() as (sender, _pool, address):
        with await connected(address) as connection:
            await read_exactly(connection, wire.GREETING.size)
        request = pb.ReadRequest(
            transfer_id="t", receiver="te-d/d1", runs=[pb.BlockRun(start=0, count=2**32 - 1)]
        )
        with ThreadPoolExecutor(1) as workers:
            transport = await StreamTransport.open(end(address), workers, 5.0)
            connection = transport._idle[0]
            loop = asyncio.get_running_loop()
            data = request.SerializeToString()
            await loop.sock_sendall(connection, wire.LENGTH.pack(len(data)) + data)
            status, _ = wire.unpack_status(await read_exactly(connection, wire.STATUS.size))
            assert status.code is TransferErrorCode.ABORTED
            await transport.close()
        assert sender.active == 1
