"""The `openai` client, unchanged, against the real stack and the real model."""

from __future__ import annotations

import math

import openai
import pytest

from tests.support.stack import MODEL, Stack

pytestmark = [pytest.mark.model, pytest.mark.timeout(180)]


@pytest.fixture
def client(stack_default: Stack) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{stack_default.url}/v1", api_key="none", max_retries=0)


def ask(client: openai.OpenAI, content: str = "What is the colour of the sky?", **kwargs: object) -> object:
    return client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": content}],
        **kwargs,  # type: ignore[call-overload]
    )


def test_chat_answers_sensibly(client: openai.OpenAI) -> None:
    known = client.completions.create(
        model=MODEL, prompt="The capital of France is", temperature=0, max_tokens=4
    )
    assert "Paris" in known.choices[0].text
    answer: openai.types.chat.ChatCompletion = ask(client, temperature=0, max_tokens=60)  # type: ignore[assignment]
    choice = answer.choices[0]
    assert "sky" in (choice.message.content or "")
    assert choice.finish_reason in ("stop", "length")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_streaming_equals_not_streaming(client: openai.OpenAI) -> None:
    whole: openai.types.chat.ChatCompletion = ask(client, seed=7, max_tokens=40)  # type: ignore[assignment]
    parts = list(ask(client, seed=7, max_tokens=40, stream=True, stream_options={"include_usage": True}))  # type: ignore[call-overload]
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == whole.choices[0].message.content
    assert (
        parts[-1].usage == whole.usage or parts[-1].usage.completion_tokens == whole.usage.completion_tokens
    )  # type: ignore[union-attr]


def test_seeds_repeat_and_differ(client: openai.OpenAI) -> None:
    texts = [
        ask(client, "Invent a name.", seed=seed, temperature=1.5, max_tokens=24).choices[0].message.content  # type: ignore[attr-defined]
        for seed in (1, 1, 2, 3)
    ]
    assert texts[0] == texts[1]
    assert len(set(texts)) > 1


def test_choices_logprobs_and_stop(client: openai.OpenAI) -> None:
    answer: openai.types.chat.ChatCompletion = ask(  # type: ignore[assignment]
        client, "Count from one to ten.", n=3, logprobs=True, top_logprobs=4, max_tokens=30, seed=5
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) > 1
    for choice in answer.choices:
        assert choice.logprobs is not None
        for token in choice.logprobs.content or []:
            assert token.logprob <= 0
            assert len(token.top_logprobs) == 4
            assert sum(math.exp(top.logprob) for top in token.top_logprobs) <= 1.0001
    stopped = client.completions.create(
        model=MODEL, prompt="1, 2, 3, 4, 5,", temperature=0, max_tokens=40, stop=["9", "zebra"]
    )
    assert stopped.choices[0].finish_reason == "stop"
    assert "9" not in stopped.choices[0].text
    assert stopped.choices[0].text.strip().startswith("6")


def test_completions_take_text_lists_and_ids(client: openai.OpenAI) -> None:
    texts = client.completions.create(
        model=MODEL, prompt=["The sun", "The moon"], max_tokens=5, temperature=0
    )
    assert [choice.index for choice in texts.choices] == [0, 1]
    ids = client.completions.create(model=MODEL, prompt=[504, 2232], max_tokens=5, temperature=0)
    assert ids.usage is not None
    assert ids.usage.prompt_tokens == 2
    echoed = client.completions.create(
        model=MODEL, prompt="The sun", max_tokens=1, echo=True, logprobs=1, temperature=0
    )
    assert echoed.choices[0].text.startswith("The sun")
    logprobs = echoed.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.token_logprobs[0] is None
    assert len(logprobs.token_logprobs) == len(logprobs.tokens or [])


async def test_async_client_streams(stack_default: Stack) -> None:
    async with openai.AsyncOpenAI(
        base_url=f"{stack_default.url}/v1", api_key="none", max_retries=0
    ) as client:
        stream = await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Say hello in French."}],
            max_tokens=20,
            stream=True,
        )
        text = "".join([part.choices[0].delta.content or "" async for part in stream if part.choices])
        assert text
        assert MODEL in [model.id async for model in client.models.list()]


def test_errors_are_typed(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-17", messages=[{"role": "user", "content": "hi"}])
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as hot:
        ask(client, temperature=9)
    assert hot.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        ask(client, "word " * 9000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError):
        ask(client.with_options(api_key="sk-df-not-a-key"))
