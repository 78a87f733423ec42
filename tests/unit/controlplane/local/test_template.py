"""Forked executors: the real template process; in the TE-shell's place a program that looks around."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from controlplane.local import metrics
from controlplane.local.children import Child, ChildSpec
from controlplane.local.processes import end_all, is_running
from controlplane.local.template import Orphans, Template, subreaper, supported

pytestmark = pytest.mark.skipif(not supported(), reason="forks need Linux's subreaper and pidfd")

STAND_IN = """
import importlib.machinery, importlib.util, pathlib, sys
_PROGRAM = pathlib.Path(__file__).with_name("program.py")
class _Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "flowserve.shell.__main__":
            return importlib.util.spec_from_file_location(name, _PROGRAM)
sys.meta_path.insert(0, _Finder)
"""
PROGRAM = """
import json, os, random, signal, sys, threading, time
import numpy, torch
code = int(sys.argv[1])
print(json.dumps({
    "argv": sys.argv[1:], "env": dict(os.environ), "parent": os.getppid(), "session": os.getsid(0),
    "threads": len(os.listdir("/proc/self/task")), "fds": sorted(map(int, os.listdir("/proc/self/fd")))[:-1],
    "blocked": len(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
    "term": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
    "draws": [random.random(), numpy.random.random(), torch.rand(1).item(), os.urandom(4).hex()],
}), flush=True)
if code < 0:
    time.sleep(60)
sys.exit(code)
"""


def _env(folder: Path) -> dict[str, str]:
    """With the program in the place of `flowserve.shell`."""
    (folder / "sitecustomize.py").write_text(STAND_IN)
    (folder / "program.py").write_text(PROGRAM)
    return {**os.environ, "PYTHONPATH": os.pathsep.join((str(folder), os.environ.get("PYTHONPATH", "")))}


def _template_spec(folder: Path, env: dict[str, str]) -> ChildSpec:
    command = (sys.executable, "-P", "-m", "flowserve.shell.template", "--socket", str(folder / "t.sock"))
    return ChildSpec("template", "template", command, env, folder / "template.log", 5.0)


def _spec(folder: Path, number: int, *arguments: str, **env: str) -> ChildSpec:
    """An executor whose program ends with arguments[0], or stays where that is negative."""
    return ChildSpec(
        name=f"te-{number}",
        kind="executor",
        command=(sys.executable, "-P", "-m", "flowserve.shell", *arguments),
        env={**_env(folder), **env},
        log=folder / f"te-{number}.log",
        stop_seconds=5.0,
        template_args=arguments,
    )


@contextlib.asynccontextmanager
async def _template(folder: Path) -> AsyncIterator[tuple[Template, Child]]:
    child = Child(_template_spec(folder, _env(folder)), lambda: None)
    with subreaper():
        task = asyncio.create_task(child.run())
        try:
            yield Template(child, folder / "t.sock"), child
        finally:
            await child.stop()
            await asyncio.wait_for(task, 10)


@contextlib.asynccontextmanager
async def _running(children: list[Child]) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(child.run()) for child in children]
    try:
        yield
    finally:
        await asyncio.gather(*(child.stop() for child in children))
        await asyncio.wait_for(asyncio.gather(*tasks), 20)


async def _until(condition: Callable[[], Any], seconds: float = 30.0) -> Any:
    async with asyncio.timeout(seconds):
        while not (value := condition()):
            await asyncio.sleep(0.01)
        return value


def _starts(path: str) -> float:
    return metrics.CHILD_STARTS.labels("executor", path)._value.get()


def _said(folder: Path, number: int) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / f"te-{number}.log").read_text().splitlines()[0])
    return value


def _gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


async def test_a_forked_executor_is_what_a_started_one_would_be(tmp_path: Path) -> None:
    async with _template(tmp_path) as (template, _):
        before = _starts("template"), _starts("exec")
        codes = ["-1", "-1", "0", "3"]
        children = [
            Child(_spec(tmp_path, n, code, "--x", "a b", ONLY=str(n)), lambda: None, template.start)
            for n, code in enumerate(codes)
        ]
        async with _running(children):
            await _until(
                lambda: all(c.log_tail() for c in children) and all(c.restarts for c in children[2:])
            )
            assert _starts("exec") == before[1] and _starts("template") >= before[0] + 4
            said = [_said(tmp_path, n) for n in range(4)]
            for number, one in enumerate(said):
                assert one["argv"] == [codes[number], "--x", "a b"]
                assert one["env"] == children[number].spec.env
                assert one["parent"] == os.getpid()
                assert one["fds"] == [0, 1, 2]
                assert (one["threads"], one["blocked"], one["term"]) == (1, 0, True)
            # No two share a draw of any generator.
            assert all(len(set(draws)) == 4 for draws in zip(*(one["draws"] for one in said), strict=True))
            # Exit codes arrive.
            assert [c.last_exit for c in children[2:]] == ["exited with code 0", "exited with code 3"]
            first, second = children[0], children[1]
            assert first.record is not None and second.record is not None
            assert os.getsid(first.record.pid) == first.record.pid
            # It shows its own command, by which alone a later supervisor ends it.
            assert is_running(first.record) and is_running(second.record)
            shown = " ".join(psutil.Process(first.record.pid).cmdline())
            assert shown.rstrip() == " ".join(first.spec.command)
            other = type(first.record)(first.record.pid, first.record.started, template._child.spec.command)
            assert not is_running(other)
            record = first.record  # gone as soon as its end is known
            assert await asyncio.to_thread(end_all, [record], 5.0) == [record]
            await _until(lambda: first.restarts)
            assert first.last_exit == "was ended by SIGTERM"
            # A stop is a stop, and a kill is a kill.
            second.kill("test")
            await _until(lambda: second.restarts)
            assert second.last_exit == "was ended by SIGKILL"
        # Whoever did not start the template gets nothing from it.
        stranger = (
            "import socket, sys\ns = socket.socket(socket.AF_UNIX)\n"
            "s.connect(sys.argv[1])\nprint(s.makefile().readline())"
        )
        asked = [sys.executable, "-c", stranger, str(tmp_path / "t.sock")]
        answer = await asyncio.to_thread(subprocess.run, asked, capture_output=True, text=True, timeout=20)
        assert "did not start this template" in answer.stdout
        assert (tmp_path / "t.sock").stat().st_mode & 0o777 == 0o600


async def test_without_its_template_an_executor_starts_all_the_same(tmp_path: Path) -> None:
    async with _template(tmp_path) as (template, of_template):
        await _until((tmp_path / "t.sock").exists)
        killed = of_template.pid
        assert killed is not None
        os.kill(killed, signal.SIGKILL)
        await _until(lambda: of_template.state == "backoff")
        before = _starts("template"), _starts("exec")
        left, later = (Child(_spec(tmp_path, n, "-1"), lambda: None, template.start) for n in range(2))
        async with _running([left]):
            await _until(left.log_tail)
            assert (_starts("template"), _starts("exec")) == (before[0], before[1] + 1)
            async with _running([later]):  # waits for the next template, which is on its way
                await _until(lambda: of_template.pid not in (None, killed))
                await _until(later.log_tail)
            await _until((tmp_path / "t.sock").exists)
        again = Child(_spec(tmp_path, 2, "-1"), lambda: None, template.start)
        async with _running([again]):
            await _until(again.log_tail)
            assert _starts("template") >= before[0] + 1


SUPERVISOR = """
import asyncio, os, sys, pathlib
from tests.unit.controlplane.local import test_template as t
from controlplane.local.children import Child
async def main():
    folder = pathlib.Path(sys.argv[1])
    async with t._template(folder) as (template, of_template):
        child = Child(t._spec(folder, 0, "-1"), lambda: None, template.start)
        task = asyncio.create_task(child.run())
        while not child.log_tail(): await asyncio.sleep(0.01)
        print(child.pid, of_template.pid, int(t._starts("template")), flush=True)
        await task
asyncio.run(main())
"""


async def test_forked_executors_die_with_their_supervisor(tmp_path: Path) -> None:
    supervisor = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SUPERVISOR, str(tmp_path), stdout=asyncio.subprocess.PIPE
    )
    assert supervisor.stdout is not None
    executor, template, forks = map(int, (await supervisor.stdout.readline()).split())
    assert forks == 1 and not _gone(executor) and not _gone(template)
    supervisor.kill()
    await supervisor.wait()
    supervisor.stdout.feed_eof()
    await _until(lambda: _gone(executor) and _gone(template))


def test_a_template_with_threads_does_not_serve(tmp_path: Path) -> None:
    code = (
        "import sys, threading, time\nfrom flowserve.shell import template\n"
        "template.preload = lambda: None\n"
        "threading.Thread(target=time.sleep, args=(30,), daemon=True).start()\n"
        "sys.exit(template.main())"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, "--socket", str(tmp_path / "t.sock")],
        capture_output=True, text=True, timeout=20, check=False,
    )  # fmt: skip
    assert ended.returncode == 1 and "does not serve: 2 threads" in ended.stderr
    assert not (tmp_path / "t.sock").exists()


async def test_what_children_leave_behind_is_reaped_at_the_second_look() -> None:
    with subreaper():
        code = "import os\nif os.fork(): os._exit(0)\n"
        between = await asyncio.create_subprocess_exec(sys.executable, "-c", code)
        await between.wait()
        orphans = Orphans()
        assert orphans.reap([]) == 0
        await _until(lambda: orphans.reap([]) == 1)
        assert orphans.reap([]) == 0
