"""Children: restart, back-off, stop and kill, with small Python processes."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from controlplane.local import children as module
from controlplane.local.children import Child, ChildSpec, backoff_seconds
from controlplane.local.processes import ProcessRecord, end_all, is_running

SLEEP = "import time; time.sleep(60)"


def _child(tmp_path: Path, code: str, stop_seconds: float = 5.0) -> Child:
    spec = ChildSpec(
        name="child",
        kind="executor",
        command=(sys.executable, "-c", code),
        env=dict(os.environ),
        log=tmp_path / "child.log",
        stop_seconds=stop_seconds,
    )
    return Child(spec, lambda: None)


@asynccontextmanager
async def _running(child: Child) -> AsyncIterator[Child]:
    task = asyncio.create_task(child.run())
    try:
        yield child
    finally:
        await child.stop()
        await asyncio.wait_for(task, 10)
        assert child.state == "stopped"


async def _until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


def _gone(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_backoff_doubles_from_half_a_second_to_thirty() -> None:
    waits = [backoff_seconds(failures) for failures in range(10)]
    assert waits[:4] == [0.0, 0.5, 1.0, 2.0]
    assert waits == sorted(waits)
    assert backoff_seconds(10_000) == 30.0


async def test_a_killed_child_is_started_again(tmp_path: Path) -> None:
    async with _running(_child(tmp_path, SLEEP)) as child:
        await _until(lambda: child.record)
        first = child.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        await _until(lambda: child.pid not in (None, first))
        assert child.restarts == 1
        assert child.last_exit == "was ended by SIGKILL"


async def test_a_child_that_keeps_ending_is_started_ever_more_slowly(tmp_path: Path) -> None:
    async with _running(_child(tmp_path, "print('broken'); raise SystemExit(3)")) as child:
        started = time.monotonic()
        await _until(lambda: child.restarts == 3)
        assert time.monotonic() - started >= backoff_seconds(1) + backoff_seconds(2)
        assert child.last_exit == "exited with code 3"
        assert child.log_tail().splitlines() == ["broken"] * 3


async def test_a_command_that_does_not_exist_is_a_failure_like_any_other(tmp_path: Path) -> None:
    child = _child(tmp_path, SLEEP)
    child.spec = ChildSpec(
        name="x",
        kind="gateway",
        command=("/no/such/command",),
        env={},
        log=tmp_path / "x.log",
        stop_seconds=1,
    )
    async with _running(child):
        await _until(lambda: child.restarts == 1)


async def test_a_child_that_ignores_sigterm_is_killed_after_its_bound(tmp_path: Path) -> None:
    code = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); {SLEEP}"
    async with _running(_child(tmp_path, code, stop_seconds=0.3)) as child:
        await _until(lambda: "deaf" in child.log_tail())
        record = child.record
        assert record is not None
        await child.stop()
        assert not is_running(record)


async def test_what_a_child_started_ends_with_it(tmp_path: Path) -> None:
    code = (
        f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {SLEEP!r}]);"
        f"print(p.pid, flush=True); {SLEEP}"
    )
    async with _running(_child(tmp_path, code)) as child:
        await _until(child.log_tail)
        grandchild = psutil.Process(int(child.log_tail()))
    await _until(lambda: _gone(grandchild))


async def test_a_log_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOG_BYTES", 1000)
    code = "import time\nfor i in range(10**6):\n  print(i, flush=True)\n  time.sleep(0.0005)"
    async with _running(_child(tmp_path, code)) as child:
        for _ in range(3):
            await _until(lambda: child.spec.log.exists() and child.spec.log.stat().st_size > 1000)
            child.rotate_log()
    assert (tmp_path / "child.log.1").stat().st_size == 1000
    assert b"\0" not in child.spec.log.read_bytes()  # the child went on writing at the start


async def test_only_the_recorded_process_is_ended(tmp_path: Path) -> None:
    async with _running(_child(tmp_path, SLEEP)) as child:
        await _until(lambda: child.record)
        record = child.record
        assert record is not None
        other_start = ProcessRecord(record.pid, record.started - 100, record.command)
        other_command = ProcessRecord(record.pid, record.started, ("sleep", "60"))
        assert end_all([other_start, other_command], 0.1) == []
        assert is_running(record)
        assert ProcessRecord.load(record.dump()) == record
        assert await asyncio.to_thread(end_all, [record], 5.0) == [record]
        assert not is_running(record)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent ended")
async def test_children_die_with_their_supervisor(tmp_path: Path) -> None:
    code = (
        "import asyncio, os, sys, pathlib\n"
        "from controlplane.local.children import Child, ChildSpec\n"
        "async def main():\n"
        f"  spec = ChildSpec('c', 'executor', (sys.executable, '-c', {SLEEP!r}), dict(os.environ),"
        f" pathlib.Path({str(tmp_path / 'c.log')!r}), 5.0)\n"
        "  child = Child(spec, lambda: None)\n"
        "  task = asyncio.create_task(child.run())\n"
        "  while child.record is None: await asyncio.sleep(0.01)\n"
        "  await asyncio.sleep(0.3)\n"
        "  print(child.pid, flush=True)\n"
        "  await task\n"
        "asyncio.run(main())"
    )
    supervisor = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE
    )
    assert supervisor.stdout is not None
    orphan = psutil.Process(int(await supervisor.stdout.readline()))
    supervisor.kill()
    await supervisor.wait()
    supervisor.stdout.feed_eof()
    await _until(lambda: _gone(orphan))
