"""Executors by fork: the real template process, as the supervisor's child."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest
from deepflow.v1 import worker_pb2, worker_pb2_grpc

from controlplane.local import commands, metrics, template
from controlplane.local.children import Child, ChildSpec
from controlplane.local.settings import StackSettings, StatePaths
from controlplane.local.topology import RoleName
from kvtransfer.auth import call_metadata
from kvtransfer.channel import open_channel

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(not template.supported(), reason="executors are forked on Linux only"),
]
TOKEN = "a-token"


class Stack:
    """A template and its executors, as the supervisor has them."""

    def __init__(self, folder: Path) -> None:
        self.paths = StatePaths(folder)
        self.paths.prepare()
        self.settings = StackSettings(state_dir=folder, models=(), threads=1, weights_cache_bytes=0)
        self.template_child = Child(commands.template_spec(self.paths), lambda: None)
        self.template = template.Template(self.paths.template, self.template_child, commands.EXECUTOR)
        self.runs = [asyncio.create_task(self.template_child.run())]
        self.children = [self.template_child]

    def add(self, te_id: str) -> Child:
        env = commands.base_env(self.paths, "", TOKEN)
        spec = commands.executor_spec(self.settings, self.paths, te_id, RoleName.COLOCATED, env)
        fields = {name: getattr(spec, name) for name in ChildSpec.__slots__}  # type: ignore[attr-defined]
        child = Child(ChildSpec(**{**fields, "fork": self.template.fork}), lambda: None)
        self.children.append(child)
        self.runs.append(asyncio.create_task(child.run()))
        return child

    async def serving(self, child: Child) -> str:
        """Its address."""
        path = self.paths.run / f"{child.spec.name}.json"
        async with asyncio.timeout(60):
            while not path.exists() or (found := json.loads(path.read_text()))["pid"] != child.pid:
                await asyncio.sleep(0.02)
        return str(found["address"])


@pytest.fixture(autouse=True)
def subreaper() -> None:
    template.become_subreaper()


@asynccontextmanager
async def stack(folder: Path) -> AsyncIterator[Stack]:
    made = Stack(folder)
    try:
        yield made
    finally:
        await asyncio.gather(*(child.stop() for child in reversed(made.children)))
        await asyncio.gather(*made.runs)


def starts(way: str) -> float:
    return float(metrics.STARTS.labels(way)._value.get())


async def test_forked_executors_load_answer_and_end_in_order(small_model_path: Path, tmp_path: Path) -> None:
    before = starts("fork")
    async with stack(tmp_path) as made:
        children = [made.add(f"te-{number}") for number in range(4)]
        addresses = [await made.serving(child) for child in children]
        assert starts("fork") == before + 4
        assert len({child.pid for child in children}) == 4
        for child in children:
            process = psutil.Process(child.pid or 0)
            assert process.ppid() == os.getpid()
            assert Path(f"/proc/{child.pid}/comm").read_text().strip() == child.spec.name
            assert child.record is not None and child.record.pid == child.pid
        async with open_channel(addresses[2], None) as channel:
            stub = worker_pb2_grpc.TaskExecutorStub(channel)
            request = worker_pb2.LoadModelRequest(
                model_revision="m@1", path=str(small_model_path), kv_cache_bytes=32 << 20
            )
            await stub.LoadModel(request, metadata=call_metadata(TOKEN), timeout=60)
            status = await stub.GetStatus(
                worker_pb2.GetStatusRequest(), metadata=call_metadata(TOKEN), timeout=10
            )
        assert status.record.start_path == "warm"  # its libraries came with it
        assert status.record.pid == children[2].pid
        os.kill(children[0].pid or 0, signal.SIGKILL)
        async with asyncio.timeout(20):
            while children[0].restarts == 0:
                await asyncio.sleep(0.02)
        assert children[0].last_exit == "was ended by SIGKILL"
    assert [child.state for child in children] == ["stopped"] * 4
    assert "exits with code 0" in children[1].spec.log.read_text()


async def test_without_the_template_executors_are_started_as_programs(tmp_path: Path) -> None:
    async with stack(tmp_path) as made:
        first = made.add("te-0")
        await made.serving(first)
        killed = made.template_child.pid
        os.kill(killed or 0, signal.SIGKILL)
        before = starts("exec")
        second = made.add("te-1")
        await made.serving(second)
        assert starts("exec") == before + 1
        assert first.state == "running"  # what was forked lives on
        async with asyncio.timeout(30):
            while made.template_child.pid in (None, killed) or not made.paths.template.exists():
                await asyncio.sleep(0.05)
        before = starts("fork")
        await made.serving(made.add("te-2"))
        assert starts("fork") == before + 1


async def test_a_refused_request_is_told_and_harms_nothing(tmp_path: Path) -> None:
    async with stack(tmp_path) as made:
        await made.template._ready()
        for request in (b"nonsense\n", b'{"argv": []}\n', b'{"argv": [], "env": {}, "log": "/nowhere/x"}\n'):
            reader, writer = await asyncio.open_unix_connection(made.paths.template)
            writer.write(request)
            assert "error" in json.loads(await reader.readline())
            writer.close()
            await writer.wait_closed()
        await made.serving(made.add("te-0"))


def test_a_process_with_threads_refuses_to_be_forked(tmp_path: Path) -> None:
    program = textwrap.dedent(
        """
        import threading, time
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        from flowserve.shell.template import Unfit, warm_up
        try:
            warm_up()
        except Unfit as error:
            raise SystemExit(str(error))
        """
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60, check=False)
    assert b"threads after its imports" in ended.stderr


def test_children_of_one_template_draw_numbers_of_their_own() -> None:
    program = textwrap.dedent(
        """
        import os, random, sys
        import numpy, torch
        from flowserve.shell.template import _reseed
        for _ in range(2):
            if os.fork() == 0:
                _reseed()
                print(random.random(), numpy.random.random(), torch.rand(1).item(), flush=True)
                os._exit(0)
            os.wait()
        """
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60, check=True)
    first, second = (line.split() for line in ended.stdout.splitlines())
    assert not set(first) & set(second)


def test_executors_end_with_the_supervisor_however_it_ends(tmp_path: Path) -> None:
    program = textwrap.dedent(
        f"""
        import asyncio, os, pathlib, signal
        from controlplane.local import template
        from tests.unit.controlplane.local.test_template import Stack
        async def main():
            template.become_subreaper()
            made = Stack(pathlib.Path({os.fspath(tmp_path)!r}))
            child = made.add("te-0")
            await made.serving(child)
            print(child.pid, made.template_child.pid, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        asyncio.run(main())
        """
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=90, check=False)
    assert ended.returncode == -signal.SIGKILL
    pids = [int(pid) for pid in ended.stdout.split()]
    assert len(pids) == 2
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=10)
    assert not alive


async def test_what_children_left_behind_is_reaped(tmp_path: Path) -> None:
    program = "import os, sys; pid = os.fork(); pid or os.execvp('sleep', ['sleep', '0.2']); print(pid)"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE
    )
    told, _ = await process.communicate()
    orphan = psutil.Process(int(told))
    reaper = template.Reaper(set)
    async with asyncio.timeout(10):
        while orphan.is_running() and psutil.pid_exists(orphan.pid):
            reaper.look()
            await asyncio.sleep(0.1)
