"""From a validated body to a `Plan`: prompts as ids, resolved sampling, bounds checked against the model.

Everything that can be the client's fault is found here, before a job exists.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, replace

from controlplane.api.errors import context_length_exceeded, invalid
from controlplane.api.openai import ChatCompletionRequest, CompletionRequest, Message, SamplingFields
from controlplane.gateway.catalogue import ServedModel, require_template
from controlplane.gateway.settings import GatewaySettings
from controlplane.gateway.tokenizing import INLINE_CHARS, TokenizerPool, encode, encode_now
from controlplane.jobs.serving import Sampling

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default of /v1/completions
_GREEDY_BELOW = 1e-4  # ours: dividing logits by less overflows fp32; the draw is the argmax anyway
_SMALLEST_TOP_P = 1e-6  # top_p = 0 means: the most likely token only
_MASK64 = 2**64 - 1
INLINE_MESSAGES = 32
"""Conversations up to this length may be rendered on the event loop (ours: below 100 us)."""


@dataclass(frozen=True, slots=True)
class Prompt:
    ids: tuple[int, ...]
    max_output_tokens: int
    text: str | None = None  # as given; None for ids


@dataclass(frozen=True, slots=True)
class Plan:
    """One HTTP call, ready to become jobs: one a prompt. Choice index = prompt * n + choice."""

    id: str
    kind: str  # "chat" | "completion"
    created: int
    model: ServedModel
    prompts: tuple[Prompt, ...]
    sampling: Sampling
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    stops: tuple[str, ...] = ()
    logprobs: int | None = None  # alternatives a token, None = no logprobs
    echo: bool = False
    discard_output: bool = False  # echo with max_tokens 0

    @property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end an answer and are not shown."""
        ends = self.sampling.stop_token_ids
        return frozenset(ends if self.sampling.ignore_eos else (*self.model.card.eos_ids, *ends))

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt.ids) for prompt in self.prompts)


async def plan_chat(
    body: ChatCompletionRequest, model: ServedModel, pool: TokenizerPool, settings: GatewaySettings
) -> Plan:
    """Raises ApiError."""
    if body.max_tokens == 0:
        raise invalid("max_tokens must be at least 1.", "max_tokens")
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs needs logprobs to be true.", "top_logprobs")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    plan = _plan(body, "chat", model, settings, logprobs=logprobs)
    ids = await render_chat(body.messages, model, pool)
    wanted = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    return _with_prompts(plan, [(ids, None)], wanted, body.min_tokens)


async def plan_completion(
    body: CompletionRequest, model: ServedModel, pool: TokenizerPool, settings: GatewaySettings
) -> Plan:
    """Raises ApiError."""
    echo = bool(body.echo)
    wanted = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    if wanted == 0 and not echo:
        raise invalid("max_tokens must be at least 1, or 0 together with echo.", "max_tokens")
    plan = _plan(body, "completion", model, settings, logprobs=body.logprobs)
    texts, id_lists = split_prompts(body.prompt)
    count = len(texts) or len(id_lists)
    if count > settings.max_prompts:
        raise invalid(f"At most {settings.max_prompts} prompts are accepted, got {count}.", "prompt")
    if count * plan.n > settings.max_choices:
        raise invalid(f"Prompts times n must not be more than {settings.max_choices}.", "n")
    prompts: list[tuple[list[int], str | None]] = []
    if texts:
        prompts = list(zip(await _encode_texts(texts, model, pool), texts, strict=True))
    else:
        for ids in id_lists:
            check_ids(ids, model, "prompt")
            prompts.append((ids, None))
    for index, (ids, text) in enumerate(prompts):
        if not ids:
            if text == "" and model.card.bos_id is not None:
                prompts[index] = ([model.card.bos_id], text)
            else:
                raise invalid("The prompt is empty.", "prompt")
    if echo and plan.logprobs is not None:
        plan = replace(plan, sampling=replace(plan.sampling, prompt_logprobs=plan.logprobs))
    plan = replace(plan, echo=echo, discard_output=wanted == 0)
    return _with_prompts(plan, prompts, wanted, body.min_tokens)


async def render_chat(
    messages: list[Message],
    model: ServedModel,
    pool: TokenizerPool,
    *,
    add_generation_prompt: bool = True,
    special: bool = False,
    limited: bool = True,
) -> list[int]:
    """The ids of a conversation; the template brings the special tokens."""
    template = require_template(model)
    longest, limit = model.table.longest, model.context_length
    rendered: str | None = None

    def render() -> str:
        # A text of more characters than the longest tokens could hold cannot fit; stop rendering there.
        return template.render(
            messages, max_chars=(limit + 1) * longest, add_generation_prompt=add_generation_prompt
        )

    def work() -> list[int]:
        text = render() if rendered is None else rendered
        return encode(model.words, text, special=special, longest=longest, limit=limit if limited else None)

    ids: list[int] | None = None
    if template.plain and len(messages) <= INLINE_MESSAGES and _chars(messages) <= INLINE_CHARS:
        rendered = render()
        # Checked against the context afterwards; a text this short needs no estimate before.
        ids = encode_now(model.words, rendered, special=special)
    if ids is None:
        ids = await pool.run(work)
    if not ids:
        raise invalid("The messages render to an empty prompt.", "messages")
    return ids


def _chars(messages: list[Message]) -> int:
    """Of the contents: what a plain template's work grows with."""
    return sum(len(message.text) for message in messages)


async def _encode_texts(texts: list[str], model: ServedModel, pool: TokenizerPool) -> list[list[int]]:
    words, limit, longest = model.words, model.context_length, model.table.longest
    if len(texts) == 1 and (ids := encode_now(words, texts[0], special=True)) is not None:
        return [ids]
    return await pool.run(
        lambda: [encode(words, text, special=True, longest=longest, limit=limit) for text in texts]
    )


def split_prompts(
    prompt: str | list[int] | list[str] | list[list[int]],
) -> tuple[list[str], list[list[int]]]:
    """(texts, id lists); one of them is empty."""
    if isinstance(prompt, str):
        return [prompt], []
    texts = [item for item in prompt if isinstance(item, str)]
    if texts:
        return texts, []
    lists = [item for item in prompt if isinstance(item, list)]
    if lists:
        return [], lists
    return [], [[item for item in prompt if isinstance(item, int)]]


def check_ids(ids: list[int], model: ServedModel, param: str) -> None:
    """Raises ApiError 400 for an id that the model has no embedding for."""
    size = model.card.vocab_size
    if ids and max(ids) >= size:
        raise invalid(f"Token id {max(ids)} is not in the vocabulary (0 to {size - 1}).", param)


def _plan(
    body: SamplingFields, kind: str, model: ServedModel, settings: GatewaySettings, *, logprobs: int | None
) -> Plan:
    n = body.n or 1
    if n > settings.max_n:
        raise invalid(f"n must not be more than {settings.max_n}.", "n")
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options is only allowed when stream is true.", "stream_options")
    biases = {int(token): bias for token, bias in (body.logit_bias or {}).items()}
    check_ids(list(biases), model, "logit_bias")
    check_ids(list(body.stop_token_ids or ()), model, "stop_token_ids")
    temperature = 1.0 if body.temperature is None else body.temperature
    sampling = Sampling(
        temperature=0.0 if temperature < _GREEDY_BELOW else temperature,
        top_p=1.0 if body.top_p is None else max(body.top_p, _SMALLEST_TOP_P),
        top_k=min(max(body.top_k or 0, 0), model.card.vocab_size),
        min_p=body.min_p or 0.0,
        seed=secrets.randbits(64) if body.seed is None else body.seed & _MASK64,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        logit_bias={token: bias for token, bias in biases.items() if bias},
        logprobs=logprobs,
        stop_token_ids=tuple(dict.fromkeys(body.stop_token_ids or ())),
        ignore_eos=bool(body.ignore_eos),
        min_tokens=body.min_tokens or 0,
    )
    prefix = "chatcmpl-" if kind == "chat" else "cmpl-"
    return Plan(
        id=prefix + secrets.token_hex(12),
        kind=kind,
        created=int(time.time()),
        model=model,
        prompts=(),
        sampling=sampling,
        n=n,
        stream=bool(body.stream),
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
        stops=body.stops,
        logprobs=logprobs,
    )


def _with_prompts(
    plan: Plan, prompts: list[tuple[list[int], str | None]], wanted: int | None, min_tokens: int | None
) -> Plan:
    """Checks lengths against the context. `wanted` None: the rest of the context; 0: echo only."""
    limit = plan.model.context_length
    made: list[Prompt] = []
    for ids, text in prompts:
        room = limit - len(ids)
        if room < 1 and wanted != 0:
            raise context_length_exceeded(limit, len(ids), wanted or 0)
        if wanted is not None and (wanted > room or room < 0):
            raise context_length_exceeded(limit, len(ids), wanted)
        # Echo alone with logprobs still runs a task, which samples one token that is not shown.
        most = room if wanted is None else max(wanted, 1)
        if min_tokens is not None and min_tokens > most:
            raise invalid("min_tokens must not be more than the tokens that may be made.", "min_tokens")
        made.append(Prompt(tuple(ids), most, text))
    return replace(plan, prompts=tuple(made))
