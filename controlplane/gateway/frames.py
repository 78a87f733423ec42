"""Answers as bytes: stream chunks from prepared parts, whole answers, logprobs, usage; OpenAI's field order.

A chunk's envelope does not change over a stream, so it is encoded once; a token costs one string encoding
and a concatenation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import orjson

from controlplane.api.errors import ApiError
from controlplane.gateway.answer import Entry, Piece
from controlplane.gateway.detokenize import TokenTable
from controlplane.gateway.plan import Plan
from controlplane.jobs.serving import TokenLogprobs

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
_LOWEST = -9999.0  # OpenAI's stand-in for a logprob of minus infinity, which JSON cannot hold
_NULL = b"null"


def usage_object(prompt: int, cached: int, completion: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def error_frame(error: ApiError) -> bytes:
    """An error after the headers: in-band, as OpenAI's clients expect it."""
    return b"data: " + orjson.dumps(error.body()) + b"\n\n"


class Frames:
    """Chunks of one stream."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        chat = plan.kind == "chat"
        self._head = {
            "id": plan.id,
            "object": "chat.completion.chunk" if chat else "text_completion",
            "created": plan.created,
            "model": plan.model.id,
            "system_fingerprint": plan.model.fingerprint,
        }
        self._open = b"data: " + orjson.dumps(self._head)[:-1] + b',"choices":[{'
        self._close = b'}],"usage":null}\n\n' if plan.include_usage else b"}]}\n\n"
        self._begun: set[int] = set()

    def piece(self, index: int, piece: Piece, prompt: PromptEcho | None) -> bytes:
        """The chunks that show `piece` of choice `index`; b"" for nothing to show."""
        if self._plan.kind == "chat":
            return self._chat(index, piece)
        return self._completion(index, piece, prompt)

    def _chat(self, index: int, piece: Piece) -> bytes:
        out = b""
        if index not in self._begun:
            self._begun.add(index)
            delta = b'{"role":"assistant","content":"","refusal":null}'
            out = self._chat_chunk(index, delta, _NULL, _NULL)
        if piece.text or piece.entries:
            logprobs = _NULL
            if self._plan.logprobs is not None:
                logprobs = orjson.dumps(
                    chat_logprobs(piece.entries, self._plan.logprobs, self._plan.model.table)
                )
            out += self._chat_chunk(index, b'{"content":' + orjson.dumps(piece.text) + b"}", logprobs, _NULL)
        if piece.finish is not None:
            out += self._chat_chunk(index, b"{}", _NULL, b'"' + piece.finish.encode() + b'"')
        return out

    def _chat_chunk(self, index: int, delta: bytes, logprobs: bytes, finish: bytes) -> bytes:
        return b'%b"index":%d,"delta":%b,"logprobs":%b,"finish_reason":%b%b' % (
            self._open, index, delta, logprobs, finish, self._close,
        )  # fmt: skip

    def _completion(self, index: int, piece: Piece, prompt: PromptEcho | None) -> bytes:
        text = (prompt.text if prompt else "") + piece.text
        if not text and not piece.entries and piece.finish is None:
            return b""
        logprobs = _NULL
        if self._plan.logprobs is not None:
            logprobs = orjson.dumps(completion_logprobs(self._plan, piece.entries, prompt))
        finish = _NULL if piece.finish is None else b'"' + piece.finish.encode() + b'"'
        return b'%b"text":%b,"index":%d,"logprobs":%b,"finish_reason":%b%b' % (
            self._open, orjson.dumps(text), index, logprobs, finish, self._close,
        )  # fmt: skip

    def usage(self, usage: dict[str, Any]) -> bytes:
        """The last chunk of a stream with include_usage: no choices."""
        return b"data: " + orjson.dumps({**self._head, "choices": [], "usage": usage}) + b"\n\n"


class PromptEcho:
    """A prompt as `echo` shows it, with its logprobs where asked for."""

    __slots__ = ("entries", "offsets", "text")

    def __init__(
        self, text: str, offsets: list[int], entries: Sequence[tuple[int, TokenLogprobs | None]]
    ) -> None:
        self.text = text
        self.offsets = offsets
        self.entries = entries


def token_text(raw: bytes, *, prefixed: bool) -> str:
    """How OpenAI writes a token: text, or its bytes in escapes where it is no text by itself."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        escaped = "".join(f"\\x{byte:02x}" for byte in raw)
        return "bytes:" + escaped if prefixed else escaped


def _finite(value: float) -> float:
    return _LOWEST if math.isnan(value) else max(value, _LOWEST)


def chat_logprobs(entries: Sequence[Entry], top: int, table: TokenTable) -> dict[str, Any]:
    content = []
    for entry in entries:
        shown = _chat_token(entry.logprobs.token, entry.logprobs.logprob, table)
        shown["top_logprobs"] = [
            _chat_token(token, logprob, table) for token, logprob in entry.logprobs.top[:top]
        ]
        content.append(shown)
    return {"content": content, "refusal": None}


def _chat_token(token: int, logprob: float, table: TokenTable) -> dict[str, Any]:
    raw = table.raw(token)
    return {"token": token_text(raw, prefixed=False), "logprob": _finite(logprob), "bytes": list(raw)}


def completion_logprobs(plan: Plan, entries: Sequence[Entry], prompt: PromptEcho | None) -> dict[str, Any]:
    """`text_offset` counts characters from the start of the choice's text, an echoed prompt included."""
    table, top = plan.model.table, plan.logprobs or 0
    tokens: list[str] = []
    values: list[float | None] = []
    alternatives: list[dict[str, float] | None] = []
    offsets: list[int] = []

    def add(token: int, logprobs: TokenLogprobs | None, offset: int) -> None:
        tokens.append(token_text(table.raw(token), prefixed=True))
        offsets.append(offset)
        if logprobs is None:
            values.append(None)
            alternatives.append(None)
            return
        values.append(_finite(logprobs.logprob))
        shown = {
            token_text(table.raw(other), prefixed=True): _finite(logprob)
            for other, logprob in logprobs.top[:top]
        }
        shown.setdefault(tokens[-1], _finite(logprobs.logprob))
        alternatives.append(shown)

    if prompt is not None:
        for (token, logprobs), offset in zip(prompt.entries, prompt.offsets, strict=False):
            add(token, logprobs, offset)
    for entry in entries:
        add(entry.logprobs.token, entry.logprobs, entry.offset)
    return {
        "tokens": tokens,
        "token_logprobs": values,
        "top_logprobs": alternatives if top else None,
        "text_offset": offsets,
    }


class Whole(NamedTuple):
    """One finished choice of an answer that is not streamed."""

    text: str
    entries: Sequence[Entry]
    finish: str
    echo: PromptEcho | None = None


def whole(plan: Plan, parts: Sequence[Whole], usage: dict[str, Any]) -> bytes:
    """The body of an answer that is not streamed."""
    if plan.kind == "chat":
        kind, choices = "chat.completion", [_chat_choice(plan, i, part) for i, part in enumerate(parts)]
    else:
        kind, choices = "text_completion", [_text_choice(plan, i, part) for i, part in enumerate(parts)]
    return orjson.dumps(
        {
            "id": plan.id,
            "object": kind,
            "created": plan.created,
            "model": plan.model.id,
            "choices": choices,
            "usage": usage,
            "system_fingerprint": plan.model.fingerprint,
        }
    )


def _chat_choice(plan: Plan, index: int, part: Whole) -> dict[str, Any]:
    logprobs = None
    if plan.logprobs is not None:
        logprobs = chat_logprobs(part.entries, plan.logprobs, plan.model.table)
    return {
        "index": index,
        "message": {"role": "assistant", "content": part.text, "refusal": None},
        "logprobs": logprobs,
        "finish_reason": part.finish,
    }


def _text_choice(plan: Plan, index: int, part: Whole) -> dict[str, Any]:
    logprobs = None
    if plan.logprobs is not None:
        logprobs = completion_logprobs(plan, part.entries, part.echo)
    return {
        "text": (part.echo.text if part.echo else "") + part.text,
        "index": index,
        "logprobs": logprobs,
        "finish_reason": part.finish,
    }
