"""The fetcher's cards: what it has fetched, gateways can tokenize for. Real Valkey, the small model."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
from redis.asyncio import Redis

from controlplane.fleet.cards import card_digest, publish_card, read_card
from controlplane.gateway.modelcard import decode_card
from controlplane.local.valkey import ValkeyServer
from controlplane.nodeagent import fetcher as module
from controlplane.nodeagent.fetcher import Fetcher, publisher


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CARD_WAIT_SECONDS", 0.05)
    monkeypatch.setattr(module, "CARD_WAIT_MAX_SECONDS", 0.2)


async def test_the_card_of_a_fetched_model_is_published_once_redis_is_there(
    valkey_server: Callable[[], ValkeyServer], small_model_path: Path, tmp_path: Path
) -> None:
    server = valkey_server()
    url = server.url
    server.kill()
    async with Redis.from_url(url) as redis:
        fetcher = Fetcher(tmp_path, publisher(redis))
        uri = f"file://{small_model_path}"
        async with asyncio.timeout(30):
            while fetcher.ask(uri)["state"] != "ready":  # the files do not wait for Redis
                await asyncio.sleep(0.05)
        server.start()
        sha256 = hashlib.sha256(small_model_path.read_bytes()).hexdigest()
        async with asyncio.timeout(30):
            while (data := await read_card(redis, f"m@{sha256[:12]}+int8")) is None:
                await asyncio.sleep(0.05)
        card = decode_card(data)
        assert card is not None and card.sha256 == sha256 and card.chat_template
        assert await redis.ttl(f"deepflow:card:{sha256[:12]}") > 29 * 86_400
        await fetcher.close()


async def test_a_model_without_a_card_is_fetched_all_the_same(clean_valkey: str, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF and nothing else")
    async with Redis.from_url(clean_valkey) as redis:
        fetcher = Fetcher(tmp_path / "cache", publisher(redis))
        async with asyncio.timeout(10):
            while fetcher.ask(f"file://{tmp_path}/m.gguf")["state"] != "ready" or fetcher._running:
                await asyncio.sleep(0.02)
        assert not await redis.keys("deepflow:card:*")


async def test_a_card_is_named_by_the_digest_in_a_revision(clean_valkey: str) -> None:
    assert card_digest("a@b@0123456789ab") == card_digest("m@0123456789ab+int4") == "0123456789ab"
    assert card_digest("model@1") is None
    async with Redis.from_url(clean_valkey) as redis:
        assert await read_card(redis, "model@1") is None
        with pytest.raises(ValueError, match="larger"):
            await publish_card(redis, "0" * 64, b" " * ((64 << 20) + 1))
