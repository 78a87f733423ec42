"""Real task executors for tests: `python -m flowserve.shell` as a process, with its leader's calls.

    async with executor("te-0", folder) as te:
        await te.load(model_path, "model@1", dtype="float32")
        async with te.connect() as client:
            run = await client.generate(prompt, revision="model@1", max_tokens=8)

The process dies with the test process, and its log is in `te.log_text()`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from deepflow.v1 import common_pb2, worker_pb2, worker_pb2_grpc

from kvtransfer.auth import call_metadata
from kvtransfer.channel import open_channel
from kvtransfer.tls import Tls
from tests.support.worker_client import WorkerClient

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "te-test-token"
START_SECONDS = 60.0
"""A warm start takes about a second; machines that run many tests at once are slow."""
KV_BYTES = 96 << 20


class TaskExecutor:
    """One TE process. `start` makes it, `stop` ends it in order, `kill` does not."""

    def __init__(
        self,
        te_id: str,
        folder: Path,
        *,
        role: str = "colocated",
        redis_url: str = "",
        token: str = TOKEN,
        shm_dir: Path | None = None,
        options: Sequence[str] = (),
        env: dict[str, str] | None = None,
        program: Sequence[str] = ("-m", "flowserve.shell"),
        python: Path | str = sys.executable,
        tls: Tls | None = None,
    ) -> None:
        """`folder` takes endpoint file and log. `options` are further arguments of the shell; `program`
        is what `python` runs (a test may wrap the shell)."""
        self.te_id = te_id
        self.token = token
        self.tls = tls
        self.metadata = call_metadata(token)
        self._endpoint = folder / f"{te_id}.json"
        self.log = folder / f"{te_id}.log"
        self._command = [
            *(str(python), *program, "--te-id", te_id, "--listen", "127.0.0.1:0"),
            *("--endpoint-file", str(self._endpoint), "--role", role, "--threads", "1"),
            *(("--redis-url", redis_url) if redis_url else ()),
            *(("--shm-dir", str(shm_dir)) if shm_dir is not None else ()),
            *options,
        ]
        paths = os.pathsep.join((str(ROOT), str(ROOT / "protos"), os.environ.get("PYTHONPATH", "")))
        self._env = {
            **{key: value for key, value in os.environ.items() if key != "REDIS_URL"},
            "PYTHONPATH": paths,
            "DEEPFLOW_CLUSTER_TOKEN": token,
            "DEEPFLOW_PARENT_DEATH": "1",
            **(env or {}),
        }
        self.process: subprocess.Popen[bytes] | None = None
        self.address = self.metrics_url = self.incarnation = ""

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    async def start(self) -> TaskExecutor:
        """Starts the process and waits until it serves. A stopped one may be started again."""
        self._endpoint.unlink(missing_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command, env=self._env, cwd=ROOT, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        deadline = time.monotonic() + START_SECONDS
        while not self._endpoint.exists():
            assert self.process.poll() is None, f"{self.te_id} ended:\n{self.log_text()}"
            assert time.monotonic() < deadline, f"{self.te_id} does not serve:\n{self.log_text()}"
            await asyncio.sleep(0.02)
        endpoint = json.loads(self._endpoint.read_text())
        assert endpoint["pid"] == self.process.pid
        self.address, self.metrics_url = endpoint["address"], endpoint["metrics_url"]
        self.tasks_address: str = endpoint["tasks_address"]
        self.incarnation = endpoint["incarnation"]
        return self

    async def wait(self, timeout: float = 30.0) -> int:
        """The exit code of a process that ends by itself."""
        assert self.process is not None
        try:
            return await asyncio.to_thread(self.process.wait, timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.te_id} does not end:\n{self.log_text()}") from None

    async def stop(self, timeout: float = 30.0) -> int:
        """SIGTERM; returns the exit code."""
        self.signal(signal.SIGTERM)
        return await self.wait(timeout)

    async def kill(self) -> None:
        """kill -9."""
        self.signal(signal.SIGKILL)
        await self.wait()

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(number)

    def log_text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    # -- the leader's calls: a channel each, so that a process outlives a test's event loop ---------

    @contextlib.asynccontextmanager
    async def stub(self) -> AsyncIterator[worker_pb2_grpc.TaskExecutorAsyncStub]:
        async with open_channel(self.address, self.tls) as channel:
            yield worker_pb2_grpc.TaskExecutorStub(channel)

    async def load(
        self,
        path: Path | str,
        revision: str,
        *,
        dtype: str = "float32",
        kv_cache_bytes: int = KV_BYTES,
        max_model_len: int = 0,
        tensor_parallel: int = 0,
        fork_from: Sequence[TaskExecutor] = (),
        timeout: float = 120.0,
    ) -> worker_pb2.LoadModelResponse:
        request = worker_pb2.LoadModelRequest(
            model_revision=revision,
            path=str(path),
            dtype=dtype,
            kv_cache_bytes=kv_cache_bytes,
            max_model_len=max_model_len,
            tensor_parallel=tensor_parallel,
            fork_from=[
                worker_pb2.WeightPeer(te_id=te.te_id, incarnation=te.incarnation, address=te.address)
                for te in fork_from
            ],
        )
        async with self.stub() as stub:
            return await stub.LoadModel(request, metadata=self.metadata, timeout=timeout)

    async def set_role(self, role: int, epoch: int) -> worker_pb2.SetRoleResponse:
        request = worker_pb2.SetRoleRequest(role=role, epoch=epoch)  # type: ignore[arg-type]  # an enum as int
        async with self.stub() as stub:
            return await stub.SetRole(request, metadata=self.metadata, timeout=10)

    async def drain(self, timeout: float = 10.0, *, exit: bool = False) -> worker_pb2.DrainResponse:
        request = worker_pb2.DrainRequest(timeout_ms=round(timeout * 1000), exit=exit)
        async with self.stub() as stub:
            return await stub.Drain(request, metadata=self.metadata, timeout=timeout + 10)

    async def preload(
        self, path: Path | str, revision: str, *, dtype: str = "float32", quantization: str = ""
    ) -> worker_pb2.PreloadResponse:
        request = worker_pb2.LoadModelRequest(
            model_revision=revision, path=str(path), dtype=dtype, quantization=quantization
        )
        async with self.stub() as stub:
            return await stub.Preload(request, metadata=self.metadata, timeout=120)

    async def sleep(self, timeout: float = 10.0) -> worker_pb2.SleepResponse:
        request = worker_pb2.SleepRequest(timeout_ms=round(timeout * 1000))
        async with self.stub() as stub:
            return await stub.Sleep(request, metadata=self.metadata, timeout=timeout + 10)

    async def status(self) -> worker_pb2.ExecutorStatus:
        async with self.stub() as stub:
            request = worker_pb2.GetStatusRequest()
            return await stub.GetStatus(request, metadata=self.metadata, timeout=10)

    async def settled(self, timeout: float = 10.0) -> worker_pb2.ExecutorStatus:
        """Waits until nothing is left of any task or transfer; fails with what is. Then nothing leaks."""
        deadline = time.monotonic() + timeout
        while True:
            status = await self.status()
            load = status.load
            held = load.kv_blocks_total - load.kv_blocks_free
            left = (status.tasks, held, load.transfers_out, load.transfers_in)
            if left == (0, 0, 0, 0) and (status.leaked_blocks, status.stuck_tasks) == (0, 0):
                return status
            assert time.monotonic() < deadline, f"{self.te_id} is not at rest: {status}\n{self.log_text()}"
            await asyncio.sleep(0.05)

    def connect(self, gateway_id: str = "direct", *, plain: bool = False) -> WorkerClient:
        """A gateway's stream to it, over gRPC or over a plain connection."""
        tasks_address = self.tasks_address if plain else ""
        return WorkerClient(self.address, self.token, gateway_id, tasks_address=tasks_address, tls=self.tls)


@contextlib.asynccontextmanager
async def executor(te_id: str, folder: Path, **kwargs: object) -> AsyncIterator[TaskExecutor]:
    """A running TE (see TaskExecutor); killed at the end unless it has ended."""
    te = TaskExecutor(te_id, folder, **kwargs)  # type: ignore[arg-type]  # passed through
    try:
        yield await te.start()
    finally:
        if te.process is not None and te.process.poll() is None:
            await te.kill()


ROLE_COLOCATED = common_pb2.ROLE_COLOCATED
ROLE_PREFILL = common_pb2.ROLE_PREFILL
ROLE_DECODE = common_pb2.ROLE_DECODE
