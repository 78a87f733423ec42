"""Prefixes out of host memory, off the disk and from other executors: the tokens of an uncached run.

Needs the small model, in float32: greedy tokens are then equal or something was wrong.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import httpx
import pytest
import pytest_asyncio
from deepflow.v1 import worker_pb2 as pb

from tests.support.te import TaskExecutor, executor
from tests.support.worker_client import TaskRun

pytestmark = [pytest.mark.model]

REVISION = "smollm2@tiers"
KV_BYTES = 20 << 20  # 28 blocks of 720 KiB: one long prompt fills most of it
PROMPT = [(97 * i * i + 31 * i) % 40_000 + 500 for i in range(202)]  # 12 full blocks
OTHER = [(83 * i * i + 29 * i) % 40_000 + 500 for i in range(420)]  # 26 blocks: whatever else is cached goes
TOKENS = 6


async def run_of(te: TaskExecutor, prompt: list[int], tokens: int = TOKENS, **options: object) -> TaskRun:
    async with te.connect() as client:
        run = await client.generate(prompt, revision=REVISION, max_tokens=tokens, **options)  # type: ignore[arg-type]  # passed through
    assert run.error is None, run.error
    return run


async def metric(te: TaskExecutor, name: str) -> float:
    """Sum of the samples of that name; labels may be given as a regular expression's part."""
    text = (await asyncio.to_thread(httpx.get, te.metrics_url)).text
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if re.match(name, line))


async def reach(te: TaskExecutor, name: str, value: float, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while await metric(te, name) < value:
        assert time.monotonic() < deadline, f"{name} stays below {value}"
        await asyncio.sleep(0.05)


@pytest_asyncio.fixture
async def tiered(small_model_path: Path, tmp_path: Path) -> AsyncIterator[TaskExecutor]:
    disk = str(tmp_path / "disk")
    options = (
        "--host-cache-bytes",
        str(10 << 20),
        "--disk-cache",
        disk,
        "--disk-cache-bytes",
        str(200 << 20),
    )
    async with executor("te-tiers", tmp_path, options=options) as te:
        await te.load(small_model_path, REVISION, kv_cache_bytes=KV_BYTES)
        yield te


async def test_a_prefix_from_host_memory_and_from_disk_gives_the_tokens_of_an_uncached_run(
    tiered: TaskExecutor, small_model_path: Path, tmp_path: Path
) -> None:
    te = tiered
    uncached = await run_of(te, PROMPT)
    assert uncached.cached_tokens == 0
    await run_of(te, OTHER, 1)
    again = await run_of(te, PROMPT)
    assert again.tokens == uncached.tokens and again.cached_tokens == 192
    assert await metric(te, r'deepflow_rtc_populated_blocks_total{tier="host"}') > 0

    await run_of(te, OTHER[::-1], 1)
    await run_of(te, OTHER, 1)  # host memory holds 14 pages: the first prompt's are on the disk now
    await reach(te, "deepflow_rtc_disk_written_pages_total", 12)
    again = await run_of(te, PROMPT)
    assert again.tokens == uncached.tokens and again.cached_tokens == 192
    assert await metric(te, r'deepflow_rtc_populated_blocks_total{tier="disk"}') > 0
    await te.settled()

    assert await te.stop() == 0  # writes what it has in memory
    await te.start()
    await te.load(small_model_path, REVISION, kv_cache_bytes=KV_BYTES)
    await reach(te, "deepflow_rtc_disk_bytes", 1)
    again = await run_of(te, PROMPT)
    assert again.tokens == uncached.tokens and again.cached_tokens == 192
    assert await metric(te, r'deepflow_rtc_populated_blocks_total{tier="disk"}') == 12

    await te.kill()
    for path in (tmp_path / "disk").rglob("*.kv"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    await te.start()
    await te.load(small_model_path, REVISION, kv_cache_bytes=KV_BYTES)
    await reach(te, "deepflow_rtc_disk_bytes", 1)
    again = await run_of(te, PROMPT)
    assert again.tokens == uncached.tokens and again.cached_tokens == 0
    assert await metric(te, r'deepflow_rtc_disk_lost_pages_total{reason="bad"}') >= 1
    await te.settled()


def hint(te: TaskExecutor, tokens: int) -> pb.PrefixSource:
    return pb.PrefixSource(te_id=te.te_id, incarnation=te.incarnation, address=te.address, tokens=tokens)


async def test_a_prefix_from_another_executors_cache_gives_the_tokens_of_an_uncached_run(
    small_model_path: Path, tmp_path: Path
) -> None:
    """Then the source has not what it is said to have, is killed while it lends, and is gone."""
    pool = 80 << 20
    async with AsyncExitStack() as stack:
        source, remote = [
            await stack.enter_async_context(executor(te_id, tmp_path, options=("--kv-transport", "grpc")))
            for te_id in ("te-a", "te-b")
        ]
        for te in (source, remote):
            await te.load(small_model_path, REVISION, kv_cache_bytes=pool)
        uncached = await run_of(source, PROMPT)
        await run_of(remote, PROMPT[::-1], 2)  # it knows then what computing costs
        fetched = await run_of(remote, PROMPT, prefix_source=hint(source, 201))
        assert fetched.tokens == uncached.tokens and fetched.cached_tokens == 192
        assert await metric(remote, r'deepflow_rtc_populated_blocks_total{tier="peer"}') == 12
        assert await metric(remote, r'deepflow_kv_prefix_fetches_total{outcome="ok"}') == 1
        for te in (source, remote):
            await te.settled()

        # It says it holds what it does not: a miss, told by its type, and computed.
        other = await run_of(source, OTHER, 1)
        missed = await run_of(remote, OTHER[::-1], 1, prefix_source=hint(source, 400))
        assert missed.cached_tokens == 0
        assert await metric(remote, r'deepflow_kv_prefix_fetches_total{outcome="not_cached"}') == 1

        # Killed while the fetch runs: the task ends once, with the right token, and no block is left.
        async with remote.connect() as client:
            run, done, _ = await client.submit(
                OTHER, revision=REVISION, max_tokens=1, prefix_source=hint(source, 419)
            )
            while await metric(source, "deepflow_kv_prefixes_lent_total") < 2 and not done.is_set():
                await asyncio.sleep(0)
            await source.kill()
            await asyncio.wait_for(done.wait(), 60)
        assert run.error is None and run.tokens == other.tokens
        await remote.settled()

        # Gone for good: told as lost, and computed.
        gone = await run_of(remote, OTHER[1:], 1, prefix_source=hint(source, 418))
        assert gone.cached_tokens == 0
        assert await metric(remote, r'deepflow_kv_prefix_fetches_total{outcome="peer_lost"}') >= 1
        await remote.settled()
