"""API keys and limits end to end, against real Valkey."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import httpx
import openai
import pytest

from controlplane.gateway.keys import KeyLimits, create_key, list_keys, revoke_key
from controlplane.local.valkey import ValkeyServer
from tests.integration.gateway.conftest import MODEL, Stack, StartStack


async def ask(stack: Stack, key: str) -> str:
    client = stack.client(key)
    answer = await client.completions.create(model=MODEL, prompt="one two three")
    return answer.choices[0].text


async def test_a_key_lives_from_creation_to_revocation(start: StartStack) -> None:
    stack = await start(key_cache_seconds=0.1, require_key=True)
    key, record = await create_key(stack.redis, tenant="acme", name="laptop", priority=5)
    assert key.startswith("sk-df-") and await ask(stack, key) == "one two three"
    request = stack.executor.requests[0]
    assert (request.tenant, request.priority, request.key_id) == ("acme", 5, record.key_id)
    assert request.cache_salt, "tenants share no cache blocks"
    assert key not in str(await stack.redis.keys("*")), "only hashes are stored"
    assert [found.key_id for found in await list_keys(stack.redis)] == [record.key_id]
    assert await revoke_key(stack.redis, record.key_id)
    assert not await revoke_key(stack.redis, record.key_id), "revoked once"
    await asyncio.sleep(0.15)
    with pytest.raises(openai.AuthenticationError):
        await ask(stack, key)
    with pytest.raises(openai.AuthenticationError):
        await ask(stack, "EMPTY")
    assert (await list_keys(stack.redis, "acme"))[0].revoked is not None


async def test_an_expired_key_is_refused(stack: Stack) -> None:
    key, _ = await create_key(stack.redis, tenant="acme", expires_in=0.05)
    await asyncio.sleep(0.1)
    with pytest.raises(openai.AuthenticationError):
        await ask(stack, key)


async def test_loopback_needs_no_key_but_a_wrong_one_is_refused(stack: Stack) -> None:
    async with stack.http() as http:
        assert (await http.get("/v1/models")).status_code == 200
        for headers, status in (
            ({"authorization": "Bearer sk-df-nope"}, 401),
            ({"authorization": "Bearer sk-anything"}, 401),
            ({"authorization": "Basic abc"}, 401),
            ({"x-forwarded-for": "10.0.0.1"}, 401),
            ({"host": "evil.example"}, 401),
            ({"origin": "https://evil.example"}, 401),
            ({"origin": "http://localhost:3000"}, 200),
        ):
            answer = await http.get("/v1/models", headers=headers)
            assert answer.status_code == status, headers
            if status == 401:
                assert answer.json()["error"]["code"] in ("invalid_api_key", "missing_api_key")


async def test_known_keys_survive_an_outage_of_redis(
    start: StartStack, valkey_server: Callable[[], ValkeyServer]
) -> None:
    server = valkey_server()
    stack = await start(redis_url=server.url, key_cache_seconds=0.05, redis_seconds=0.2)
    key, _ = await create_key(stack.redis, tenant="acme", limits=KeyLimits(requests_per_minute=2))
    other, _ = await create_key(stack.redis, tenant="acme")
    assert await ask(stack, key)
    server.kill()
    await asyncio.sleep(0.1)
    assert await ask(stack, key), "a known key goes on working"
    with pytest.raises(openai.InternalServerError) as caught:
        await ask(stack, other)
    assert caught.value.status_code == 503 and caught.value.code == "auth_unavailable"
    assert await ask(stack, key)
    with pytest.raises(openai.RateLimitError):
        await ask(stack, key)  # counted locally meanwhile


async def test_equal_request_ids_are_not_one_running_request(stack: Stack) -> None:
    key, _ = await create_key(stack.redis, tenant="a", limits=KeyLimits(concurrent=1))
    stack.executor.first_delay = 0.3
    headers = {"authorization": f"Bearer {key}", "x-request-id": "mine"}
    body = {"model": MODEL, "prompt": "one two"}
    async with stack.http(headers=headers) as http:
        answers = await asyncio.gather(*(http.post("/v1/completions", json=body) for _ in range(3)))
    assert sorted(answer.status_code for answer in answers) == [200, 429, 429]


async def test_a_burst_on_a_cold_key_waits_for_redis_instead_of_failing(stack: Stack) -> None:
    key, _ = await create_key(stack.redis, tenant="a", limits=KeyLimits(concurrent=1000))
    limits = httpx.Limits(max_connections=200)
    async with stack.http(headers={"authorization": f"Bearer {key}"}, limits=limits) as http:
        answers = await asyncio.gather(*(http.get("/v1/models") for _ in range(200)))
    assert {answer.status_code for answer in answers} == {200}


async def test_request_rate_token_rate_and_concurrency(stack: Stack) -> None:
    if time.time() % 60 > 55:
        await asyncio.sleep(6)  # not across a minute's turn
    per_minute, _ = await create_key(stack.redis, tenant="a", limits=KeyLimits(requests_per_minute=2))
    await ask(stack, per_minute)
    await ask(stack, per_minute)
    with pytest.raises(openai.RateLimitError) as caught:
        await ask(stack, per_minute)
    assert caught.value.code == "rate_limit_exceeded"
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60

    # 3 prompt tokens are counted at admission, 4 completion tokens at the end.
    tokens, _ = await create_key(stack.redis, tenant="a", limits=KeyLimits(tokens_per_minute=10))
    await ask(stack, tokens)
    await ask(stack, tokens)
    with pytest.raises(openai.RateLimitError, match="tokens per minute"):
        await ask(stack, tokens)

    one, _ = await create_key(stack.redis, tenant="a", limits=KeyLimits(concurrent=1))
    stack.executor.first_delay = 0.3
    results = await asyncio.gather(ask(stack, one), ask(stack, one), return_exceptions=True)
    assert sorted(type(result).__name__ for result in results) == ["RateLimitError", "str"]
    stack.executor.first_delay = 0
    for _ in range(3):
        await ask(stack, one)  # the slot is free the moment an answer is there
