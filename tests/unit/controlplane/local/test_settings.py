"""Defaults, the state folder's layout, and settings on their way into a detached supervisor."""

from __future__ import annotations

import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from controlplane.local.executors import RoleEpochs
from controlplane.local.settings import (
    DEFAULT_KV_BYTES,
    MIN_KV_BYTES,
    ModelSpec,
    StackSettings,
    StatePaths,
    default_kv_bytes,
    threads_per_executor,
)
from controlplane.local.topology import parse_topology
from controlplane.local.valkey import MAX_SOCKET_PATH


def test_settings_survive_json() -> None:
    spec = ModelSpec("file:///a.gguf", "a", parse_topology("1P1D"), ("b",))
    settings = StackSettings(state_dir=Path("/s"), models=(spec,), port=9, threads=2, redis_url="redis://x")
    assert StackSettings.load(json.loads(json.dumps(settings.dump()))) == settings


def test_a_client_is_told_an_address_it_can_reach() -> None:
    def url(host: str) -> str:
        return StackSettings(state_dir=Path("/s"), models=(), host=host, port=9).url

    assert [url(host) for host in ("127.0.0.1", "0.0.0.0", "::", "::1")] == [
        "http://127.0.0.1:9",
        "http://127.0.0.1:9",
        "http://[::1]:9",
        "http://[::1]:9",
    ]


@given(st.integers(1, 64), st.integers(0, 1 << 42))
def test_kv_pools_fit_the_free_memory_or_are_the_smallest(executors: int, available: int) -> None:
    size = default_kv_bytes(executors, available)
    assert MIN_KV_BYTES <= size <= DEFAULT_KV_BYTES
    assert size == MIN_KV_BYTES or size * executors <= available // 2


@given(st.integers(1, 64), st.integers(1, 256))
def test_threads_never_exceed_the_cores_unless_executors_do(executors: int, cores: int) -> None:
    threads = threads_per_executor(executors, cores)
    assert threads >= 1
    assert threads * executors <= max(cores, executors)


def test_sockets_move_to_a_short_path_when_the_state_folder_is_deep(tmp_path: Path) -> None:
    deep = StatePaths(tmp_path / ("x" * 120))
    for paths in (deep, StatePaths(Path("/s"))):
        assert len(str(paths.valkey_socket)) <= MAX_SOCKET_PATH
    assert deep.sockets != StatePaths(tmp_path / ("y" * 120)).sockets


def test_epochs_only_grow_over_restarts_and_foreign_leaders(tmp_path: Path) -> None:
    epochs = RoleEpochs(tmp_path / "epoch")
    given_out = [epochs.next(), epochs.next(), epochs.next(above=100)]
    again = RoleEpochs(tmp_path / "epoch")
    given_out += [again.next(), again.next(above=5)]
    assert given_out == sorted(set(given_out))
    assert given_out[2] > 100
