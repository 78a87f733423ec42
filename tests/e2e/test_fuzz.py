"""Bad input against the running gateway: an OpenAPI fuzz and hand-made nastiness give 4xx, never 5xx."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.stack import MODEL, Stack, clean_env

pytestmark = [pytest.mark.model]

FUZZ_HOOKS = '''
import schemathesis

@schemathesis.hook
def before_call(context, case, kwargs):
    """Valid requests really generate: keep them short."""
    body = case.body
    if isinstance(body, dict):
        for name in ("max_tokens", "max_completion_tokens", "min_tokens"):
            if isinstance(body.get(name), int) and body[name] > 4:
                body[name] = 4
        if case.path.endswith("completions") and "max_tokens" not in body:
            body["max_tokens"] = 4
'''


@pytest.mark.timeout(300)
def test_openapi_fuzz_finds_no_server_error(stack_default: Stack, tmp_path: Path) -> None:
    hooks = tmp_path / "fuzz_hooks.py"
    hooks.write_text(FUZZ_HOOKS)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{stack_default.url}/openapi.json"),
            *(
                "--checks",
                "not_a_server_error",
                "--max-examples",
                "25",
                "--phases",
                "examples,coverage,fuzzing",
            ),
            *("--generation-deterministic", "--request-timeout", "60", "--workers", "2", "--no-color"),
        ],
        env={**clean_env(), "SCHEMATHESIS_HOOKS": "fuzz_hooks", "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


CHAT = b'{"model":"%s","messages":[{"role":"user","content":"hi"}],"max_tokens":2%%s}' % MODEL.encode()


@pytest.mark.timeout(120)
async def test_bad_bodies_are_4xx_and_leave_nothing(stack_default: Stack) -> None:
    bodies: list[bytes] = [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"\xff\xfe{}",
        b'{"model":"\xc3\x28"}',
        b"[" * 100_000,
        b'{"a":' * 50_000,
        CHAT % b',"temperature":1e999',
        CHAT % b',"temperature":NaN',
        CHAT % b',"temperature":-1',
        CHAT % b',"max_tokens":-5',
        CHAT % b',"max_tokens":99999999999999999999999999',
        CHAT % b',"max_tokens":true',
        CHAT % b',"n":100000',
        CHAT % b',"n":0',
        CHAT % b',"seed":"x"',
        CHAT % b',"stop":[1,2]',
        CHAT % b',"stop":["","a"]',
        CHAT % b',"logit_bias":{"-3":1}',
        CHAT % b',"logit_bias":{"999999":1}',
        CHAT % b',"unknown_field":1',
        CHAT % b',"tools":[{"type":"function","function":{"name":"f"}}]',
        CHAT % b',"response_format":{"type":"json_object"}',
        CHAT % b',"stream":"yes"',
        b'{"model":"%s","messages":[]}' % MODEL.encode(),
        b'{"model":"%s","messages":[{"role":"user","content":"a\\u0000b"}]}' % MODEL.encode(),
        b'{"model":"%s","messages":[{"role":"user","content":"\\ud800"}]}' % MODEL.encode(),
        b'{"model":"%s","messages":[{"role":"wizard","content":"x"}]}' % MODEL.encode(),
        b'{"model":"a\\u0007b","messages":[{"role":"user","content":"x"}]}',
        json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "word " * 200_000}]}).encode(),
    ]
    async with stack_default.http() as http:
        for body in bodies:
            answer = await http.post(
                "/v1/chat/completions", content=body, headers={"content-type": "application/json"}
            )
            assert 400 <= answer.status_code < 500, (answer.status_code, body[:80])
            error = answer.json()["error"]
            assert error["message"]
            assert error["type"] == "invalid_request_error"
        wrong = await http.post("/v1/completions", content=b"a=b", headers={"content-type": "text/plain"})
        assert wrong.status_code in (400, 415)
        assert (await http.get("/v1/nothing")).json()["error"]["message"]
        assert (await http.delete("/v1/models")).status_code == 405
        assert (await http.get("/healthz")).status_code == 200
    await stack_default.wait_clean()


@pytest.mark.timeout(120)
async def test_a_100_megabyte_body_is_refused_without_being_read(stack_default: Stack) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", stack_default.port)
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        b"Content-Length: 104857600\r\n\r\n"
    )
    await writer.drain()
    status = await asyncio.wait_for(reader.readline(), 10)
    writer.close()
    await writer.wait_closed()
    assert b" 413 " in status
    await stack_default.wait_clean()
