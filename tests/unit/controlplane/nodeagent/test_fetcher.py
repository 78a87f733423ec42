"""The fetcher of an executor's pod, over HTTP: one fetch per model, failures told once, a token needed."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp.test_utils import TestClient, TestServer

from controlplane.nodeagent.fetcher import Fetcher, application

TOKEN = {"Authorization": "Bearer secret"}


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[TestClient]:  # type: ignore[type-arg]
    async with TestClient(TestServer(application(Fetcher(tmp_path / "cache"), "secret"))) as made:
        yield made


async def ask(client: TestClient, uri: object, **headers: str) -> tuple[int, dict[str, object]]:  # type: ignore[type-arg]
    answer = await client.post("/v1/models", json={"uri": uri}, headers=headers or TOKEN)
    return answer.status, await answer.json()


async def settled(client: TestClient, uri: str) -> dict[str, object]:  # type: ignore[type-arg]
    async with asyncio.timeout(20):
        while True:
            status, answer = await ask(client, uri)
            assert status == 200
            if answer["state"] != "fetching":
                return answer
            await asyncio.sleep(0.01)


async def test_a_model_is_fetched_and_named_by_its_digest(client: TestClient, tmp_path: Path) -> None:  # type: ignore[type-arg]
    model = tmp_path / "m.gguf"
    model.write_bytes(b"weights")
    answer = await settled(client, f"file://{model}")
    assert answer["state"] == "ready" and answer["path"] == str(model)
    assert answer["sha256"] == hashlib.sha256(b"weights").hexdigest()


async def test_a_failure_is_told_and_the_next_call_tries_again(client: TestClient, tmp_path: Path) -> None:  # type: ignore[type-arg]
    model = tmp_path / "m.gguf"
    answer = await settled(client, f"file://{model}")
    assert answer["state"] == "failed" and answer["hopeless"] and "m.gguf" in str(answer["message"])
    model.write_bytes(b"now")
    assert (await settled(client, f"file://{model}"))["state"] == "ready"


async def test_without_the_token_nothing_is_fetched(client: TestClient) -> None:  # type: ignore[type-arg]
    status, answer = await ask(client, "file:///x", Authorization="Bearer other")
    assert status == 401 and "token" in str(answer["message"])


async def test_bad_requests_are_refused(client: TestClient) -> None:  # type: ignore[type-arg]
    for uri in (None, 7, "", "x" * 2000):
        assert (await ask(client, uri))[0] == 400
    assert (await settled(client, "ftp://a/b"))["hopeless"] is True
