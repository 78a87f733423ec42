"""OpenAI answer bodies, in OpenAI's field order.

They document the API (the OpenAPI schemas are made of them) and type the answers that are built once;
stream chunks are encoded from prepared bytes in `controlplane/gateway/frames.py` and have these shapes.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

FinishReason = Literal["stop", "length"]


class _Wire(BaseModel):
    model_config = ConfigDict(extra="forbid")


class PromptTokensDetails(_Wire):
    cached_tokens: int


class Usage(_Wire):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(_Wire):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(_Wire):
    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(_Wire):
    content: list[TokenLogprob] | None
    refusal: list[TokenLogprob] | None


class ChatMessage(_Wire):
    role: Literal["assistant"]
    content: str
    refusal: str | None


class ChatChoice(_Wire):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(_Wire):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str


class CompletionLogprobs(_Wire):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(_Wire):
    text: str
    index: int
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason


class Completion(_Wire):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    system_fingerprint: str


class Model(_Wire):
    """One served model. The fields after `owned_by` are extensions (the first two as in vLLM)."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    max_model_len: int
    revision: str
    aliases: list[str]
    ready: bool


class ModelList(_Wire):
    object: Literal["list"]
    data: list[Model]


class TokenizeResponse(_Wire):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeResponse(_Wire):
    prompt: str
