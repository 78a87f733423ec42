"""The `openai` client, unchanged, against a gateway. Needs the small model's tokenizer and Valkey."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from controlplane.jobs.serving import ServingError
from tests.integration.gateway.conftest import MODEL, REVISION, Stack

HELLO: list[Any] = [{"role": "user", "content": "Hello wörld 🌍 123"}]
RENDERED = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\nHello wörld 🌍 123<|im_end|>\n<|im_start|>assistant\n"
)


def echoed(text: str) -> str:
    """What the echo executor's answer renders to: special tokens are not shown."""
    for special in ("<|im_start|>", "<|im_end|>"):
        text = text.replace(special, "")
    return text


async def test_chat_answers_with_openai_fields_in_openai_order(stack: Stack) -> None:
    client = stack.client()
    answer = await client.chat.completions.create(model=MODEL, messages=HELLO, temperature=0, seed=7)
    assert answer.choices[0].message.content == echoed(RENDERED)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.object == "chat.completion" and answer.model == MODEL
    assert answer.system_fingerprint and answer.system_fingerprint.startswith("fp_")
    request = stack.executor.requests[0]
    assert request.model_revision == REVISION and request.kind == "chat" and request.tenant == "default"
    assert request.sampling.temperature == 0 and request.sampling.seed == 7
    assert request.max_output_tokens == 2048 - len(request.prompt), "the rest of the context by default"
    assert answer.usage is not None and answer.usage.prompt_tokens == len(request.prompt)
    assert answer.usage.completion_tokens == len(request.prompt) + 1, "the end token is counted"
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 16
    raw = await stack.http().post("/v1/chat/completions", json={"model": MODEL, "messages": HELLO})
    expected = ["id", "object", "created", "model", "choices", "usage", "system_fingerprint"]
    assert list(raw.json()) == expected


async def test_sync_client_chats_and_streams(stack: Stack) -> None:
    def use() -> tuple[str | None, str]:
        client = stack.sync_client()
        whole = client.chat.completions.create(model="small", messages=HELLO).choices[0].message.content
        chunks = client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
        parts = [chunk.choices[0].delta.content or "" for chunk in chunks]
        client.close()
        return whole, "".join(parts)

    whole, streamed = await asyncio.to_thread(use)
    assert whole == streamed == echoed(RENDERED)


async def test_stream_has_role_content_finish_usage(stack: Stack) -> None:
    client = stack.client()
    stream = await client.chat.completions.create(
        model=MODEL, messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].choices[0].delta.content == ""
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == echoed(RENDERED)
    assert [c.choices[0].finish_reason for c in chunks[:-1]][-1] == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 2 * len(stack.executor.requests[0].prompt) + 1
    assert all(chunk.usage is None for chunk in chunks[:-1])


async def test_n_choices_share_one_job(stack: Stack) -> None:
    client = stack.client()
    stack.executor.script = lambda request, index: [*stack.encode(f"answer {index}"), 2]
    answer = await client.chat.completions.create(model=MODEL, messages=HELLO, n=3)
    assert [choice.message.content for choice in answer.choices] == ["answer 0", "answer 1", "answer 2"]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len(stack.executor.requests) == 1 and stack.executor.requests[0].n == 3
    stream = await client.chat.completions.create(model=MODEL, messages=HELLO, n=3, stream=True)
    texts = ["", "", ""]
    async for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == ["answer 0", "answer 1", "answer 2"]


@pytest.mark.parametrize("stream", [False, True])
async def test_stop_string_cuts_across_tokens_and_ends_the_task(stack: Stack, stream: bool) -> None:
    client = stack.client()
    stack.executor.script = lambda request, index: [*stack.encode("one two three four five six"), 2]
    created: Any = await client.completions.create(
        model=MODEL, prompt="x", stop=["ee fo", "zzz"], max_tokens=50, stream=stream, logprobs=2
    )
    if stream:
        chunks = [chunk async for chunk in created]
        text = "".join(chunk.choices[0].text for chunk in chunks)
        finish = chunks[-1].choices[0].finish_reason
        tokens = [token for chunk in chunks for token in chunk.choices[0].logprobs.tokens]
    else:
        text, finish = created.choices[0].text, created.choices[0].finish_reason
        tokens = created.choices[0].logprobs.tokens
    assert text == "one two thr" and finish == "stop"
    assert tokens == ["one", " two", " three"], "no token of beyond the cut"
    assert stack.executor.jobs[0].finished == {0}, "the executor was told that the choice is complete"


async def test_chat_logprobs(stack: Stack) -> None:
    client = stack.client()
    stack.executor.script = lambda request, index: [*stack.encode("hi 🌍"), 2]
    answer = await client.chat.completions.create(model=MODEL, messages=HELLO, logprobs=True, top_logprobs=3)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert b"".join(bytes(entry.bytes or []) for entry in logprobs.content).decode() == "hi 🌍"
    assert all(len(entry.top_logprobs) == 3 for entry in logprobs.content)
    stream = await client.chat.completions.create(
        model=MODEL, messages=HELLO, logprobs=True, top_logprobs=3, stream=True
    )
    streamed = []
    async for chunk in stream:
        if chunk.choices[0].logprobs is not None:
            streamed += chunk.choices[0].logprobs.content or []
    assert streamed == logprobs.content


async def test_completions_take_texts_and_ids(stack: Stack) -> None:
    client = stack.client()
    one = await client.completions.create(model=MODEL, prompt="alpha beta")
    assert one.choices[0].text == "alpha beta" and one.object == "text_completion"
    many = await client.completions.create(model=MODEL, prompt=["alpha", "beta gamma"], n=2)
    assert [choice.text for choice in many.choices] == ["alpha", "alpha", "beta gamma", "beta gamma"]
    ids = stack.encode("token ids")
    by_ids = await client.completions.create(model=MODEL, prompt=ids)
    assert by_ids.choices[0].text == "token ids"
    lists = await client.completions.create(model=MODEL, prompt=[ids, stack.encode("two")])
    assert [choice.text for choice in lists.choices] == ["token ids", "two"]
    stream = await client.completions.create(model=MODEL, prompt=["alpha", "beta gamma"], stream=True)
    texts = ["", ""]
    async for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == ["alpha", "beta gamma"]
    limited = await client.completions.create(model=MODEL, prompt="one two three four", max_tokens=2)
    assert limited.choices[0].text == "one two" and limited.choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_gives_the_prompt_and_its_logprobs(stack: Stack, stream: bool) -> None:
    client = stack.client()
    stack.executor.script = lambda request, index: [*stack.encode(" there"), 2]
    created: Any = await client.completions.create(
        model=MODEL, prompt="hi 🌍 you", echo=True, logprobs=1, max_tokens=5, stream=stream
    )
    choices = [chunk.choices[0] async for chunk in created] if stream else [created.choices[0]]
    assert "".join(choice.text for choice in choices) == "hi 🌍 you there"
    values = [value for choice in choices for value in choice.logprobs.token_logprobs]
    assert values[0] is None and all(value == -0.5 for value in values[1:])
    offsets = [offset for choice in choices for offset in choice.logprobs.text_offset]
    assert offsets[0] == 0 and offsets[-1] == len("hi 🌍 you") and offsets == sorted(offsets)
    assert stack.executor.requests[0].sampling.prompt_logprobs == 1


async def test_echo_alone(stack: Stack) -> None:
    client = stack.client()
    plain = await client.completions.create(model=MODEL, prompt="just this", echo=True, max_tokens=0)
    assert plain.choices[0].text == "just this" and stack.executor.jobs == []
    assert plain.usage is not None and plain.usage.completion_tokens == 0
    scored = await client.completions.create(
        model=MODEL, prompt="just this", echo=True, max_tokens=0, logprobs=0
    )
    assert scored.choices[0].text == "just this" and scored.usage is not None
    assert scored.choices[0].logprobs is not None
    assert scored.choices[0].logprobs.tokens == ["just", " this"]
    assert scored.usage.completion_tokens == 0


async def test_models(stack: Stack) -> None:
    client = stack.client()
    page = await client.models.list()
    assert [model.id for model in page.data] == [MODEL]
    for name in (MODEL, "small", REVISION):
        model = await client.models.retrieve(name)
        assert model.id == MODEL and model.object == "model"
    with pytest.raises(openai.NotFoundError) as caught:
        await client.models.retrieve("other")
    assert caught.value.code == "model_not_found"


async def test_errors_are_the_clients_typed_exceptions(stack: Stack) -> None:
    client = stack.client()
    with pytest.raises(openai.NotFoundError) as missing:
        await client.chat.completions.create(model="gpt-unknown", messages=HELLO)
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    with pytest.raises(openai.BadRequestError) as bad:
        await client.chat.completions.create(model=MODEL, messages=HELLO, temperature=3)
    assert bad.value.param == "temperature" and bad.value.request_id
    with pytest.raises(openai.BadRequestError) as long:
        await client.completions.create(model=MODEL, prompt="one " * 3000, max_tokens=10)
    assert long.value.code == "context_length_exceeded" and "2048" in str(long.value)
    with pytest.raises(openai.AuthenticationError) as auth:
        await stack.client("sk-df-wrong").models.list()
    assert auth.value.code == "invalid_api_key"
    stack.executor.refuse = ServingError(429, "queue_full", "the queue is full", retry_after=2)
    with pytest.raises(openai.RateLimitError) as full:
        await client.chat.completions.create(model=MODEL, messages=HELLO)
    assert full.value.code == "queue_full" and full.value.response.headers["retry-after"] == "2"
    stack.executor.refuse = None
    for status, code in ((503, "no_executor"), (504, "deadline_exceeded"), (500, "internal")):
        stack.executor.fail = ServingError(status, code, "told so")
        with pytest.raises(openai.InternalServerError) as server:
            await client.chat.completions.create(model=MODEL, messages=HELLO)
        assert server.value.status_code == status and server.value.code == code
        with pytest.raises(openai.InternalServerError) as early:
            await client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
        assert early.value.status_code == status, "an error within the peek keeps its status"
    assert stack.gateway.limiter.in_flight == 0


async def test_error_after_the_headers_travels_in_band(stack: Stack) -> None:
    client = stack.client()
    stack.executor.fail_after = 3
    stream = await client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
    with pytest.raises(openai.APIError, match="gone"):
        async for _ in stream:
            pass
    assert stack.gateway.limiter.in_flight == 0
