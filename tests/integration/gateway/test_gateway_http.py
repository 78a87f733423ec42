"""The gateway as HTTP: malformed input, headers, routes, connections. Needs the small model and Valkey."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import orjson
import pytest

from tests.integration.gateway.conftest import (
    MODEL,
    Stack,
    StartStack,
    catalogue_entry,
    write_catalogue,
)

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
USER = [{"role": "user", "content": "hi"}]


def chat(**fields: Any) -> bytes:
    return json.dumps({"model": MODEL, "messages": USER, **fields}).encode()


def text(**fields: Any) -> bytes:
    return json.dumps({"model": MODEL, "prompt": "hi", **fields}).encode()


# (route, body, status, param, code); None = not looked at.
MALFORMED: list[tuple[str, bytes, int, str | None, str | None]] = [
    (CHAT, b"", 400, None, "invalid_json"),
    (CHAT, b"{", 400, None, "invalid_json"),
    (CHAT, b"[1, 2]", 400, None, "invalid_json"),
    (CHAT, b"null", 400, None, "invalid_json"),
    (CHAT, b'{"model": "\xff\xfe"}', 400, None, "invalid_json"),
    (CHAT, b'{"model": "\\ud800"}', 400, None, "invalid_json"),
    (CHAT, b'{"model": "a\x01b"}', 400, None, "invalid_json"),
    (CHAT, b"[" * 100_000, 400, None, "invalid_json"),
    (CHAT, b'{"a":' * 5000 + b"1" + b"}" * 5000, 400, None, "invalid_json"),
    (CHAT, b'{"temperature": NaN}', 400, None, "invalid_json"),
    (CHAT, b'{"temperature": 1e999}', 400, None, "invalid_json"),
    (CHAT, orjson.dumps({"messages": USER}), 400, "model", "missing_required_parameter"),
    (CHAT, orjson.dumps({"model": MODEL}), 400, "messages", "missing_required_parameter"),
    (CHAT, chat(model=5), 400, "model", "invalid_type"),
    (CHAT, chat(model=""), 400, "model", None),
    (CHAT, chat(model="a\u0007b"), 400, "model", None),
    (CHAT, chat(model="nobody/nothing"), 404, "model", "model_not_found"),
    (CHAT, chat(messages=[]), 400, "messages", None),
    (CHAT, chat(messages="hi"), 400, "messages", "invalid_type"),
    (CHAT, chat(messages=[{"role": "wizard", "content": "hi"}]), 400, "messages[0].role", None),
    (CHAT, chat(messages=[{"role": "user", "content": 5}]), 400, "messages[0].content", None),
    (CHAT, chat(messages=[{"role": "user", "content": "a\0b"}]), 400, "messages[0].content", None),
    (CHAT, chat(messages=[{"role": "user", "content": "x", "mood": 1}]), 400, "messages[0].mood", None),
    (
        CHAT,
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
        400,
        None,
        None,
    ),
    (CHAT, chat(temperature=-0.1), 400, "temperature", "invalid_value"),
    (CHAT, chat(temperature=2.1), 400, "temperature", "invalid_value"),
    (CHAT, chat(temperature="hot"), 400, "temperature", "invalid_type"),
    (CHAT, chat(temperature=True), 400, "temperature", "invalid_type"),
    (CHAT, chat(top_p=1.5), 400, "top_p", "invalid_value"),
    (CHAT, chat(top_k=-2), 400, "top_k", "invalid_value"),
    (CHAT, chat(min_p=2), 400, "min_p", "invalid_value"),
    (CHAT, chat(n=0), 400, "n", "invalid_value"),
    (CHAT, chat(n=True), 400, "n", "invalid_type"),
    (CHAT, chat(n=1.5), 400, "n", None),
    (CHAT, chat(n=100), 400, "n", "invalid_value"),
    (CHAT, chat(n=2**63), 400, "n", None),
    (CHAT, b'{"model":"%s","messages":[],"n":%s}' % (MODEL.encode(), b"9" * 400), 400, None, None),
    (CHAT, chat(max_tokens=-1), 400, "max_tokens", "invalid_value"),
    (CHAT, chat(max_tokens=0), 400, "max_tokens", "invalid_value"),
    (CHAT, chat(max_tokens=2**31 - 1), 400, None, "context_length_exceeded"),
    (CHAT, chat(max_tokens=2**40), 400, "max_tokens", "invalid_value"),
    (CHAT, chat(seed=2**80), 400, "seed", None),
    (CHAT, chat(stop=["a"] * 5), 400, "stop", None),
    (CHAT, chat(stop=""), 400, "stop", None),
    (CHAT, chat(stop="x" * 5000), 400, "stop", None),
    (CHAT, chat(stop=5), 400, "stop", None),
    (CHAT, chat(presence_penalty=-2.5), 400, "presence_penalty", "invalid_value"),
    (CHAT, chat(repetition_penalty=0), 400, "repetition_penalty", "invalid_value"),
    (CHAT, chat(logit_bias={"5": 101}), 400, None, "invalid_value"),
    (CHAT, chat(logit_bias={"cat": 1}), 400, None, None),
    (CHAT, chat(logit_bias={"999999": 1}), 400, "logit_bias", "invalid_value"),
    (CHAT, chat(logit_bias={str(i): 1 for i in range(5000)}), 400, "logit_bias", None),
    (CHAT, chat(top_logprobs=21, logprobs=True), 400, "top_logprobs", "invalid_value"),
    (CHAT, chat(top_logprobs=2), 400, "top_logprobs", "invalid_value"),
    (CHAT, chat(stream_options={"include_usage": True}), 400, "stream_options", "invalid_value"),
    (CHAT, chat(stream="yes"), 400, "stream", "invalid_type"),
    (CHAT, chat(unheard_of=1), 400, "unheard_of", "unknown_parameter"),
    (CHAT, chat(**{f"f{i}": 1 for i in range(100_000)}), 400, None, None),
    (CHAT, chat(tools=[{"type": "function"}]), 400, "tools", "unsupported_parameter"),
    (CHAT, chat(functions=[{}]), 400, "functions", "unsupported_parameter"),
    (CHAT, chat(response_format={"type": "json_object"}), 400, None, "unsupported_parameter"),
    (CHAT, chat(audio={"voice": "x"}), 400, "audio", "unsupported_parameter"),
    (CHAT, chat(modalities=["audio"]), 400, None, "unsupported_parameter"),
    (TEXT, text(suffix="tail"), 400, "suffix", "unsupported_parameter"),
    (TEXT, text(best_of=2), 400, "best_of", "unsupported_parameter"),
    (TEXT, text(prompt=[]), 400, "prompt", None),
    (TEXT, text(prompt=[[]]), 400, None, None),
    (TEXT, text(prompt=[1, "two"]), 400, None, None),
    (TEXT, text(prompt=[-1]), 400, None, None),
    (TEXT, text(prompt=[49152]), 400, "prompt", "invalid_value"),
    (TEXT, text(prompt=[True] * 200_000), 400, None, None),
    (TEXT, text(prompt=["a"] * 200), 400, "prompt", "invalid_value"),
    (TEXT, text(max_tokens=0), 400, "max_tokens", "invalid_value"),
    (TEXT, text(prompt="word " * 2100), 400, None, "context_length_exceeded"),
    (TEXT, text(prompt="x" * 5_000_000), 400, None, "context_length_exceeded"),
    (TEXT, text(prompt=[5] * 2048), 400, None, "context_length_exceeded"),
    (TEXT, text(min_tokens=17), 400, "min_tokens", "invalid_value"),
    ("/v1/tokenize", orjson.dumps({"model": MODEL}), 400, "prompt", None),
    ("/v1/detokenize", orjson.dumps({"model": MODEL, "tokens": [99999]}), 400, "tokens", None),
]


async def test_malformed_input_is_a_clear_4xx_and_leaves_nothing(stack: Stack) -> None:
    problems: list[str] = []
    async with stack.http() as http:
        for route, body, status, param, code in MALFORMED:
            answer = await http.post(route, content=body, headers={"content-type": "application/json"})
            error = answer.json()["error"]
            assert list(error) == ["message", "type", "param", "code"]
            expected = (status, param if param is not None else error["param"], code or error["code"])
            got = (answer.status_code, error["param"], error["code"])
            if got != expected or not error["message"]:
                problems.append(f"{route} {body[:80]!r}: wanted {expected}, got {got}: {error['message']}")
    assert not problems, "\n".join(problems)
    assert stack.gateway.limiter.in_flight == 0 and stack.executor.jobs == []


async def test_documented_fields_without_effect_are_accepted(stack: Stack) -> None:
    ignored = {
        "user": "u", "store": True, "metadata": {"a": "b"}, "service_tier": "auto", "tools": [],
        "parallel_tool_calls": True, "response_format": {"type": "text"}, "tool_choice": "none",
        "logit_bias": None, "stop": None, "n": None, "reasoning_effort": "low", "stream_options": None,
    }  # fmt: skip
    async with stack.http() as http:
        answer = await http.post(CHAT, json={"model": MODEL, "messages": USER, **ignored})
        assert answer.status_code == 200, answer.text
        whole = {"n": 1.0, "max_tokens": 5.0, "seed": -3.0}
        answer = await http.post(TEXT, json={"model": MODEL, "prompt": [5.0, 6], **whole})
        assert answer.status_code == 200, "JSON has one kind of number"
        parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
        roles = ["developer", "user", "assistant", "tool"]
        messages = [{"role": role, "content": parts} for role in roles]
        answer = await http.post(CHAT, json={"model": MODEL, "messages": messages})
        assert answer.status_code == 200, answer.text
        shown = answer.json()["choices"][0]["message"]["content"]
        assert shown == "system\nhello\nuser\nhello\nassistant\nhello\ntool\nhello\nassistant\n"


async def test_body_bounds(start: StartStack) -> None:
    stack = await start(max_body_bytes=1 << 20, body_seconds=0.3)
    async with stack.http() as http:
        for body in (b"x" * (100 << 20), _chunks(8 << 20)):
            answer = await http.post(CHAT, content=body, headers={"content-type": "application/json"})
            assert answer.status_code == 413 and answer.json()["error"]["code"] == "request_too_large"
        for media in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
            answer = await http.post(CHAT, content=chat(), headers={"content-type": media})
            assert answer.status_code == 415
        answer = await http.post(
            CHAT, content=chat(), headers={"content-type": "application/json; charset=utf-8"}
        )
        assert answer.status_code == 200
    reader, writer = await asyncio.open_connection("127.0.0.1", stack.port)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
    writer.write(b"Content-Length: 1000\r\n\r\n{")
    assert b" 408 " in await reader.readline()
    writer.close()


async def _chunks(size: int) -> Any:
    for _ in range(size >> 16):
        yield b"x" * (1 << 16)


async def test_header_bounds(start: StartStack) -> None:
    stack = await start(max_header_bytes=4096, header_seconds=0.3)
    for head, status in (
        (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Big: " + b"x" * 8000 + b"\r\n\r\n", b"431"),
        (b"GET /" + b"x" * 8000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", b"431"),
        (b"NONSENSE\r\n\r\n", b"400"),
        (b"GET /healthz HTTP/1.1\r\nHost: loc", b"408"),
        (b"", b"408"),
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", stack.port)
        writer.write(head)
        async with asyncio.timeout(3):
            answer = await reader.read()
        assert status in answer.split(b"\r\n")[0], (head[:40], answer)
        assert b'{"error":{"message":' in answer
        writer.close()


async def test_unknown_routes_and_methods_have_openai_errors(stack: Stack) -> None:
    async with stack.http() as http:
        answer = await http.get("/v1/nothing")
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "unknown_url"
        answer = await http.get(CHAT)
        assert answer.status_code == 405 and answer.json()["error"]["type"] == "invalid_request_error"
        assert answer.headers["allow"] == "POST"
        answer = await http.get("/deepflow/v1/jobs?limit=0")
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "limit"
        assert (await http.get("/")).json()["name"] == "deepflow"
        document = (await http.get("/openapi.json")).json()
        operation = document["paths"][CHAT]["post"]
        assert {"200", "400", "401", "404", "413", "415", "429", "500", "503", "504"} <= set(
            operation["responses"]
        )
        reference = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        schema = document["components"]["schemas"][reference.rsplit("/", 1)[1]]
        assert schema["additionalProperties"] is False and "messages" in schema["required"]


async def test_request_id_and_traceparent(stack: Stack) -> None:
    trace = "0af7651916cd43dd8448eb211c80319c"
    async with stack.http() as http:
        given = {"x-request-id": "abc-123", "traceparent": f"00-{trace}-b7ad6b7169203331-01"}
        answer = await http.post(CHAT, content=chat(), headers={"content-type": "application/json", **given})
        assert answer.headers["x-request-id"] == "abc-123"
        assert answer.headers["traceparent"].split("-")[1] == trace
        assert answer.headers["x-deepflow-job"] == "job_0"
        request = stack.executor.requests[0]
        assert request.request_id == "abc-123" and request.traceparent.split("-")[1] == trace
        for bad in ({"x-request-id": "no spaces allowed"}, {"traceparent": "00-zz-yy-01"}, {}):
            answer = await http.get("/healthz", headers=bad)
            assert answer.headers["x-request-id"].startswith("req_")
            assert len(answer.headers["traceparent"]) == 55 and trace not in answer.headers["traceparent"]


async def test_tokenize_and_detokenize(stack: Stack) -> None:
    async with stack.http() as http:
        answer = await http.post(
            "/v1/tokenize", json={"model": MODEL, "prompt": "year 2024", "return_token_strs": True}
        )
        body = answer.json()
        assert body["token_strs"] == ["year", " ", "2", "0", "2", "4"] and body["count"] == 6
        assert body["max_model_len"] == 2048
        answer = await http.post("/v1/detokenize", json={"model": MODEL, "tokens": body["tokens"]})
        assert answer.json() == {"prompt": "year 2024"}
        answer = await http.post("/v1/tokenize", json={"model": MODEL, "messages": USER})
        assert answer.json()["count"] > 10


async def test_readiness_really_asks_the_model(stack: Stack) -> None:
    async with stack.http() as http:
        assert (await http.get("/readyz")).status_code == 200
        assert (await http.get("/readyz?model=nope")).json()["error"]["code"] == "model_not_found"
        answers = await asyncio.gather(*(http.get(f"/readyz?model={MODEL}") for _ in range(5)))
        assert {answer.status_code for answer in answers} == {200}
        assert len(stack.executor.jobs) == 1, "one probe for all, and its answer lasts"
        stack.executor.serving = False
        assert (await http.get(f"/readyz?model={MODEL}")).status_code == 503
        stack.executor.accepting = False
        assert (await http.get("/readyz")).status_code == 503
        assert (await http.get("/healthz")).status_code == 200
        metrics = (await http.get("/metrics")).text
        assert 'deepflow_gateway_probes_total{outcome="ok"}' in metrics


async def test_catalogue_is_followed(start: StartStack, catalogue_path: Any, small_model_path: Any) -> None:
    stack = await start(catalogue_poll_seconds=0.05)
    old = catalogue_entry(small_model_path, default=True)
    new = catalogue_entry(small_model_path, revision=f"{MODEL}@ffffffffffff", default=False, aliases=["next"])
    write_catalogue(catalogue_path, [old, new])
    async with stack.http() as http, asyncio.timeout(10):
        while (await http.get("/v1/models/next")).status_code != 200:
            await asyncio.sleep(0.05)
        assert (await http.get(f"/v1/models/{MODEL}")).json()["revision"] == old["revision"]
        assert (await http.get("/v1/models/next")).json()["revision"] == new["revision"]
        assert (await http.get(f"/v1/models/{new['revision']}")).json()["revision"] == new["revision"]
        catalogue_path.write_text("{nonsense")
        await asyncio.sleep(0.2)
        assert (await http.get("/v1/models/next")).status_code == 200, "a broken file changes nothing"


async def test_jobs_are_scoped_to_their_tenant(stack: Stack) -> None:
    from controlplane.gateway.keys import create_key

    stack.runtime.store.records = [
        {"job_id": "job_a", "tenant": "default", "state": "succeeded"},
        {"job_id": "job_b", "tenant": "acme", "state": "running"},
    ]
    key, _ = await create_key(stack.redis, tenant="acme")
    admin, _ = await create_key(stack.redis, tenant="ops", admin=True)

    def seen(answer: httpx.Response) -> set[str]:
        return {job["job_id"] for job in answer.json()["data"]}

    async with stack.http() as http:
        assert seen(await http.get("/deepflow/v1/jobs")) == {"job_a", "job_b"}
        acme = {"authorization": f"Bearer {key}"}
        assert seen(await http.get("/deepflow/v1/jobs", headers=acme)) == {"job_b"}
        spoofed = {**acme, "x-tenant-id": "default"}
        assert (await http.get("/deepflow/v1/jobs/job_a", headers=spoofed)).status_code == 404
        assert (await http.get("/deepflow/v1/jobs/job_b", headers=acme)).json()["state"] == "running"
        assert (await http.get("/deepflow/v1/executors", headers=acme)).status_code == 403
        ops = {"authorization": f"Bearer {admin}"}
        assert (await http.get("/deepflow/v1/executors", headers=ops)).json()["data"][0]["te_id"] == "te-0"
        assert (await http.get("/deepflow/v1/jobs/none", headers=ops)).status_code == 404


@pytest.mark.parametrize("stream", [False, True])
async def test_usage_is_metered_per_tenant(start: StartStack, stream: bool) -> None:
    import time

    from controlplane.gateway.keys import create_key, list_keys
    from controlplane.gateway.metering import read_usage

    stack = await start(usage_flush_seconds=0.05)
    key, _ = await create_key(stack.redis, tenant="acme")
    client = stack.client(key)
    created: Any = await client.completions.create(model=MODEL, prompt="one two three", stream=stream)
    if stream:
        async for _ in created:
            pass
    async with asyncio.timeout(5):
        while not (usage := await read_usage(stack.redis, time.strftime("%Y-%m-%d", time.gmtime()))):
            await asyncio.sleep(0.05)
    assert usage == {("acme", MODEL): {"requests": 1, "prompt_tokens": 3, "completion_tokens": 4}}
    assert (await list_keys(stack.redis))[0].last_used is not None
