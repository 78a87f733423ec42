"""Starts of real executors: the node's weights are read once and shared, and every step is told."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import grpc
import grpc.aio
import httpx
import psutil
import pytest
from deepflow.v1 import worker_pb2 as pb

from tests.support.te import TaskExecutor, executor

pytestmark = pytest.mark.model
PROMPT = list(range(500, 520))


async def libraries(te: TaskExecutor) -> None:
    """Until the executor is warm: a load that comes before makes its start a cold one."""
    async with asyncio.timeout(60), httpx.AsyncClient() as client:
        while 'stage="libraries"' not in (await client.get(te.metrics_url)).text:
            await asyncio.sleep(0.05)


async def loaded(te: TaskExecutor, model: Path) -> tuple[pb.ExecutorRecord, list[int]]:
    await te.load(model, "model@1", dtype="bfloat16", kv_cache_bytes=96 << 20)
    async with te.connect() as client:
        run = await client.generate(PROMPT, revision="model@1", max_tokens=8)
    assert run.error is None
    return (await te.status()).record, run.tokens


async def test_the_second_executor_maps_what_the_first_converted(
    small_model_path: Path, tmp_path: Path
) -> None:
    folder = ("--weights-dir", str(tmp_path / "weights"), "--weights-bytes")
    options, small = (*folder, str(1 << 30)), (*folder, "1000000")
    async with (
        executor("te-0", tmp_path, options=options) as first,
        executor("te-1", tmp_path, options=options) as second,
        executor("te-2", tmp_path, options=small) as third,
    ):
        for te in (first, second, third):
            await libraries(te)
        record, tokens = await loaded(first, small_model_path)
        assert record.start_path == "warm"
        again, same = await loaded(second, small_model_path)
        assert (again.start_path, same) == ("hot", tokens)
        assert [phase.phase for phase in again.start_phases] == ["te_pre_load", "te_load", "te_post_load"]
        assert again.ready_unix_ms >= again.started_unix_ms
        metrics = (await asyncio.to_thread(httpx.get, second.metrics_url)).text
        assert 'deepflow_te_weight_cache_lookups_total{result="hit"} 1.0' in metrics
        assert 'deepflow_te_actuation_seconds_count{path="hot",phase="te_load"} 1.0' in metrics

        image = next((tmp_path / "weights").glob("*-cpu*/weights"), None)
        if image is not None:  # the compiled step is there: both map one file, and neither has a copy
            for te in (first, second):
                maps = await asyncio.to_thread(psutil.Process(te.pid).memory_maps)
                (mapped,) = (one for one in maps if one.path == os.fspath(image))
                assert mapped.rss >= image.stat().st_size and mapped.private_dirty == 0
        found, alone = await loaded(third, small_model_path)  # though it could not have been made here
        assert (found.start_path, alone) == ("hot", tokens)


async def test_an_executor_whose_weights_have_no_room_serves_with_its_own(
    small_model_path: Path, tmp_path: Path
) -> None:
    options = ("--weights-dir", str(tmp_path / "weights"), "--weights-bytes", "1000000")
    async with executor("te-0", tmp_path, options=options) as te:
        record, tokens = await loaded(te, small_model_path)
        assert record.start_path in ("cold", "warm")
        assert len(tokens) == 8
        assert "kept in this process alone" in te.log_text()


async def test_weights_put_into_memory_ahead_make_the_start_hot(
    small_model_path: Path, tmp_path: Path
) -> None:
    options = ("--weights-dir", str(tmp_path / "weights"), "--weights-bytes", str(1 << 30))
    async with executor("te-0", tmp_path, options=options) as te, executor("te-1", tmp_path) as without:
        await libraries(te)
        put = await te.preload(small_model_path, "model@1", dtype="bfloat16")
        assert put.weights == "built"
        assert (await te.preload(small_model_path, "model@1", dtype="bfloat16")).weights == "hit"
        record = (await te.status()).record
        assert record.state == pb.EXECUTOR_STATE_WARM and list(record.preloaded) == ["model@1"]
        started, tokens = await loaded(te, small_model_path)
        assert started.start_path == "hot" and len(tokens) == 8
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await te.preload(small_model_path, "other@1")
        assert refused.value.code() is grpc.StatusCode.ABORTED
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await without.preload(small_model_path, "model@1")
        assert "--weights-dir" in str(refused.value.details())
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await without.preload(tmp_path / "none.gguf", "model@1")
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND


async def test_whoever_is_killed_in_whatever_step_leaves_nothing_that_hurts_the_next(
    small_model_path: Path, tmp_path: Path
) -> None:
    """Killed at once, while libraries load, weights are converted, the pool is made, and when ready."""
    folder = tmp_path / "weights"
    options = ("--weights-dir", str(folder), "--weights-bytes", str(1 << 30))
    for delay in (0.0, 0.3, 0.7, 1.1, 1.5, 2.0):
        async with executor("te-0", tmp_path, shm_dir=tmp_path, options=options) as te:
            load = asyncio.create_task(te.load(small_model_path, "model@1", dtype="bfloat16"))
            await asyncio.sleep(delay)
            await te.kill()
            await asyncio.gather(load, return_exceptions=True)
    async with executor("te-0", tmp_path, shm_dir=tmp_path, options=options) as te:
        _, tokens = await loaded(te, small_model_path)
        assert len(tokens) == 8
        status = await te.settled()
        assert status.leaked_blocks == 0
        assert await te.stop() == 0
    images = [path.name for path in folder.iterdir() if path.is_dir() and path.name != "sources"]
    assert len(images) == 1, f"drafts of the killed are left: {images}"


async def test_a_hundred_who_ask_for_one_load_get_one_and_a_model_too_large_says_so(
    small_model_path: Path, tmp_path: Path
) -> None:
    async with executor("te-0", tmp_path) as te:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await te.load(small_model_path, "model@1", kv_cache_bytes=1 << 50)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "does not fit" in str(refused.value.details())
        assert (await te.status()).record.state == pb.EXECUTOR_STATE_WARM
        answers = await asyncio.gather(
            *(te.load(small_model_path, "model@1", dtype="bfloat16") for _ in range(100))
        )
        assert len({answer.load_seconds for answer in answers}) == 1
        metrics = (await asyncio.to_thread(httpx.get, te.metrics_url)).text
        assert 'deepflow_te_model_loads_total{outcome="ok"} 1.0' in metrics
