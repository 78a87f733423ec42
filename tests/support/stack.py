"""A whole DeepFlow stack in a folder of its own: started, looked into, hurt and stopped by tests and benches.

It is started as a user starts it (`deepflow up --detach`), so what tests prove is what users run.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
from deepflow.v1 import worker_pb2

from controlplane.local.settings import StatePaths
from tests.support.worker_client import WorkerClient

MODEL = "smollm2-135m-instruct"
START_SECONDS = 240.0  # without downloads; a busy two-core machine takes its time


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Stack:
    """One running stack. `executors` and `children` are read fresh from the supervisor's status file."""

    def __init__(self, root: Path, port: int) -> None:
        self.paths = StatePaths(root)
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    # -- life --------------------------------------------------------------------------------------

    def up(self, *options: str, env: dict[str, str] | None = None) -> float:
        """Starts it; returns the seconds until every model answered. Raises with the output on failure."""
        started = time.perf_counter()
        command = [sys.executable, "-m", "controlplane.cli", "up", "--detach", "--port", str(self.port)]
        done = subprocess.run(
            [*command, "--state-dir", str(self.paths.root), *options],
            env={**clean_env(), **(env or {})},
            capture_output=True,
            text=True,
            timeout=START_SECONDS,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"the stack did not start:\n{done.stdout}\n{done.stderr}\n{self.logs()}")
        return time.perf_counter() - started

    def down(self) -> None:
        subprocess.run(
            [sys.executable, "-m", "controlplane.cli", "down", "--state-dir", str(self.paths.root)],
            env=clean_env(),
            capture_output=True,
            timeout=90,
            check=False,
        )

    def logs(self, lines: int = 25) -> str:
        parts = []
        for path in sorted(self.paths.logs.glob("*.log")):
            tail = path.read_text(errors="replace").splitlines()[-lines:]
            parts.append(f"--- {path.name}\n" + "\n".join(tail))
        return "\n".join(parts)

    # -- look --------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(self.paths.status.read_text())
        return value

    def executors(self) -> list[dict[str, Any]]:
        return list(self.status()["executors"])

    def executor(self, role: str) -> dict[str, Any]:
        """The first executor of a role."""
        return next(te for te in self.executors() if te["role"] == role)

    def child(self, name: str) -> dict[str, Any]:
        return next(child for child in self.status()["children"] if child["name"] == name)

    @property
    def revision(self) -> str:
        return str(self.status()["models"][0]["revision"])

    @property
    def token(self) -> str:
        return self.paths.token.read_text().strip()

    def pids(self) -> list[int]:
        status = self.status()
        return [status["supervisor"][0], *(c["pid"] for c in status["children"] if c["pid"])]

    def client(self, te: dict[str, Any], gateway_id: str = "direct") -> WorkerClient:
        return WorkerClient(te["address"], self.token, gateway_id)

    async def executor_status(self) -> dict[str, worker_pb2.ExecutorStatus]:
        """What each executor that can be reached says of itself, by te_id."""
        found = {}
        for te in self.executors():
            if te["address"]:
                async with self.client(te, "status") as client:
                    found[te["te_id"]] = await client.status()
        return found

    async def wait_clean(self, timeout: float = 15.0) -> None:
        """Until no executor holds a task, a leaked block, a stuck task or a lease; else AssertionError."""
        deadline = time.monotonic() + timeout
        while True:
            statuses = await self.executor_status()
            dirty = {
                name: (s.tasks, s.leaked_blocks, s.stuck_tasks, s.load.transfers_out, s.load.transfers_in)
                for name, s in statuses.items()
                if s.tasks or s.leaked_blocks or s.stuck_tasks or s.load.transfers_out or s.load.transfers_in
            }
            if not dirty:
                return
            assert time.monotonic() < deadline, (
                f"(tasks, leaked, stuck, out, in) still {dirty} after {timeout} s"
            )
            await asyncio.sleep(0.2)

    async def wait_ready(self, timeout: float = 60.0) -> None:
        """Until every child and executor is back."""
        await until(
            lambda: self.status()["state"] == "ready", timeout, lambda: f"stack: {self.status()['state']}"
        )

    # -- hurt --------------------------------------------------------------------------------------

    def signal(self, name: str, number: int) -> int:
        """Sends a signal to a child by name; returns the pid it went to."""
        pid = int(self.child(name)["pid"])
        os.kill(pid, number)
        return pid

    def kill(self, name: str) -> int:
        return self.signal(name, signal.SIGKILL)

    # -- ask ---------------------------------------------------------------------------------------

    def http(self, timeout: float = 120.0) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, timeout=timeout, trust_env=False)


async def until(
    ready: Callable[[], bool], timeout: float, describe: Callable[[], str] = lambda: "condition"
) -> None:
    """Polls `ready` every 50 ms; AssertionError after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        with contextlib.suppress(OSError, ValueError, StopIteration, KeyError):
            if ready():
                return
        assert time.monotonic() < deadline, f"{describe()} not reached in {timeout} s"
        await asyncio.sleep(0.05)


def clean_env() -> dict[str, str]:
    """This process's environment without what points at another stack."""
    ours = ("REDIS_URL", "DEEPFLOW_HOME", "DEEPFLOW_URL", "DEEPFLOW_API_KEY", "DEEPFLOW_CLUSTER_TOKEN")
    return {name: value for name, value in os.environ.items() if name not in ours}


@contextlib.contextmanager
def running_stack(
    topology: str, *options: str, env: dict[str, str] | None = None, models: Sequence[str] = ()
) -> Iterator[Stack]:
    """A stack in a temporary folder, stopped and removed at the end."""
    root = Path(tempfile.mkdtemp(prefix="dfs-"))
    stack = Stack(root, free_port())
    try:
        chosen = [part for model in models for part in ("--model", model)]
        stack.up("--topology", topology, *chosen, *options, env=env)
        yield stack
    finally:
        stack.down()
        shutil.rmtree(root, ignore_errors=True)
