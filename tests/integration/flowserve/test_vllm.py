"""A TE that runs vLLM: the worker protocol, real vLLM on the CPU, the small model's weights.

Needs vLLM in an environment of its own (`python -m tests.bench.peers.install`, or $DEEPFLOW_VLLM_PYTHON).
"""

from __future__ import annotations

import asyncio
import os
import sysconfig
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from deepflow.v1 import common_pb2
from deepflow.v1 import worker_pb2 as pb

from tests.bench.peers.servers import SAFETENSORS, home
from tests.support.te import TaskExecutor, executor
from tests.support.worker_client import greedy

pytestmark = [pytest.mark.model, pytest.mark.slow, pytest.mark.timeout(600)]
REVISION = "model@vllm"
PROMPT = [(97 * i * i + 31 * i) % 40_000 + 500 for i in range(60)]
LONG = [(89 * i * i + 37 * i) % 40_000 + 500 for i in range(300)]
START_SECONDS = 300.0
PROGRAM = (
    "import runpy, sys; sys.path.append({path!r}); sys.argv[0] = 'flowserve.shell'; "
    "runpy.run_module('flowserve.shell', run_name='__main__', alter_sys=True)"
)


def vllm_python() -> Path:
    """Skips where there is none."""
    found = Path(os.environ.get("DEEPFLOW_VLLM_PYTHON") or home() / "vllm" / "bin" / "python")
    if not found.exists():
        pytest.skip(f"no vLLM at {found}: python -m tests.bench.peers.install, or $DEEPFLOW_VLLM_PYTHON")
    return found


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def te(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[TaskExecutor]:
    python = vllm_python()
    folder = home() / SAFETENSORS
    if not (folder / "model.safetensors").exists():
        pytest.skip(f"no weights at {folder}: python -m tests.bench.peers.install")
    # What the worker needs beside vLLM comes after vLLM's own packages.
    program = ("-c", PROGRAM.format(path=sysconfig.get_paths()["purelib"]))
    options = ("--engine", "vllm", "--engine-args", '{"enforce_eager": true}', "--max-running", "8")
    env = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0-1"}
    env["VLLM_CACHE_ROOT"] = str(home() / "cache")
    made = executor(
        "te-vllm", tmp_path_factory.mktemp("vllm"), options=options, program=program, env=env, python=python
    )
    async with made as running:
        await running.load(
            folder, REVISION, dtype="bfloat16", kv_cache_bytes=256 << 20, max_model_len=512,
            timeout=START_SECONDS,
        )  # fmt: skip
        yield running


async def test_whole_requests_are_served(te: TaskExecutor) -> None:
    record = (await te.status()).record
    assert record.state == pb.EXECUTOR_STATE_READY and record.max_model_len == 512
    assert record.kv_blocks > 10 and record.dtype == "bfloat16"
    async with te.connect() as client:
        runs = await asyncio.gather(
            *(
                client.generate(
                    PROMPT[: 40 + i], revision=REVISION, max_tokens=12, sampling=greedy(ignore_eos=True)
                )
                for i in range(6)
            )
        )
        again = await client.generate(
            PROMPT[:40], revision=REVISION, max_tokens=12, sampling=greedy(ignore_eos=True)
        )
        replay = await client.generate(
            PROMPT[:40], revision=REVISION, max_tokens=12, output=runs[0].tokens[:5],
            sampling=greedy(ignore_eos=True),
        )  # fmt: skip
        long = [
            await client.generate(LONG, revision=REVISION, max_tokens=2, sampling=greedy(logprobs=2))
            for _ in range(2)
        ]
    assert all(run.error is None and len(run.tokens) == 12 for run in runs)
    assert all(run.finish == common_pb2.FINISH_REASON_LENGTH for run in runs)
    assert again.tokens == runs[0].tokens
    assert long[1].tokens == long[0].tokens
    assert (long[0].cached_tokens, long[1].cached_tokens) == (0, 256)  # blocks of 128 tokens on the CPU
    assert replay.tokens == runs[0].tokens[5:]
    status = await te.settled()
    assert status.tasks == 0 and status.load.kv_blocks_total == record.kv_blocks


async def test_what_it_cannot_do_is_said(te: TaskExecutor) -> None:
    async with te.connect() as client:
        prefill = await client.generate(
            PROMPT, revision=REVISION, max_tokens=4, kind=common_pb2.TASK_KIND_PREFILL
        )
        assert prefill.error is not None and "whole requests" in prefill.error.message
        long = await client.generate([5] * 600, revision=REVISION, max_tokens=4)
        assert long.error is not None and not long.error.retryable
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await te.sleep()
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (await te.status()).record.state == pb.EXECUTOR_STATE_READY


async def test_an_abort_ends_the_request_and_frees_its_blocks(te: TaskExecutor) -> None:
    async with te.connect() as client:
        run, done, _ = await client.submit(
            PROMPT, revision=REVISION, max_tokens=400, task_id="long", sampling=greedy(ignore_eos=True)
        )
        while not run.tokens:
            await asyncio.sleep(0.02)
        await client.abort("long")
        await asyncio.wait_for(done.wait(), 20)
    assert run.finish == common_pb2.FINISH_REASON_ABORTED and len(run.tokens) < 400
    async with asyncio.timeout(20):
        while (await te.status()).load.running:
            await asyncio.sleep(0.1)


async def test_its_end_leaves_no_process(te: TaskExecutor) -> None:
    import psutil

    children = psutil.Process(te.pid).children(recursive=True)
    assert children  # vLLM's engine is a process of its own
    assert await te.stop(60) == 0
    _, alive = await asyncio.to_thread(psutil.wait_procs, children, 15)
    assert not alive
