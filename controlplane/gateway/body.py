"""Reads a request's JSON body under a byte bound and a deadline, and validates it.

The body is never larger in memory than the bound: a declared length above it is refused unread, a
chunked body is cut off where it passes it.
"""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from controlplane.api.errors import ApiError
from controlplane.api.openai import UNSUPPORTED
from controlplane.gateway.connection import connection_of
from controlplane.gateway.context import context_of
from controlplane.gateway.settings import GatewaySettings

M = TypeVar("M", bound=BaseModel)


async def read_model(request: Request, model: type[M], settings: GatewaySettings) -> M:
    """The body as `model`. Raises ApiError 400, 408, 413 or 415; ClientDisconnect."""
    _check_content_type(request.headers.get("content-type"))
    body = await _read(request, settings)
    context_of(request).body_bytes = len(body)
    try:
        parsed = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ApiError(
            400, f"The request body is not valid JSON: {_json_problem(error)}", code="invalid_json"
        ) from None
    if not isinstance(parsed, dict):
        raise ApiError(400, "The request body must be a JSON object.", code="invalid_json")
    try:
        return model.model_validate(parsed)
    except ValidationError as error:
        raise validation_error(error) from None


def _check_content_type(value: str | None) -> None:
    media = (value or "").partition(";")[0].strip().lower()
    if media != "application/json" and not (media.startswith("application/") and media.endswith("+json")):
        raise ApiError(
            415,
            "The request body must be sent with 'Content-Type: application/json'.",
            code="unsupported_media_type",
        )


async def _read(request: Request, settings: GatewaySettings) -> bytes:
    bound = settings.max_body_bytes
    declared = request.headers.get("content-length")
    if declared is not None and declared.isdecimal() and int(declared[:19]) > bound:
        raise _too_large(bound)
    connection = connection_of(request.scope)
    whole = connection.body() if connection is not None else None
    if whole is not None:
        if len(whole) > bound:
            raise _too_large(bound)
        return whole
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(settings.body_seconds):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                chunk = message.get("body", b"")
                size += len(chunk)
                if size > bound:
                    raise _too_large(bound)
                chunks.append(chunk)
                if not message.get("more_body", False):
                    return b"".join(chunks)
    except TimeoutError:
        raise ApiError(
            408, f"The request body did not arrive within {settings.body_seconds:g} s.", code="body_timeout"
        ) from None


def _too_large(bound: int) -> ApiError:
    return ApiError(413, f"The request body is larger than {bound} bytes.", code="request_too_large")


def _json_problem(error: orjson.JSONDecodeError) -> str:
    text = str(error)
    return text if len(text) <= 200 else text[:200] + "…"


def validation_error(error: ValidationError) -> ApiError:
    """The first problem, as OpenAI words it: 400 with `param`."""
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    problem = _most_telling(problems)
    param = _param(problem["loc"])
    field = str(problem["loc"][0]) if problem["loc"] else ""
    if problem["type"] == "extra_forbidden":
        return ApiError(400, f"Unknown parameter: '{param}'.", param=param, code="unknown_parameter")
    if problem["type"] == "missing":
        return ApiError(
            400, f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter"
        )
    if field in UNSUPPORTED:
        return ApiError(400, UNSUPPORTED[field], param=param, code="unsupported_parameter")
    code = "invalid_type" if problem["type"].endswith("_type") else "invalid_value"
    message = problem["msg"].removeprefix("Value error, ")
    return ApiError(
        400, f"Invalid value for '{param}': {message[:1].lower()}{message[1:]}.", param=param, code=code
    )


# Names that pydantic puts into a location for the members of a union.
_UNION_MARKS = ("constrained-", "list[", "function-", "str", "int", "nullable", "literal[")


def _most_telling(problems: list[Any]) -> Any:
    """Of a union's failures, the one that got furthest into the value."""
    first = problems[0]["loc"][:1]
    same = [problem for problem in problems if problem["loc"][:1] == first]
    return max(same, key=lambda problem: len(problem["loc"]))


def _param(location: tuple[int | str, ...]) -> str:
    text = ""
    for position, part in enumerate(location):
        if isinstance(part, int):
            text += f"[{part}]"
        elif position > 0 and (part == "[key]" or part.startswith(_UNION_MARKS) or part[:1].isupper()):
            continue
        else:
            text += f".{part}" if text else part
    return text if len(text) <= 200 else text[:200] + "…"
