"""The embedded Valkey: real servers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import redis

from controlplane.local.valkey import ValkeyError, ValkeyServer, ping, server_command


def _client(server: ValkeyServer) -> redis.Redis:
    return redis.Redis.from_url(server.url)


def test_data_survives_a_restart(valkey_server: Callable[[], ValkeyServer]) -> None:
    server = valkey_server()
    with _client(server) as client:
        client.set("job", "durable")
    server.restart()
    with _client(server) as client:
        assert client.get("job") == b"durable"


def test_never_evicts_and_opens_no_tcp_port(valkey_server: Callable[[], ValkeyServer]) -> None:
    with _client(valkey_server()) as client:
        wanted = {"maxmemory-policy": "noeviction", "appendonly": "yes", "port": "0"}
        assert {key: client.config_get(key)[key] for key in wanted} == wanted


def test_a_stopped_server_leaves_no_socket_and_says_so(valkey_server: Callable[[], ValkeyServer]) -> None:
    server = valkey_server()
    server.stop()
    assert not server.socket_path.exists()
    assert ping(server.url) is not None


def test_a_killed_server_starts_again(valkey_server: Callable[[], ValkeyServer]) -> None:
    server = valkey_server()
    server.kill()
    server.start()
    assert ping(server.url) is None


def test_a_socket_path_too_long_for_the_system_is_refused() -> None:
    with pytest.raises(ValkeyError, match="longer than"):
        server_command(Path("/tmp"), Path("/tmp/" + "x" * 120))


def test_the_shared_server_is_clean(clean_valkey: str) -> None:
    with redis.Redis.from_url(clean_valkey) as client:
        assert client.dbsize() == 0
