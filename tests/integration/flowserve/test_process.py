"""A TE process without a model: start, registration, refused loads, signals, drain, watchdog.

Needs the embedded Valkey; the watchdog's test needs the small model. Takes about 20 s on one core.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx
import pytest
import redis
from deepflow.v1 import common_pb2 as cpb
from deepflow.v1 import worker_pb2 as pb

from controlplane.local.valkey import ValkeyServer
from flowserve.shell.process import remove_dead_sockets
from tests.support.te import ROLE_DECODE, ROLE_PREFILL, ROOT, TOKEN, TaskExecutor, executor


def record_of(url: str, te_id: str) -> pb.ExecutorRecord | None:
    with redis.Redis.from_url(url) as client:
        value = client.get(f"deepflow:te:{te_id}")
    return pb.ExecutorRecord.FromString(value) if isinstance(value, bytes) else None


async def until(condition: Callable[[], Any], timeout: float = 15.0) -> Any:
    deadline = time.monotonic() + timeout
    while not (value := await asyncio.to_thread(condition)):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)
    return value


async def refused(te: TaskExecutor, path: Path | str, **kwargs: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await te.load(path, "model@1", **kwargs)
    return error.value.code(), error.value.details() or ""


async def test_a_warm_executor_registers_refuses_bad_models_and_leaves_nothing_behind(
    valkey_url: str, tmp_path: Path
) -> None:
    garbage = tmp_path / "garbage.gguf"
    garbage.write_bytes(b"GGUF" + os.urandom(2000))
    (tmp_path / "empty").mkdir()
    te_id = f"te-warm-{os.getpid()}"
    async with executor(te_id, tmp_path, redis_url=valkey_url, role="prefill") as te:
        record = await until(lambda: record_of(valkey_url, te_id))
        assert (record.address, record.incarnation, record.pid) == (te.address, te.incarnation, te.pid)
        assert (record.state, record.role) == (pb.EXECUTOR_STATE_WARM, ROLE_PREFILL)

        code, message = await refused(te, tmp_path / "nothing.gguf")
        assert code is grpc.StatusCode.NOT_FOUND and "nothing.gguf" in message
        for path in (garbage, tmp_path / "empty", Path(__file__)):
            code, message = await refused(te, path)
            assert code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND), message
        assert (await refused(te, garbage, dtype="int3"))[0] is grpc.StatusCode.INVALID_ARGUMENT
        code, message = await refused(te, garbage, kv_cache_bytes=1 << 50)
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED and "bytes" in message

        status = await te.status()
        assert status.record.state == pb.EXECUTOR_STATE_WARM and "does not fit" in status.record.message
        async with te.connect() as client:
            run = await client.generate([1, 2, 3], revision="model@1", max_tokens=1)
            assert run.error is not None and run.error.code == cpb.ERROR_CODE_MODEL_NOT_LOADED

        metrics = (await asyncio.to_thread(httpx.get, te.metrics_url)).text
        assert 'deepflow_te_state{deepflow_te_state="warm"} 1.0' in metrics
        assert 'deepflow_te_tasks_total{kind="unified",outcome="rejected_model_not_loaded"} 1.0' in metrics

        assert await te.stop() == 0
        assert record_of(valkey_url, te_id) is None
        assert not (tmp_path / f"{te_id}.json").exists()


async def test_registration_heals_after_the_registry_was_away(
    valkey_server: Callable[[], ValkeyServer], tmp_path: Path
) -> None:
    server = valkey_server()
    async with executor("te-0", tmp_path, redis_url=server.url) as te:
        await until(lambda: record_of(server.url, "te-0"))
        await asyncio.to_thread(server.kill)
        assert (await te.set_role(ROLE_DECODE, 5)).epoch == 5  # serving goes on
        await asyncio.to_thread(server.start)
        await until(lambda: (found := record_of(server.url, "te-0")) and found.role_epoch == 5)
        await asyncio.to_thread(server.kill)
        started = time.monotonic()
        assert await te.stop() == 0  # an unreachable registry holds nobody up
        assert time.monotonic() - started < 8


async def test_stale_role_epochs_are_refused(tmp_path: Path) -> None:
    async with executor("te-0", tmp_path) as te:
        await te.set_role(ROLE_PREFILL, 7)
        await te.set_role(ROLE_PREFILL, 7)
        for role, epoch in ((ROLE_DECODE, 7), (ROLE_DECODE, 6), (ROLE_PREFILL, 6)):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await te.set_role(role, epoch)
            assert error.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        load = (await te.status()).load
        assert (load.role, load.role_epoch) == (ROLE_PREFILL, 7)
        answer = await te.drain(1, exit=True)
        assert answer.drained and await te.wait() == 0


async def test_calls_without_the_clusters_token_are_refused(tmp_path: Path) -> None:
    async with executor("te-0", tmp_path) as te:
        te.metadata = (("authorization", "Bearer wrong"), ("x-deepflow-protocol", "1"))
        for call in (te.status(), te.set_role(ROLE_DECODE, 1), te.drain(0)):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await call
            assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize("option", [("--listen", "0.0.0.0:0"), ("--te-id", "no spaces")])
def test_a_process_that_must_not_start_says_why(option: tuple[str, str]) -> None:
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}"}
    env.pop("DEEPFLOW_CLUSTER_TOKEN", None)
    command = [sys.executable, "-m", "flowserve.shell", "--te-id", "te-0", *option]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert option[0] in done.stderr and done.stderr.count("\n") == 1


async def test_an_address_in_use_ends_the_process_with_a_reason(tmp_path: Path) -> None:
    async with executor("te-0", tmp_path) as te:
        other = TaskExecutor("te-1", tmp_path, options=("--listen", te.address))
        with pytest.raises(AssertionError, match="cannot listen"):
            await other.start()
        assert await other.wait() == 1


async def test_a_device_that_is_not_there_ends_the_process_with_a_reason(tmp_path: Path) -> None:
    te = TaskExecutor("te-0", tmp_path, options=("--device", "abacus"))
    with contextlib.suppress(AssertionError):  # it may serve for a moment
        await te.start()
    assert await te.wait() == 1
    assert "cannot start: device abacus" in te.log_text()


def test_sockets_of_killed_processes_are_removed_and_living_ones_are_not(tmp_path: Path) -> None:
    long_ago = time.time() - 3600
    with socket.socket(socket.AF_UNIX) as dead, socket.socket(socket.AF_UNIX) as alive:
        for sock, name in ((dead, "kv-dead.sock"), (alive, "kv-alive.sock")):
            sock.bind(str(tmp_path / name))
            os.utime(tmp_path / name, (long_ago, long_ago))
        alive.listen()
        dead.close()
        (tmp_path / "kv-young.sock").touch()
        assert remove_dead_sockets(tmp_path) == 1
        assert sorted(path.name for path in tmp_path.iterdir()) == ["kv-alive.sock", "kv-young.sock"]


async def test_the_process_dies_with_its_parent(tmp_path: Path) -> None:
    """The parent is killed, so it can tell nobody: the kernel does."""
    endpoint = tmp_path / "te.json"
    child = [
        *(sys.executable, "-m", "flowserve.shell", "--te-id", "te-0"),
        *("--endpoint-file", str(endpoint), "--threads", "1"),
    ]
    code = f"import subprocess; subprocess.run({child!r})"
    env = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}",
        "DEEPFLOW_PARENT_DEATH": "1",
        "DEEPFLOW_CLUSTER_TOKEN": TOKEN,
    }
    with (tmp_path / "log").open("wb") as log:
        parent = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=log, stderr=log)
    try:
        await until(endpoint.exists, timeout=60)
        pid = json.loads(endpoint.read_text())["pid"]
    finally:
        parent.kill()
        parent.wait()

    def gone() -> bool:
        try:
            return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return True

    await until(gone)


@pytest.mark.model
async def test_a_hung_engine_ends_the_process_and_says_so(
    valkey_url: str, small_model_path: Path, tmp_path: Path
) -> None:
    wrapper = tmp_path / "hangs.py"
    wrapper.write_text(
        "import time\n"
        "from flowserve.shell.loading import Loader\n"
        "build = Loader.__call__\n"
        "def hang(self, *args):\n"
        "    model = build(self, *args)\n"
        "    model.executor.execute = lambda batch: time.sleep(3600)\n"
        "    return model\n"
        "Loader.__call__ = hang\n"
        "from flowserve.shell.__main__ import main\n"
        "main()\n"
    )
    te_id = f"te-hung-{os.getpid()}"
    options = ("--watchdog-seconds", "1.5")
    async with executor(
        te_id, tmp_path, redis_url=valkey_url, options=options, program=(str(wrapper),)
    ) as te:
        await te.load(small_model_path, "model@1", dtype="bfloat16", kv_cache_bytes=16 << 20)
        async with te.connect() as client:
            run = await client.generate([1, 2, 3], revision="model@1", max_tokens=1, timeout=30)
        assert run.error is not None and run.error.retryable
        assert await te.wait() == 70
        record = record_of(valkey_url, te_id)
        assert record is not None and record.state == pb.EXECUTOR_STATE_FAILED
        assert "stood still" in record.message and "stood still" in te.log_text()


@pytest.mark.model
async def test_a_signal_while_loading_ends_the_process_in_order(
    small_model_path: Path, tmp_path: Path
) -> None:
    async with executor("te-0", tmp_path) as te:
        load = asyncio.create_task(te.load(small_model_path, "model@1"))
        while (await te.status()).record.state != pb.EXECUTOR_STATE_LOADING:
            await asyncio.sleep(0.01)
        started = time.monotonic()
        assert await te.stop() == 0
        assert time.monotonic() - started < 5
        with pytest.raises(grpc.aio.AioRpcError):
            await load


@pytest.mark.model
async def test_a_second_signal_ends_a_drain_at_once(small_model_path: Path, tmp_path: Path) -> None:
    async with executor("te-0", tmp_path, options=("--drain-seconds", "60")) as te:
        await te.load(small_model_path, "model@1", dtype="bfloat16", kv_cache_bytes=64 << 20)
        async with te.connect() as client:
            sampling = cpb.SamplingParams(top_p=1, repetition_penalty=1, ignore_eos=True)
            _, done, first = await client.submit(
                [1, 2, 3], revision="model@1", max_tokens=2000, sampling=sampling
            )
            await asyncio.wait_for(first.wait(), 30)
            te.signal(signal.SIGTERM)
            while not (await te.status()).load.draining:
                await asyncio.sleep(0.02)
            late = await client.generate([1], revision="model@1", max_tokens=1)
            assert late.error is not None and late.error.code == cpb.ERROR_CODE_DRAINING
            assert late.error.retryable and not done.is_set()
            started = time.monotonic()
            te.signal(signal.SIGTERM)
            assert await te.wait() == 130
            assert time.monotonic() - started < 2
