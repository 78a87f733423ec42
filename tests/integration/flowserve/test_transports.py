"""A hand-over between executors over transports that have to be asked for."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path

import httpx
import pytest

from tests.support.te import executor
from tests.support.worker_client import generate_disaggregated

pytestmark = [pytest.mark.model, pytest.mark.slow]

REVISION = "small@1"
PROMPT = [(89 * i * i + 7 * i) % 40_000 + 500 for i in range(300)]
TOKENS = 8


async def test_a_hand_over_through_a_group_equals_one_executor_token_by_token(small_model_path: Path) -> None:
    folder = Path(tempfile.mkdtemp(prefix="dfc-"))  # short: a socket's path is bounded
    options = ("--kv-transport", "collective", "--kv-checksum")
    try:
        async with AsyncExitStack() as stack:
            p, d = [
                await stack.enter_async_context(executor(te_id, folder, options=options))
                for te_id in ("te-p", "te-d")
            ]
            loads = (te.load(small_model_path, REVISION, kv_cache_bytes=64 << 20) for te in (p, d))
            await asyncio.gather(*loads)
            prefill = await stack.enter_async_context(p.connect())
            decode = await stack.enter_async_context(d.connect())
            run = await generate_disaggregated(prefill, decode, PROMPT, revision=REVISION, max_tokens=TOKENS)
            alone = await prefill.generate(PROMPT, revision=REVISION, max_tokens=TOKENS)
            assert run.error is None and alone.error is None
            assert run.tokens == alone.tokens and len(run.tokens) == TOKENS
            text = (await asyncio.to_thread(httpx.get, d.metrics_url)).text
            assert 'deepflow_kv_transfers_total{outcome="ok",transport="collective"} 1.0' in text
            for te in (p, d):
                await te.settled()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
