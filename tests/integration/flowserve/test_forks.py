"""Weights from one running executor to another: real processes, a folder of weights each, as on two nodes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio
import httpx
import pytest
from deepflow.v1 import worker_pb2 as pb

from tests.support.te import TaskExecutor, executor
from tests.support.worker_client import greedy

pytestmark = pytest.mark.model
PROMPT = list(range(500, 520))
REVISION = "model@1"
NOWHERE = "/nowhere/model.gguf"


@contextlib.asynccontextmanager
async def node(name: str, tmp_path: Path, *options: str, shm: bool = True) -> AsyncIterator[TaskExecutor]:
    """A warm executor with weights of its own."""
    folder = ("--weights-dir", str(tmp_path / f"weights-{name}"), "--weights-bytes", str(1 << 30))
    shm_dir = tmp_path if shm else None
    async with executor(name, tmp_path, shm_dir=shm_dir, options=(*folder, *options)) as te:
        yield te


async def answer(te: TaskExecutor, model: Path | str, *sources: TaskExecutor) -> list[int]:
    await te.load(model, REVISION, dtype="bfloat16", kv_cache_bytes=96 << 20, fork_from=sources)
    async with te.connect() as client:
        run = await client.generate(PROMPT, revision=REVISION, max_tokens=8)
    assert run.error is None
    return run.tokens


async def metric(te: TaskExecutor, line: str) -> float:
    async with httpx.AsyncClient() as client:
        text = (await client.get(te.metrics_url)).text
    return sum(float(found.rsplit(" ", 1)[1]) for found in text.splitlines() if found.startswith(line))


async def test_weights_come_from_a_running_executor(small_model_path: Path, tmp_path: Path) -> None:
    async with (
        node("te-0", tmp_path) as first,
        node("te-1", tmp_path) as second,
        node("te-2", tmp_path, "--kv-transport", "tcp") as third,
        node("te-3", tmp_path, "--kv-transport", "grpc", "--kv-checksum") as fourth,
    ):
        tokens = await answer(first, small_model_path)
        for te, transport in ((second, "shm"), (third, "tcp"), (fourth, "grpc")):
            assert await answer(te, NOWHERE, first) == tokens
            record = (await te.status()).record
            assert record.start_path in ("fork", "cold"), te.log_text()
            size = await metric(te, f'deepflow_weights_fetched_bytes_total{{transport="{transport}"}}')
            assert size > 100e6, te.log_text()
        assert await metric(first, 'deepflow_weights_fed_total{outcome="ok"}') == 3
        assert await metric(first, "deepflow_weights_feeds ") == 0


SLOW = ("--feed-bytes-per-second", str(64 << 20))
"""While tasks run at the source: a fork takes four seconds."""


@contextlib.asynccontextmanager
async def busy(te: TaskExecutor) -> AsyncIterator[None]:
    """Tasks run there for the time of the context, or as long as it lives."""
    async with te.connect() as client:
        endless = greedy(ignore_eos=True)
        work = asyncio.create_task(
            client.generate(PROMPT, revision=REVISION, max_tokens=4000, sampling=endless)
        )
        await asyncio.sleep(0.3)
        try:
            yield
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)


async def reached(te: TaskExecutor, size: float) -> None:
    async with asyncio.timeout(20):
        while await metric(te, "deepflow_weights_fetched_bytes_total{") < size:
            await asyncio.sleep(0.05)


async def test_forks_stand_in_a_tree_and_outlive_their_source(small_model_path: Path, tmp_path: Path) -> None:
    async with (
        node("te-0", tmp_path, *SLOW) as root,
        node("te-1", tmp_path) as child,
        node("te-2", tmp_path) as grandchild,
        node("te-3", tmp_path) as spare,
    ):
        tokens = await answer(root, small_model_path)
        assert await answer(spare, NOWHERE, root) == tokens
        async with busy(root):
            first = asyncio.create_task(answer(child, NOWHERE, root, spare))
            await reached(child, 16 << 20)
            second = asyncio.create_task(answer(grandchild, NOWHERE, child))
            await reached(grandchild, 16 << 20)  # of an image that its source is still being fed
            assert not first.done()
            await root.kill()
        assert (await first, await second) == (tokens, tokens)
        assert await metric(child, 'deepflow_weights_fetches_total{outcome="resumed"}') == 1
        assert "from te-0, te-3 over shm" in child.log_text()
        assert "from te-1 over shm" in grandchild.log_text()
        assert {(await te.status()).record.start_path for te in (child, grandchild)} <= {"fork", "cold"}


async def test_a_fork_whose_only_source_dies_takes_the_file_or_says_that_there_is_none(
    small_model_path: Path, tmp_path: Path
) -> None:
    async with (
        node("te-0", tmp_path, *SLOW) as root,
        node("te-1", tmp_path) as with_file,
        node("te-2", tmp_path) as without,
    ):
        tokens = await answer(root, small_model_path)
        async with busy(root):
            first = asyncio.create_task(answer(with_file, small_model_path, root))
            second = asyncio.create_task(answer(without, NOWHERE, root))
            await reached(with_file, 8 << 20)
            await reached(without, 8 << 20)
            await root.kill()
        assert await first == tokens
        assert "come from storage" in with_file.log_text()
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await second
        assert failure.value.code() is grpc.StatusCode.NOT_FOUND
        assert (await without.status()).record.state == pb.EXECUTOR_STATE_WARM
        assert not list((tmp_path / "weights-te-2").glob(".draft-*"))
        assert await answer(without, NOWHERE, with_file) == tokens  # it can load after all
