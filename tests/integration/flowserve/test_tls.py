"""Executors that speak TLS: a hand-over of KV between them, the plain stream, probes, and who is refused."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import httpx
import pytest

from flowserve.shell import health
from kvtransfer.channel import open_channel
from kvtransfer.tls import TLS_DIR_ENV, Tls
from tests.support.certificates import Authority
from tests.support.stack import free_port
from tests.support.te import executor
from tests.support.worker_client import generate_disaggregated

pytestmark = pytest.mark.model

REVISION = "small@1"
PROMPT = [(89 * i * i + 7 * i) % 40_000 + 500 for i in range(120)]
TOKENS = 6


async def test_prefill_and_decode_under_tls_give_the_tokens_of_one_executor(
    small_model_path: Path, tmp_path: Path
) -> None:
    probes = free_port()
    authority = Authority(tmp_path / "authority")
    client = Tls(authority.write(tmp_path / "client"))
    async with AsyncExitStack() as stack:
        p, d = [
            await stack.enter_async_context(
                executor(
                    te_id, tmp_path, tls=client,
                    env={TLS_DIR_ENV: str(authority.write(tmp_path / te_id))},
                    options=("--health-listen", f"127.0.0.1:{probes}") if te_id == "te-p" else (),
                )
            )
            for te_id in ("te-p", "te-d")
        ]  # fmt: skip
        await asyncio.gather(*(te.load(small_model_path, REVISION, kv_cache_bytes=64 << 20) for te in (p, d)))
        prefill = await stack.enter_async_context(p.connect())
        decode = await stack.enter_async_context(d.connect(plain=True))
        run = await generate_disaggregated(prefill, decode, PROMPT, revision=REVISION, max_tokens=TOKENS)
        alone = await prefill.generate(PROMPT, revision=REVISION, max_tokens=TOKENS)
        assert run.error is None and alone.error is None
        assert run.tokens == alone.tokens and len(run.tokens) == TOKENS
        text = (await asyncio.to_thread(httpx.get, d.metrics_url)).text
        assert 'deepflow_kv_transfers_total{outcome="ok",transport="grpc"} 1.0' in text
        # A kubelet's probe speaks no TLS: health has a port for it, and nothing else is there.
        async with open_channel(f"127.0.0.1:{probes}") as channel:
            assert await channel.unary_unary(f"{health.METHODS}Check")(b"", timeout=5) == health.SERVING
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await channel.unary_unary("/deepflow.v1.TaskExecutor/GetStatus")(b"", timeout=5)
            assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
        p.tls = None
        with pytest.raises(grpc.aio.AioRpcError):
            await p.status()
        p.tls = client
        for te in (p, d):
            await te.settled()
