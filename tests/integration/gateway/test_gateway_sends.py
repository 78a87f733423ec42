"""How a stream's bytes leave: past layers that change nothing, few writes, a deadline for a blocked one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import orjson
import pytest
from starlette.types import Message, Receive, Scope, Send

from controlplane.gateway.connection import EXTENSION
from controlplane.gateway.keys import KeyLimits
from tests.integration.gateway.conftest import MODEL, Stack, StartStack

PATH = "/v1/chat/completions"


def body(**fields: object) -> bytes:
    messages = [{"role": "user", "content": "one two three"}]
    return orjson.dumps({"model": MODEL, "messages": messages, "stream": True, "max_tokens": 4, **fields})


class Told:
    """A connection (`controlplane.gateway.connection`) that keeps what is written to it."""

    def __init__(self, sent: list[Message]) -> None:
        self.sent = sent
        self.is_full = False
        self.fills = False  # with what begins the answer
        self.aborted = False

    def body(self) -> bytes | None:
        return None

    def full(self) -> bool:
        return self.is_full

    def begin(self, headers: Sequence[tuple[bytes, bytes]], data: bytes) -> None:
        self.sent.append({"type": "http.response.start", "status": 200, "headers": headers})
        if data:
            self.write(data)
        self.is_full = self.fills

    def write(self, data: bytes) -> None:
        self.sent.append({"type": "http.response.body", "body": data, "more_body": True})

    def on_lost(self, callback: Callable[[], None]) -> None:
        self.leave = callback

    def abort(self) -> None:
        self.aborted = True


async def ask(stack: Stack, data: bytes, *, told: bool = True) -> list[Message]:
    """The messages that the application sends to its server, one request."""
    sent: list[Message] = []
    extensions = {EXTENSION: Told(sent)} if told else {}
    given = False

    async def receive() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": data, "more_body": False}
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json"), (b"x-request-id", b"mine")]
    scope: dict[str, Any] = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": PATH,
        "raw_path": PATH.encode(), "root_path": "", "scheme": "http", "query_string": b"", "headers": headers,
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", stack.port), "extensions": extensions,
    }  # fmt: skip
    async with asyncio.timeout(10):
        await stack.app(scope, receive, send)
    return sent


def bodies(sent: list[Message]) -> list[bytes]:
    return [message["body"] for message in sent if message["type"] == "http.response.body"]


async def test_each_step_is_one_message_and_the_last_one_carries_the_end(stack: Stack) -> None:
    stack.executor.script = lambda request, index: [500, 600, 700, 800, 900]
    sent = await ask(stack, body())
    assert [message["type"] for message in sent] == ["http.response.start"] + ["http.response.body"] * 4
    assert dict(sent[0]["headers"])[b"x-request-id"] == b"mine", "the start has what the layers add"
    parts = bodies(sent)
    assert [part.count(b"data: ") for part in parts] == [2, 1, 1, 3]  # role; …; last token, finish, [DONE]
    assert parts[-1].endswith(b"data: [DONE]\n\n") and sent[-1]["more_body"] is False


async def test_server_that_does_not_tell_of_its_buffer_gets_the_same_bytes(stack: Stack) -> None:
    stack.executor.script = lambda request, index: [500, 600, 700, 800, 900]
    told = await ask(stack, body(seed=1))
    untold = await ask(stack, body(seed=1), told=False)

    def texts(sent: list[Message]) -> list[Any]:
        events = [line[6:] for line in b"".join(bodies(sent)).splitlines() if line.startswith(b"data: {")]
        return [orjson.loads(event)["choices"] for event in events]

    assert texts(told) == texts(untold) != []


async def test_sends_into_a_full_buffer_are_given_a_deadline(start: StartStack) -> None:
    stack = await start(sse_stall_seconds=0.2)
    stack.executor.script = lambda request, index: [500] * 50
    connections: list[Told] = []

    async def stuck(scope: Scope, receive: Receive, send: Send) -> None:
        async def blocked(message: Message) -> None:
            if connection.is_full:
                await asyncio.Event().wait()
            await send(message)

        connection: Told = scope["extensions"][EXTENSION]
        connection.fills = True  # after the answer's start nothing is read
        connections.append(connection)
        await app(scope, receive, blocked)

    app = stack.app
    stack.app = stuck  # type: ignore[assignment]  # an ASGI application in front of the FastAPI one
    await ask(stack, body(max_tokens=50))
    assert connections[0].aborted
    assert stack.executor.jobs[0].cancelled == "client too slow"
    stack.app = app
    assert stack.gateway.limiter.in_flight == 0


async def test_last_token_does_not_wait_for_a_limited_key_to_be_released(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With limits, settling is a call to Redis: the last piece goes out before it."""
    stack.executor.script = lambda request, index: [500, 600, 700, 800, 900]
    limiter = stack.gateway.limiter
    admit = limiter.admit

    async def limited(principal: Any, request_id: str, tokens: int) -> Any:
        lease = await admit(principal, request_id, tokens)
        lease._limits = KeyLimits(concurrent=5)
        return lease

    monkeypatch.setattr(limiter, "admit", limited)
    sent = await ask(stack, body())
    assert [part.count(b"data: ") for part in bodies(sent)] == [2, 1, 1, 2, 1]


async def test_error_after_the_headers_is_in_band_past_the_layers_too(stack: Stack) -> None:
    stack.executor.script = lambda request, index: [500] * 50
    stack.executor.fail_after = 2
    sent = await ask(stack, body(max_tokens=50))
    last = bodies(sent)[-1]
    assert b'data: {"error"' in last and last.endswith(b"data: [DONE]\n\n")
    assert sent[0]["status"] == 200
