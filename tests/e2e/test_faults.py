"""Faults with real processes: the answer completes as if nothing had happened, and nothing is left behind.

float32, greedy: byte-identical text is demanded. After each fault: no task, no leaked block, no stuck task.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from deepflow.v1 import worker_pb2

from kvtransfer.auth import call_metadata
from tests.support.http_client import StreamRun, stream
from tests.support.stack import MODEL, Stack, until

pytestmark = [pytest.mark.model, pytest.mark.timeout(300)]

PROMPT = "Write a long story about a lighthouse keeper, her dog, and the storm that changed the island."
TOKENS = 96


def chat(prompt: str = PROMPT, tokens: int = TOKENS, **extra: Any) -> dict[str, Any]:
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **extra,
    }


def long_prompt(words: int) -> str:
    return "Summarise: " + " ".join(
        f"item {number} costs {number * 7 % 101} coins," for number in range(words)
    )


async def ask(stack: Stack, payload: dict[str, Any], **kwargs: Any) -> StreamRun:
    return await stream("127.0.0.1", stack.port, "/v1/chat/completions", payload, **kwargs)


async def answered(stack: Stack, payload: dict[str, Any]) -> str:
    """The undisturbed answer."""
    run = await ask(stack, payload)
    check_complete(run, payload)
    return run.text()


def check_complete(run: StreamRun, payload: dict[str, Any]) -> None:
    assert run.error() is None, run.error()
    assert run.done, "the stream ended without [DONE]"
    usage: Any = run.parsed()[-1]["usage"]
    assert usage["completion_tokens"] == payload["max_tokens"]


async def job_of(stack: Stack, request_id: str) -> dict[str, Any] | None:
    async with stack.http() as http:
        for job in (await http.get("/deepflow/v1/jobs", params={"limit": 20})).json()["data"]:
            if job["request_id"] == request_id:
                return dict(job)
    return None


class Watched:
    """A stream whose progress can be seen while it runs."""

    def __init__(self, stack: Stack, payload: dict[str, Any], request_id: str = "") -> None:
        self.run = StreamRun()
        self.payload = payload
        headers = {"x-request-id": request_id} if request_id else None
        self.task = asyncio.create_task(ask(stack, payload, headers=headers, run=self.run))

    async def reach(self, events: int, timeout: float = 60) -> None:
        await until(lambda: self.task.done() or len(self.run.events) >= events, timeout)
        assert not self.task.done(), f"ended early: {self.run.error()}"

    async def text(self) -> str:
        run = await self.task
        check_complete(run, self.payload)
        return run.text()


async def disturbed(
    stack: Stack, hurt: Callable[[Watched], Awaitable[None]], payload: dict[str, Any]
) -> None:
    """Asks once undisturbed and once with `hurt`, and compares."""
    await stack.wait_ready()
    want = await answered(stack, payload)
    watched = Watched(stack, payload)
    await hurt(watched)
    got = await watched.text()
    assert got == want
    await stack.wait_ready()
    await stack.wait_clean()


async def test_decode_executor_killed_mid_stream(stack_float32: Stack) -> None:
    async def hurt(watched: Watched) -> None:
        await watched.reach(20)
        stack_float32.kill(stack_float32.executor("decode")["te_id"])

    await disturbed(stack_float32, hurt, chat())


async def test_an_executor_that_somebody_puts_to_sleep_is_woken(stack_float32: Stack) -> None:
    stack = stack_float32
    await stack.wait_ready()
    want = await answered(stack, chat())
    te = stack.executor("decode")
    async with stack.client(te) as client:
        slept = await client.stub.Sleep(
            worker_pb2.SleepRequest(timeout_ms=10_000), metadata=call_metadata(stack.token), timeout=20
        )
    assert slept.model_revision == stack.revision
    assert await answered(stack, chat()) == want  # by the other, or by this one once it is awake
    await stack.wait_ready()
    status = (await stack.executor_status())[te["te_id"]]
    assert status.record.start_path == "wake" and not status.record.asleep
    assert await answered(stack, chat()) == want
    await stack.wait_clean()


async def test_prefill_executor_killed_mid_prefill(stack_float32: Stack) -> None:
    stack = stack_float32
    payload = chat(long_prompt(260), 32)

    async def hurt(watched: Watched) -> None:
        name = stack.executor("prefill")["te_id"]
        async with stack.client(stack.executor("prefill")) as client:
            deadline = time.monotonic() + 20
            while not (client.load and client.load.running and client.load.queued_prefill_tokens):
                assert time.monotonic() < deadline, "the prefill was never seen running"
                await asyncio.sleep(0.02)
        stack.kill(name)

    # A prefix that is cached would make the second prefill too short to be caught: the text differs.
    await stack.wait_ready()
    watched = Watched(stack, payload)
    await hurt(watched)
    got = await watched.text()
    await stack.wait_ready()
    assert got == await answered(stack, payload)
    await stack.wait_clean()


async def test_prefill_executor_killed_mid_transfer(stack_float32: Stack) -> None:
    stack = stack_float32
    payload = chat(long_prompt(90), 32)
    await stack.wait_ready()
    decode, prefill = stack.executor("decode")["te_id"], stack.executor("prefill")["te_id"]
    # The decode side stands still while the prefill ends, so the pull can only start after the kill.
    stack.signal(decode, signal.SIGSTOP)
    try:
        watched = Watched(stack, payload)
        await watched.reach(2)  # role and first token: the prefill has handed over
        stack.kill(prefill)
    finally:
        stack.signal(decode, signal.SIGCONT)
    got = await watched.text()
    await stack.wait_ready()
    assert got == await answered(stack, payload)
    await stack.wait_clean()


async def test_gateway_killed_workers_drop_its_tasks(stack_float32: Stack) -> None:
    stack = stack_float32
    await stack.wait_ready()
    watched = Watched(stack, chat(tokens=2000))
    await watched.reach(10)
    gateway = next(c for c in stack.status()["children"] if c["kind"] == "gateway")["name"]
    killed = stack.kill(gateway)
    with pytest.raises((OSError, asyncio.IncompleteReadError, AssertionError)):
        await watched.text()
    await stack.wait_clean(timeout=5)
    await until(lambda: stack.child(gateway)["pid"] not in (None, killed), 30)
    await stack.wait_ready()
    assert await answered(stack, chat(tokens=16))


async def test_valkey_restarted_serving_goes_on_and_records_heal(stack_float32: Stack) -> None:
    stack = stack_float32
    await stack.wait_ready()
    want = await answered(stack, chat())
    watched = Watched(stack, chat(), request_id="across-the-outage")
    await watched.reach(10)
    stack.kill("valkey")
    during = Watched(stack, chat(tokens=24))  # a new request while the store is away
    assert await watched.text() == want
    await during.text()
    await stack.wait_ready()
    deadline = time.monotonic() + 30
    while not (job := await job_of(stack, "across-the-outage")) or job["state"] != "completed":
        assert time.monotonic() < deadline, f"the record did not heal: {job}"
        await asyncio.sleep(0.2)
    await stack.wait_clean()


async def test_client_disconnect_stops_both_executors_within_a_second(stack_float32: Stack) -> None:
    stack = stack_float32
    await stack.wait_ready()
    # One in decode, one in a long prefill.
    streaming = asyncio.create_task(ask(stack, chat(tokens=4000), stop_after=8))
    await streaming
    await stack.wait_clean(timeout=1.0 + 1.0)  # the check's own connections take up to a second here
    # Its beginning is of its own: cached on the decode executor, it would run whole there.
    prefill = Watched(stack, chat("Count. " + long_prompt(300), 8))
    async with stack.client(stack.executor("prefill")) as client:
        await until(lambda: bool(client.load and client.load.queued_prefill_tokens), 20)
        prefill.task.cancel()
        gone = time.monotonic()
        while (await client.status()).tasks:
            assert time.monotonic() - gone < 1.0, "the prefill went on for more than a second"
            await asyncio.sleep(0.02)
    await stack.wait_clean()


async def test_streams_under_churn_keep_their_text(stack_float32: Stack) -> None:
    """Eight streams at once while each executor is killed in turn."""
    stack = stack_float32
    await stack.wait_ready()
    payloads = [chat(f"{PROMPT} Chapter {number}.", 64) for number in range(8)]
    want = [await answered(stack, payload) for payload in payloads]
    streams = [Watched(stack, payload) for payload in payloads]
    await streams[0].reach(5)
    # By id: under role control the roles move while the streams run.
    first, *_, last = (te["te_id"] for te in stack.executors())
    stack.kill(last)
    await asyncio.sleep(1.0)
    stack.kill(first)
    got = await asyncio.gather(*(watched.text() for watched in streams))
    assert got == want
    await stack.wait_ready()
    await stack.wait_clean()


async def test_bfloat16_kill_loses_and_repeats_no_token(stack_default: Stack) -> None:
    """In bf16 a replay may choose another of two near ties, but no token is lost or sent twice."""
    stack = stack_default
    await stack.wait_ready()
    watched = Watched(stack, chat(tokens=TOKENS, logprobs=True))
    await watched.reach(20)
    stack.kill(stack.executor("decode")["te_id"])
    await watched.text()
    events: Any = [event for event in watched.run.parsed() if event["choices"]]
    tokens = [
        token for event in events for token in (event["choices"][0]["logprobs"] or {}).get("content") or []
    ]
    assert len(tokens) == TOKENS
    assert "".join(token["token"] for token in tokens) == watched.run.text()
    await stack.wait_ready()
    await stack.wait_clean()
