"""`deepflow chat`: talk to a model through the gateway, as any OpenAI client does."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from controlplane.cli.output import (
    ApiKey,
    CliError,
    StateDir,
    Url,
    client,
    error_text,
    gateway_url,
    get_json,
    note,
    unreachable,
)

if TYPE_CHECKING:
    import httpx

ANSWER_SECONDS = 600.0  # the gateway's own deadline of a request


def chat(
    *,
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="[PROMPT]", show_default=False,
                       help="What to say; without it a conversation starts. '-' reads standard input."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", show_default=False, help="Model id.  [default: the first one served]"),
    ] = None,
    system: Annotated[str | None, typer.Option("--system", "-s", help="System message.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, max=2, help="0 = always the likeliest.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer, in tokens.")] = None,
    url: Url = None,
    api_key: ApiKey = None,
    state_dir: StateDir = None,
) -> None:  # fmt: skip
    """Chat with a model. The answer streams to standard output; Ctrl-C ends it."""
    base_url = gateway_url(url, state_dir)
    if model is None:
        served = get_json(base_url, api_key, "/v1/models")["data"]
        if not served:
            raise CliError("the gateway serves no model")
        model = str(served[0]["id"])
    options: dict[str, Any] = {"model": model, "stream": True}
    if temperature is not None:
        options["temperature"] = temperature
    if max_tokens is not None:
        options["max_completion_tokens"] = max_tokens
    messages = [{"role": "system", "content": system}] if system else []
    with client(base_url, api_key) as http:
        if prompt is not None:
            text = sys.stdin.read() if prompt == "-" else prompt
            _answer(http, options, [*messages, {"role": "user", "content": text}])
        else:
            _converse(http, options, messages)


def _converse(http: httpx.Client, options: dict[str, Any], messages: list[dict[str, str]]) -> None:
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing in input())

    if sys.stdin.isatty():
        note(f"{options['model']}: Ctrl-C ends an answer, Ctrl-D the conversation")
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            note("")
            return
        if not text.strip():
            continue
        turn = [*messages, {"role": "user", "content": text}]
        try:
            answer = _answer(http, options, turn)
        except KeyboardInterrupt:
            note("\n(stopped)")
            continue  # the half answer is not kept
        except CliError as error:
            note(f"error: {error}")
            continue
        messages = [*turn, {"role": "assistant", "content": answer}]


def _answer(http: httpx.Client, options: dict[str, Any], messages: list[dict[str, str]]) -> str:
    """Streams one answer to stdout and returns it. Leaving early closes the connection, which aborts it."""
    import httpx

    parts: list[str] = []
    body = {**options, "messages": messages}
    try:
        with http.stream("POST", "/v1/chat/completions", json=body, timeout=ANSWER_SECONDS) as answer:
            if answer.status_code >= 400:
                answer.read()
                raise CliError(error_text(answer))
            for text in _contents(answer):
                parts.append(text)
                sys.stdout.write(text)
                sys.stdout.flush()
    except httpx.TransportError as error:
        raise CliError(unreachable(str(http.base_url), error)) from None
    sys.stdout.write("\n")
    return "".join(parts)


def _contents(answer: httpx.Response) -> Iterator[str]:
    """The text deltas of a stream of server-sent events."""
    for line in answer.iter_lines():
        if not line.startswith("data:"):
            continue  # comments keep the connection alive
        data = line[5:].strip()
        if data == "[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            raise CliError(str(event["error"].get("message", event["error"])))
        for choice in event.get("choices", []):
            yield choice.get("delta", {}).get("content") or ""
