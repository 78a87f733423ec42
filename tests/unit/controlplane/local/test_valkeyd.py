"""The Valkey of a pod: a real server, reached over TCP with its password."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from controlplane.local.valkey import ValkeyError
from controlplane.local.valkeyd import PASSWORD_ENV, configuration

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
