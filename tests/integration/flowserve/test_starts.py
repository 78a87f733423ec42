"""Starts of real executors: the node's weights are read once and shared, and every step is told."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

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
