"""Models that sleep and wake in running executors: memory goes and comes, answers stay the same."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import grpc
import grpc.aio
import pytest
from deepflow.v1 import common_pb2
from deepflow.v1 import worker_pb2 as pb

from tests.support.te import TaskExecutor, executor
from tests.support.worker_client import TaskRun, generate_disaggregated

pytestmark = pytest.mark.model
A, B = "model@a", "model@b"
PROMPT = [(97 * i * i + 31 * i) % 40_000 + 500 for i in range(100)]
KV_BYTES = 96 << 20


async def answer(te: TaskExecutor, revision: str, prompt: list[int] = PROMPT) -> TaskRun:
    async with te.connect() as client:
        return await client.generate(prompt, revision=revision, max_tokens=8)


def shared_memory(te: TaskExecutor) -> int:
    """Bytes of memory files and shared memory that its process has mapped and touched."""
    status = Path(f"/proc/{te.pid}/status").read_text()
    found = re.search(r"RssShmem:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) << 10


async def test_a_sleeping_model_gives_its_kv_memory_back_and_answers_as_before(
    small_model_path: Path, tmp_path: Path
) -> None:
    async with executor("te-0", tmp_path) as te, te.connect("watcher") as watcher:
        await te.load(small_model_path, A, kv_cache_bytes=KV_BYTES)
        before = await answer(te, A)
        awake = shared_memory(te)
        slept = await te.sleep()
        assert slept.model_revision == A
        assert awake - shared_memory(te) > 0.9 * KV_BYTES, te.log_text()
        status = await te.status()
        assert status.record.state == pb.EXECUTOR_STATE_SLEEPING
        assert (status.record.model_revision, list(status.record.asleep)) == ("", [A])
        assert status.load.draining and status.load.kv_blocks_total == 0
        refused = await answer(te, A)
        assert refused.error is not None and refused.error.retryable
        assert refused.error.code == common_pb2.ERROR_CODE_MODEL_NOT_LOADED

        loaded = await te.load(small_model_path, A, kv_cache_bytes=KV_BYTES)
        record = (await te.status()).record
        assert (record.start_path, record.model_revision) == ("wake", A) and not record.asleep
        assert [phase.phase for phase in record.start_phases] == ["te_pre_load", "te_load", "te_post_load"]
        after = await answer(te, A)
        assert after.error is None and after.tokens == before.tokens
        assert after.cached_tokens == 0  # there was no tier for it to wait in
        assert (await answer(te, A)).cached_tokens > 0
        assert (await te.settled()).load.kv_blocks_total == loaded.kv_blocks
        assert watcher.load is not None and watcher.load.kv_blocks_total == loaded.kv_blocks


async def test_two_models_share_an_executor_by_sleeping_in_turn(
    small_model_path: Path, tmp_path: Path
) -> None:
    async with executor("te-0", tmp_path) as te:
        tokens = {}
        for revision, dtype in ((A, "float32"), (B, "bfloat16")):
            await te.load(small_model_path, revision, dtype=dtype)
            tokens[revision] = (await answer(te, revision)).tokens
            await te.sleep()
        assert list((await te.status()).record.asleep) == [A, B]
        for revision, dtype in ((A, "float32"), (B, "bfloat16")):
            await te.load(small_model_path, revision, dtype=dtype)
            assert (await te.status()).record.start_path == "wake"
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await te.load(small_model_path, B if revision == A else A)
            assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert (await answer(te, revision)).tokens == tokens[revision]
            await te.sleep()
        assert await te.stop() == 0


async def test_a_sleep_waits_for_the_running_task_or_lets_it_run(
    small_model_path: Path, tmp_path: Path
) -> None:
    async with executor("te-0", tmp_path) as te, te.connect() as client:
        await te.load(small_model_path, A, dtype="bfloat16")
        long = asyncio.create_task(client.generate(PROMPT, revision=A, max_tokens=100))
        while (await te.status()).tasks == 0:
            await asyncio.sleep(0.01)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await te.sleep(0.05)
        assert refused.value.code() is grpc.StatusCode.ABORTED and "1 tasks" in str(refused.value.details())
        assert (await te.status()).record.state == pb.EXECUTOR_STATE_READY
        assert (await te.sleep(30)).model_revision == A
        run = await long
        assert run.error is None and len(run.tokens) == 100


async def test_kv_on_disk_outlives_a_sleep(small_model_path: Path, tmp_path: Path) -> None:
    disk = ("--disk-cache", str(tmp_path / "disk"), "--disk-cache-bytes", str(200 << 20))
    async with executor("te-0", tmp_path, options=disk) as te:
        await te.load(small_model_path, A)
        before = await answer(te, A)
        await te.sleep()
        await te.load(small_model_path, A)
        after = await answer(te, A)
        assert after.tokens == before.tokens and after.cached_tokens >= 80, te.log_text()


@pytest.mark.parametrize("options", [(), ("--kv-transport", "grpc")])
async def test_executors_that_slept_hand_over_through_their_new_pools(
    small_model_path: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    async with (
        executor("te-p", tmp_path, role="prefill", shm_dir=tmp_path, options=options) as prefill,
        executor("te-d", tmp_path, role="decode", shm_dir=tmp_path, options=options) as decode,
    ):

        async def handed_over(prompt: list[int]) -> list[int]:
            async with prefill.connect() as p, decode.connect() as d:
                run = await generate_disaggregated(p, d, prompt, revision=A, max_tokens=8)
            assert run.error is None, run.error
            return run.tokens

        for te in (prefill, decode):
            await te.load(small_model_path, A)
        tokens = await handed_over(PROMPT)
        for te in (prefill, decode):
            await te.settled()
            await te.sleep()
            await te.load(small_model_path, A)
            assert await handed_over(PROMPT) == tokens, te.log_text()
        await prefill.settled()
        held = shared_memory(decode)
        await prefill.sleep()  # whose pool the decode has mapped
        for _ in range(100):
            if held - shared_memory(decode) > 0.9 * KV_BYTES or options:
                break
            await asyncio.sleep(0.1)
        else:
            raise AssertionError(f"the pool of a sleeping peer stays mapped\n{decode.log_text()}")


async def test_ranks_sleep_and_wake_together(small_model_path: Path, tmp_path: Path) -> None:
    async with executor("te-0", tmp_path, options=("--tensor-parallel", "3", "--threads", "3")) as te:
        await te.load(small_model_path, A)
        before = await answer(te, A)
        await te.sleep()
        await te.load(small_model_path, A)
        assert (await te.status()).record.start_path == "wake"
        assert (await answer(te, A)).tokens == before.tokens
        await te.settled()
        assert await te.stop() == 0


async def test_a_sleeping_executor_feeds_its_weights_to_others(
    small_model_path: Path, tmp_path: Path
) -> None:
    def folder(name: str) -> tuple[str, ...]:
        return ("--weights-dir", str(tmp_path / name), "--weights-bytes", str(1 << 30))

    async with (
        executor("te-0", tmp_path, shm_dir=tmp_path, options=folder("w0")) as first,
        executor("te-1", tmp_path, shm_dir=tmp_path, options=folder("w1")) as second,
    ):
        await first.load(small_model_path, A)
        tokens = (await answer(first, A)).tokens
        await first.sleep()
        await second.load("/nowhere/model.gguf", A, fork_from=(first,))
        assert (await second.status()).record.start_path in ("fork", "cold")
        assert (await answer(second, A)).tokens == tokens
