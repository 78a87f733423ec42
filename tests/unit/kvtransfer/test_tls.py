"""TLS of gRPC and of plain streams with real certificates: who is let in, and renewed ones."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from deepflow.v1.worker_pb2 import AbortTask, TasksRequest

from flowserve.shell import health
from kvtransfer.auth import call_metadata
from kvtransfer.channel import SERVER_OPTIONS, add_port, open_channel
from kvtransfer.framed import StreamServer, open_stream
from kvtransfer.tls import SERVER_NAME, Tls, TlsError, from_environment
from tests.support.certificates import Authority

TOKEN = "secret"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


@asynccontextmanager
async def grpc_server(tls: Tls | None) -> AsyncIterator[str]:
    server = grpc.aio.server(options=SERVER_OPTIONS)
    health.add_to_server(server, alive=lambda: True, ready=lambda: True)
    port = add_port(server, "127.0.0.1:0", tls)
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def answers(address: str, tls: Tls | None) -> bool:
    async with open_channel(address, tls) as channel:
        check: Any = channel.unary_unary(f"{health.METHODS}Check")
        try:
            return bool(await check(b"", timeout=3) == health.SERVING)
        except grpc.aio.AioRpcError as error:
            assert error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
            return False


@asynccontextmanager
async def stream_server(tls: Tls) -> AsyncIterator[str]:
    async def echo(requests: AsyncIterator[TasksRequest], context: Any) -> None:
        async for request in requests:
            await context.write(request)

    server = StreamServer(echo, TasksRequest.FromString, token=TOKEN, tls=tls)
    port = await server.start("127.0.0.1")
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop()


async def echoes(address: str, tls: Tls | None, size: int = 10) -> bool:
    try:
        stream = await open_stream(address, call_metadata(TOKEN), TasksRequest.FromString, seconds=3, tls=tls)
        message = TasksRequest(abort=AbortTask(task_id="x" * size))
        await stream.write(message)
        async with asyncio.timeout(3):
            return await anext(stream) == message
    except (OSError, StopAsyncIteration, TimeoutError, asyncio.InvalidStateError):
        return False


async def test_who_has_a_certificate_of_the_authority_is_let_in_and_nobody_else(
    authority: Authority, tmp_path: Path
) -> None:
    server, client = Tls(authority.write(tmp_path / "server")), Tls(authority.write(tmp_path / "client"))
    other = Authority(tmp_path / "other")
    strange = Tls(other.write(tmp_path / "stranger"))
    # Trusts the right authority, and shows a certificate of another.
    mixed = other.write(tmp_path / "mixed")
    (mixed / "ca.crt").write_bytes((tmp_path / "server" / "ca.crt").read_bytes())
    async with grpc_server(server) as over_grpc, stream_server(server) as plain:
        assert await answers(over_grpc, client)
        assert await echoes(plain, client) and await echoes(plain, client, 3_000_000)
        for wrong in (None, strange, Tls(mixed)):
            assert not await answers(over_grpc, wrong)
            assert not await echoes(plain, wrong)


async def test_a_server_of_another_name_is_not_believed(authority: Authority, tmp_path: Path) -> None:
    server = Tls(authority.write(tmp_path / "server", "somebody.else"))
    client = Tls(authority.write(tmp_path / "client"))
    async with grpc_server(server) as over_grpc, stream_server(server) as plain:
        assert not await answers(over_grpc, client)
        assert not await echoes(plain, client)


async def test_renewed_certificates_are_taken_without_a_restart(authority: Authority, tmp_path: Path) -> None:
    folder, client = tmp_path / "server", Tls(authority.write(tmp_path / "client"))
    server = Tls(authority.write(folder, "not.yet.right"))
    async with grpc_server(server) as over_grpc, stream_server(server) as plain:
        assert not await answers(over_grpc, client) and not await echoes(plain, client)
        authority.write(folder)
        os.utime(folder / "tls.crt", (2e9, 2e9))
        assert not await echoes(plain, client)  # this handshake finds them, and the next has them
        assert await answers(over_grpc, client) and await echoes(plain, client)
        (folder / "tls.crt").write_text("half of a cer")  # while it is exchanged
        assert await answers(over_grpc, client) and await echoes(plain, client)


def test_certificates_that_cannot_be_used_are_told_at_once(authority: Authority, tmp_path: Path) -> None:
    assert from_environment({}) is None
    with pytest.raises(TlsError, match="none"):
        from_environment({"DEEPFLOW_TLS_DIR": str(tmp_path / "none")})
    folder = authority.write(tmp_path / "mixed")
    (folder / "tls.key").write_bytes((authority.write(tmp_path / "other") / "tls.key").read_bytes())
    with pytest.raises(TlsError, match="mixed"):
        Tls(folder)


def test_contexts_want_a_certificate_and_the_name(authority: Authority, tmp_path: Path) -> None:
    tls = Tls(authority.write(tmp_path / "one"))
    assert tls.server_context().verify_mode is ssl.CERT_REQUIRED
    assert tls.client_context().check_hostname and tls.client_context() is tls.client_context()
    assert SERVER_NAME == "deepflow.internal"  # written in certificates of clusters: never changed
