"""A tensor-parallel TE process beside a plain one: the same tokens, KV both ways between them, and its ends.

Needs the small model.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
import pytest
from deepflow.v1 import worker_pb2

from tests.support.te import TaskExecutor, executor
from tests.support.worker_client import generate_disaggregated

pytestmark = [pytest.mark.model]

REVISION = "smollm2@ranks"
KV_BYTES = 64 << 20
PROMPT = [(97 * i * i + 31 * i) % 40_000 + 500 for i in range(75)]
TOKENS = 5
EXIT_FAILED = 70


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="dft-"))  # short: a socket's path is bounded
    yield path
    shutil.rmtree(path, ignore_errors=True)


def ranks_of(te: TaskExecutor) -> list[psutil.Process]:
    return psutil.Process(te.pid).children()


async def gone(processes: list[psutil.Process]) -> None:
    deadline = time.monotonic() + 15
    while any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes):
        assert time.monotonic() < deadline, "ranks outlive their executor"
        await asyncio.sleep(0.05)


async def test_kv_travels_between_three_ranks_and_one_and_a_lost_rank_ends_the_executor(
    small_model_path: Path, folder: Path
) -> None:
    ranked = executor("te-3", folder, shm_dir=folder, options=("--tensor-parallel", "3"))
    async with ranked as three, executor("te-1", folder, shm_dir=folder) as one:
        loads = (te.load(small_model_path, REVISION, kv_cache_bytes=KV_BYTES) for te in (three, one))
        await asyncio.gather(*loads)
        assert len(ranks_of(three)) == 2 and not ranks_of(one)
        async with three.connect() as a, one.connect() as b:
            reference = await b.generate(PROMPT, revision=REVISION, max_tokens=TOKENS)
            runs = [
                await a.generate(PROMPT, revision=REVISION, max_tokens=TOKENS),
                await generate_disaggregated(a, b, PROMPT[1:], revision=REVISION, max_tokens=TOKENS),
                await generate_disaggregated(b, a, PROMPT[1:], revision=REVISION, max_tokens=TOKENS),
            ]
            shorter = await b.generate(PROMPT[1:], revision=REVISION, max_tokens=TOKENS)
        assert all(run.error is None for run in (reference, *runs, shorter)), runs
        assert runs[0].tokens == reference.tokens and len(reference.tokens) == TOKENS
        assert runs[1].tokens == runs[2].tokens == shorter.tokens
        for te in (three, one):
            await te.settled()
        # A rank dies: its executor says so with the next step, and ends for its supervisor to replace it.
        left = ranks_of(three)
        left.pop().kill()
        async with three.connect() as a:
            lost = await a.generate(PROMPT, revision=REVISION, max_tokens=TOKENS)
        assert lost.error is not None and lost.error.retryable and "rank" in lost.error.message
        assert await three.wait() == EXIT_FAILED
        await gone(left)


async def test_warm_ranks_take_a_model_over_as_many_of_them_as_it_is_given(
    small_model_path: Path, folder: Path
) -> None:
    async with executor("te-3", folder, options=("--tensor-parallel", "3")) as te:
        async with asyncio.timeout(60):
            while len(ranks_of(te)) < 2:  # they wait, before there is a model
                await asyncio.sleep(0.05)
        waiting = {process.pid for process in ranks_of(te)}
        tokens = []
        for degree in (1, 3):
            revision = f"{REVISION}-{degree}"
            await te.load(small_model_path, revision, kv_cache_bytes=KV_BYTES, tensor_parallel=degree)
            async with te.connect() as client:
                run = await client.generate(PROMPT, revision=revision, max_tokens=TOKENS)
            assert run.error is None
            tokens.append(run.tokens)
            assert {process.pid for process in ranks_of(te)} == waiting
            await te.settled()
            await te.sleep()
        assert tokens[0] == tokens[1]
        ranks = ranks_of(te)
        assert await te.stop() == 0
        await gone(ranks)


@pytest.mark.slow
async def test_ranks_end_with_their_executor_however_it_ends(small_model_path: Path, folder: Path) -> None:
    async with executor("te-3", folder, options=("--tensor-parallel", "3")) as te:
        request = worker_pb2.LoadModelRequest(
            model_revision=REVISION, path=str(small_model_path), tensor_parallel=4
        )
        async with te.stub() as stub:
            with pytest.raises(grpc.aio.AioRpcError, match="this executor has 3") as refused:
                await stub.LoadModel(request, metadata=te.metadata, timeout=60)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        await te.load(small_model_path, REVISION, kv_cache_bytes=KV_BYTES)
        ranks = ranks_of(te)
        assert len(ranks) == 2
        await te.kill()
        await gone(ranks)
        await te.start()
        await te.load(small_model_path, REVISION, kv_cache_bytes=KV_BYTES)
        ranks = ranks_of(te)
        assert await te.stop() == 0
        await gone(ranks)
