"""OpenAI request bodies, as far as this server supports them.

Rules: every number is bounded and strictly typed (no booleans or strings as numbers, no NaN or infinity);
documented OpenAI fields that cannot change the answer are accepted and ignored; documented fields that
would change it but are not supported are refused by name (`unsupported()` below); any other unknown field
is refused. `null` means "not given" everywhere, as clients send it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

MAX_INT = 2**31 - 1
MAX_STOPS = 4  # OpenAI
MAX_STOP_CHARS = 512  # ours: bounds what a stop string can hold back
MAX_TOP_LOGPROBS = 20  # OpenAI
MAX_LOGIT_BIAS = 1024  # ours
MAX_FIELDS = 64  # of one object; ours, above the number of documented ones
MAX_MESSAGES = 4096  # ours
MAX_N = 128  # OpenAI; the gateway's settings bound it further


def _no_control(value: str) -> str:
    if any(ord(char) < 32 or ord(char) == 127 for char in value):
        raise ValueError("must not contain control characters")
    return value


def _no_nul(value: str) -> str:
    if "\0" in value:
        raise ValueError("must not contain NUL characters")
    return value


def _integral(value: object) -> object:
    """JSON has one kind of number: 5.0 is an integer there. Beyond 2**53 a float may stand for another."""
    if isinstance(value, float) and value.is_integer() and abs(value) <= 2**53:
        return int(value)
    return value


def _integrals(value: object) -> object:
    if isinstance(value, list) and any(type(item) is float for item in value):
        return [_integral(item) for item in value]
    return value


def _few_biases(value: object) -> object:
    if isinstance(value, dict) and len(value) > MAX_LOGIT_BIAS:
        raise ValueError(f"must not have more than {MAX_LOGIT_BIAS} entries")
    return value


# `pattern` is for the OpenAPI document; the validators give the clearer message.
Text = Annotated[
    str, Field(strict=True, json_schema_extra={"pattern": r"^[^\u0000]*$"}), AfterValidator(_no_nul)
]
Name = Annotated[
    str,
    Field(
        strict=True,
        min_length=1,
        max_length=256,
        json_schema_extra={"pattern": r"^[^\u0000-\u001f\u007f]+$"},
    ),
    AfterValidator(_no_control),
]
Stop = Annotated[
    str,
    Field(
        strict=True,
        min_length=1,
        max_length=MAX_STOP_CHARS,
        json_schema_extra={"pattern": r"^[^\u0000]+$"},
    ),
    AfterValidator(_no_nul),
]
TokenId = Annotated[int, Field(strict=True, ge=0, le=MAX_INT)]
# Stops at the first wrong element: a long list must not make a long list of errors.
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True), BeforeValidator(_integrals)]
Flag = Annotated[bool, Field(strict=True)]
Count = Annotated[int, Field(strict=True, ge=1, le=MAX_INT), BeforeValidator(_integral)]
CountOrZero = Annotated[int, Field(strict=True, ge=0, le=MAX_INT), BeforeValidator(_integral)]
Penalty = Annotated[float, Field(strict=True, ge=-2, le=2, allow_inf_nan=False)]
# Any JSON value: documented, meaningless here.
Ignored = Annotated[Any, Field(description="Accepted and ignored.")]


class _Wire(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, data: object) -> object:
        """One problem instead of one per field: an object of a million names must not cost a million."""
        if isinstance(data, dict) and len(data) > MAX_FIELDS:
            raise ValueError(f"must not have more than {MAX_FIELDS} fields")
        return data


class StreamOptions(_Wire):
    include_usage: Flag | None = None
    include_obfuscation: Ignored = None


class SamplingFields(_Wire):
    """Fields that chat and text completions share. Extensions to OpenAI's API are marked so."""

    model: Name
    n: Annotated[int, Field(strict=True, ge=1, le=MAX_N), BeforeValidator(_integral)] | None = None
    temperature: Annotated[float, Field(strict=True, ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(strict=True, ge=-1, le=MAX_INT), BeforeValidator(_integral)] | None = Field(
        None, description="Extension. 0 or -1 turns it off."
    )
    min_p: Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)] | None = Field(
        None, description="Extension."
    )
    repetition_penalty: Annotated[float, Field(strict=True, ge=0.01, le=10, allow_inf_nan=False)] | None = (
        Field(None, description="Extension. 1 turns it off.")
    )
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Annotated[int, Field(strict=True, ge=-(2**63), le=2**63 - 1), BeforeValidator(_integral)] | None = (
        None
    )
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64), BeforeValidator(_integrals)] | None = (
        Field(None, description="Extension.")
    )
    logit_bias: (
        Annotated[
            dict[
                Annotated[str, Field(pattern=r"^[0-9]{1,9}$")],
                Annotated[float, Field(strict=True, ge=-100, le=100, allow_inf_nan=False)],
            ],
            Field(max_length=MAX_LOGIT_BIAS),
            BeforeValidator(_few_biases),
        ]
        | None
    ) = None
    max_tokens: CountOrZero | None = None
    min_tokens: CountOrZero | None = Field(None, description="Extension.")
    ignore_eos: Flag | None = Field(None, description="Extension: go on after end tokens.")
    stream: Flag | None = None
    stream_options: StreamOptions | None = None
    user: Ignored = None
    metadata: Ignored = None
    store: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None

    @property
    def stops(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(dict.fromkeys(self.stop))


class TextPart(_Wire):
    type: Literal["text"]
    text: Text


class FunctionCall(_Wire):
    name: Name
    arguments: Text


class ToolCall(_Wire):
    id: Name
    type: Literal["function"]
    function: FunctionCall


class Message(_Wire):
    """One message of a conversation. Only an assistant's `content` may be absent."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=1024, fail_fast=True)] | None = (
        None
    )
    name: Name | None = None
    tool_call_id: Name | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=128)] | None = None
    refusal: Text | None = None
    audio: None = None
    function_call: None = None

    @model_validator(mode="after")
    def _check_content(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"content is required for the role {self.role}")
        return self

    @property
    def text(self) -> str:
        if self.content is None:
            return ""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class ResponseFormat(_Wire):
    type: Literal["text"]


class ChatCompletionRequest(SamplingFields):
    """`POST /v1/chat/completions`."""

    messages: Messages
    max_completion_tokens: Count | None = None
    logprobs: Flag | None = None
    top_logprobs: (
        Annotated[int, Field(strict=True, ge=0, le=MAX_TOP_LOGPROBS), BeforeValidator(_integral)] | None
    ) = None
    # Documented and meaningful, accepted only with values that ask for what happens anyway.
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    functions: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    function_call: Literal["none", "auto"] | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    audio: None = None
    web_search_options: None = None
    prediction: None = None
    reasoning_effort: Ignored = None
    verbosity: Ignored = None
    parallel_tool_calls: Ignored = None


class CompletionRequest(SamplingFields):
    """`POST /v1/completions`. `prompt`: a text, texts, the ids of one prompt, or lists of ids."""

    prompt: (
        Text
        | TokenIds
        | Annotated[list[Text], Field(min_length=1, fail_fast=True)]
        | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)]
    )
    logprobs: (
        Annotated[int, Field(strict=True, ge=0, le=MAX_TOP_LOGPROBS), BeforeValidator(_integral)] | None
    ) = None
    echo: Flag | None = None
    # Documented and meaningful: only values that ask for what happens anyway.
    best_of: Annotated[int, Field(strict=True, ge=1, le=1), BeforeValidator(_integral)] | None = None
    suffix: Literal[""] | None = None


class TokenizeRequest(_Wire):
    """`POST /v1/tokenize`, as vLLM has it: either `prompt` or `messages`."""

    model: Name
    prompt: Text | None = None
    messages: Messages | None = None
    add_special_tokens: Flag | None = Field(
        None, description="Default: true for a prompt, false for messages (the template brings them)."
    )
    add_generation_prompt: Flag | None = Field(None, description="Default: true. Messages only.")
    return_token_strs: Flag | None = None


class DetokenizeRequest(_Wire):
    """`POST /v1/detokenize`."""

    model: Name
    tokens: Annotated[list[TokenId], Field(fail_fast=True), BeforeValidator(_integrals)]


# What a refused value of these fields means; others are explained by their bounds.
UNSUPPORTED = {
    "tools": "Tool calling is not supported by this server.",
    "functions": "Function calling is not supported by this server.",
    "tool_choice": "Tool calling is not supported by this server.",
    "function_call": "Function calling is not supported by this server.",
    "response_format": "Only response_format {'type': 'text'} is supported by this server.",
    "modalities": "Only text output is supported by this server.",
    "audio": "Audio is not supported by this server.",
    "web_search_options": "Web search is not supported by this server.",
    "prediction": "Predicted outputs are not supported by this server.",
    "best_of": "best_of above 1 is not supported by this server: use n.",
    "suffix": "Suffix (insertion) is not supported by this server.",
}
