"""Set-up: the second start is quick, `down` leaves no process, socket or shared memory."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import psutil
import pytest

from tests.support.stack import Stack, free_port

pytestmark = [pytest.mark.model]


def shared_memory() -> set[str]:
    """Named segments, and the memory files that some process still holds."""
    names = {path.name for path in Path("/dev/shm").iterdir()} if Path("/dev/shm").exists() else set()
    for process in psutil.process_iter():
        try:
            links = [link.readlink().name for link in Path(f"/proc/{process.pid}/fd").iterdir()]
        except OSError:
            continue
        names |= {f"{process.pid}:{link}" for link in links if link.startswith("memfd:deepflow")}
    return names


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
    before = shared_memory()
    try:
        stack.up("--topology", "1P1D", "--kv-cache-bytes", "128M", "--gateways", "2")
        pids = stack.pids()
        assert len(pids) == 6, "supervisor, Valkey, two executors, two gateways"
        assert shared_memory() - before, "the pools are shared memory"
        again = stack.up("--topology", "1P1D")  # idempotent: it runs already
        assert again < 15
        stack.down()
        assert [pid for pid in pids if alive(pid)] == []
        assert shared_memory() <= before
        assert sorted(path.name for path in root.iterdir() if path.is_socket()) == []
        assert not any(path.is_socket() for path in stack.paths.sockets.glob("*"))
    finally:
        stack.down()
        shutil.rmtree(root, ignore_errors=True)
