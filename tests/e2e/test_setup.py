"""Set-up: the second start is quick, `down` leaves no process, socket or shared memory."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path

import psutil
import pytest

from tests.support.stack import Stack, free_port

pytestmark = [pytest.mark.model]


def segments() -> set[str]:
    """Named shared-memory segments of the machine."""
    folder = Path("/dev/shm")
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def pools(pids: list[int]) -> list[str]:
    """KV pools (memory files) that these processes hold."""
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):
            links = [link.readlink().name for link in Path(f"/proc/{pid}/fd").iterdir()]
            found += [link for link in links if link.startswith("memfd:deepflow")]
    return found


def alive(pid: int) -> bool:
    """An ended process that its new parent has not collected yet is not alive."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.timeout(180)
def test_up_and_down_leave_nothing_but_data_and_logs(small_model_path: Path) -> None:
    root = Path(tempfile.mkdtemp(prefix="dfs-"))
    stack = Stack(root, free_port())
    before = segments()
    try:
        stack.up("--topology", "1P1D", "--kv-cache-bytes", "128M", "--gateways", "2")
        pids = stack.pids()
        assert len(pids) == 7, "supervisor, template, Valkey, two executors, two gateways"
        assert len(pools(pids)) >= 2, "the pools are shared memory"
        again = stack.up("--topology", "1P1D")  # idempotent: it runs already
        assert again < 15
        stack.down()
        assert [pid for pid in pids if alive(pid)] == []
        assert pools(pids) == []
        assert segments() <= before
        assert sorted(path.name for path in root.iterdir() if path.is_socket()) == []
        assert not any(path.is_socket() for path in stack.paths.sockets.glob("*"))
    finally:
        stack.down()
        shutil.rmtree(root, ignore_errors=True)
