"""The Valkey of a pod: a real server, reached over TCP with its password, and behind TLS."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import redis
import redis.asyncio

from controlplane.local.tlsfront import Front
from controlplane.local.valkey import ValkeyError
from controlplane.local.valkeyd import PASSWORD_ENV, configuration
from kvtransfer.tls import Tls
from tests.support.certificates import Authority

PASSWORD = "0123456789abcdefXYZ"


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        found: int = probe.getsockname()[1]
        return found


def start(folder: Path, port: int) -> subprocess.Popen[bytes]:
    command = [
        sys.executable,
        "-P",
        "-m",
        "controlplane.local.valkeyd",
        "--dir",
        str(folder),
        "--port",
        str(port),
        "--loopback",
    ]
    env = {**os.environ, PASSWORD_ENV: PASSWORD}
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


@pytest.fixture
def server(tmp_path: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    process = start(tmp_path, port)
    yield process
    process.kill()
    process.communicate()


def connected(port: int, password: str | None) -> redis.Redis:
    client = redis.Redis(port=port, password=password, socket_timeout=5)
    deadline = time.monotonic() + 20
    while True:
        try:
            client.ping()
        except redis.AuthenticationError:
            raise
        except redis.ConnectionError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        else:
            return client


def test_it_wants_its_password_keeps_data_and_shows_no_secret(
    server: subprocess.Popen[bytes], tmp_path: Path, port: int
) -> None:
    with connected(port, PASSWORD) as client:
        client.set("a", "b")
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
    with pytest.raises(redis.AuthenticationError):
        connected(port, None)
    process = Path(f"/proc/{server.pid}")
    assert PASSWORD.encode() not in (process / "cmdline").read_bytes()
    assert PASSWORD.encode() not in (process / "environ").read_bytes()
    server.terminate()
    assert server.wait(20) == 0
    again = start(tmp_path, port)
    try:
        with connected(port, PASSWORD) as client:
            assert client.get("a") == b"b"
    finally:
        again.kill()
        again.communicate()


@pytest.mark.parametrize("password", ["", "short", "0123456789abcdef\nport 1", "0123456789 abcdef"])
def test_a_password_that_is_none_is_refused(password: str) -> None:
    with pytest.raises(ValkeyError, match="letters and digits"):
        configuration(Path("/data"), 6379, password)


@pytest.fixture
async def front(
    server: subprocess.Popen[bytes], port: int, tmp_path: Path
) -> AsyncIterator[tuple[int, Authority]]:
    connected(port, PASSWORD).close()
    authority = Authority(tmp_path / "authority")
    made = Front(Tls(authority.write(tmp_path / "valkey")), ("127.0.0.1", port))
    yield await made.start("127.0.0.1", 0), authority
    await made.stop()


def url_of(port: int, folder: Path, *, certificate: bool = True) -> str:
    """As the chart writes it."""
    parts = [f"ssl_ca_certs={folder}/ca.crt"]
    if certificate:
        parts += [f"ssl_certfile={folder}/tls.crt", f"ssl_keyfile={folder}/tls.key"]
    return f"rediss://:{PASSWORD}@localhost:{port}/0?{'&'.join(parts)}"


async def test_clients_with_a_certificate_use_it_as_any_redis(
    front: tuple[int, Authority], tmp_path: Path
) -> None:
    port, authority = front
    client = redis.asyncio.Redis.from_url(url_of(port, authority.write(tmp_path / "client")))
    big = b"x" * 3_000_000
    await client.set("key", big)
    assert await client.get("key") == big
    follower = client.pubsub()
    await follower.subscribe("hints")
    await follower.get_message(timeout=5)
    await client.publish("hints", b"look")
    assert (await follower.get_message(timeout=5) or {})["data"] == b"look"
    await follower.aclose()
    await client.aclose()


async def test_nobody_else_gets_a_word(front: tuple[int, Authority], tmp_path: Path) -> None:
    port, authority = front
    folder = authority.write(tmp_path / "client")
    strange = Authority(tmp_path / "other").write(tmp_path / "stranger")
    plain = f"redis://:{PASSWORD}@localhost:{port}/0"
    for url in (url_of(port, folder, certificate=False), url_of(port, strange), plain):
        client = redis.asyncio.Redis.from_url(url, socket_timeout=3, retry_on_error=[])
        with pytest.raises((redis.ConnectionError, TimeoutError)):
            await client.ping()
        await client.aclose()
