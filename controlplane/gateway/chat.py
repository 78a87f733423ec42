"""Chat templates: messages to the prompt text, in Jinja's sandbox. Runs in a tokenizer thread, or, where the
template is plain (`is_plain`) and the conversation short, on the event loop.

A template is part of a model, so it is not trusted: it runs in an immutable sandbox, under a bound of time
and of size (checked at each piece it yields), and large repetitions are refused. What it raises about the
conversation (`raise_exception`) is the client's error.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError
from jinja2.exceptions import SecurityError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from controlplane.api.errors import ApiError, invalid
from controlplane.api.openai import Message
from controlplane.gateway.modelcard import CardError, ModelCard
from controlplane.gateway.plain import is_plain

_MAX_REPEAT = 1 << 20  # ours: characters or items that one `*` in a template may make


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        for value, times in ((left, right), (right, left)):
            if hasattr(value, "__len__") and isinstance(times, int) and len(value) * times > _MAX_REPEAT:
                raise SecurityError("the chat template repeats a value too often")
        if operator == "**" and isinstance(right, int) and right > 64:
            raise SecurityError("the chat template computes too large a power")
        return super().call_binop(context, operator, left, right)


class _TemplateRefusal(TemplateError):
    """`raise_exception(...)` in a template."""


def _refuse(message: object) -> None:
    raise _TemplateRefusal(str(message))


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **_: Any) -> str:
    """Plain JSON: Jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


class ChatTemplate:
    """A compiled template. Raises CardError for one that does not compile."""

    def __init__(
        self, card: ModelCard, *, seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        extensions: list[type[Extension]] = [loopcontrols]
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _strftime_now
        try:
            source = card.chat_template or ""
            self._template = environment.from_string(source)
            # One dictionary instead of Jinja's chain of them, which each rendering would copy key by key.
            self._template.globals = dict(self._template.globals)
            self.plain = is_plain(environment.parse(source))
        except TemplateSyntaxError as error:
            raise CardError(f"the chat template does not compile: {error}") from error
        self._tokens = {"bos_token": card.bos_token, "eos_token": card.eos_token}
        self._seconds = seconds
        self._clock = clock

    def render(
        self, messages: Sequence[Message], *, max_chars: int, add_generation_prompt: bool = True
    ) -> str:
        """The prompt. Raises ApiError 400 where the template refuses or fails on these messages."""
        deadline = self._clock() + self._seconds
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate(
                messages=[_as_dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._tokens,
            ):
                pieces.append(piece)
                size += len(piece)
                if size > max_chars:
                    raise invalid("The rendered conversation is too long for this model.", "messages",
                                  "context_length_exceeded")  # fmt: skip
                if self._clock() > deadline:
                    raise ApiError(504, "The chat template took too long.", code="deadline_exceeded")
        except _TemplateRefusal as error:
            raise invalid(f"The model's chat template refused the messages: {error}", "messages") from None
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise invalid(
                f"The model's chat template cannot render these messages: {error}", "messages"
            ) from None
        except RecursionError:
            raise invalid("The model's chat template cannot render these messages.", "messages") from None
        return "".join(pieces)


def _as_dict(message: Message) -> dict[str, Any]:
    """As templates expect a message: text content, absent fields absent, "developer" as "system"."""
    fields: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": message.text,
    }
    if message.name is not None:
        fields["name"] = message.name
    if message.tool_call_id is not None:
        fields["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        fields["tool_calls"] = [call.model_dump() for call in message.tool_calls]
    return fields
