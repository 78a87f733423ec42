"""Errors as OpenAI sends them, and the status contract of the gateway.

Body: `{"error": {"message", "type", "param", "code"}}`. Statuses: 400 the request is wrong (`param` names
the field), 401 `invalid_api_key`, 403 not allowed, 404 unknown route or `model_not_found` (unknown models
only), 405, 408 the body came too slowly, 413 the body is too large, 415 not JSON, 429 a bound is reached
now (with `Retry-After`), 499 the client left (never sent, only counted), 500 a fault of ours, 503 nothing
can serve, 504 a deadline passed.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict

ErrorType = Literal[
    "invalid_request_error",
    "authentication_error",
    "permission_error",
    "rate_limit_error",
    "server_error",
    "timeout_error",
]


class ErrorBody(BaseModel):
    """The object under `error`."""

    model_config = ConfigDict(extra="forbid")

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """The body of every answer with a status of 400 or above."""

    model_config = ConfigDict(extra="forbid")

    error: ErrorBody


class ApiError(Exception):
    """Raised anywhere before the answer's headers are sent; becomes an `ErrorResponse`."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: ErrorType | None = None,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        drop_reason: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type: ErrorType = type or default_type(status)
        self.param = param
        self.code = code
        self.retry_after = retry_after
        self.drop_reason = drop_reason

    def body(self) -> dict[str, dict[str, str | None]]:
        """The JSON body, in OpenAI's field order."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def headers(self) -> list[tuple[bytes, bytes]]:
        """`Retry-After` in whole seconds, `WWW-Authenticate` on 401, why load was shed."""
        headers: list[tuple[bytes, bytes]] = []
        if self.drop_reason is not None:
            headers.append((b"x-deepflow-drop-reason", self.drop_reason.encode()))
        if self.retry_after is not None:
            headers.append((b"retry-after", str(max(1, math.ceil(self.retry_after))).encode()))
        elif self.status in (429, 503):
            headers.append((b"retry-after", b"1"))
        if self.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        return headers


def default_type(status: int) -> ErrorType:
    """OpenAI's `type` for a status."""
    if status == 401:
        return "authentication_error"
    if status == 403:
        return "permission_error"
    if status == 429:
        return "rate_limit_error"
    if status in (408, 504):
        return "timeout_error"
    return "server_error" if status >= 500 else "invalid_request_error"


def invalid(message: str, param: str | None = None, code: str | None = "invalid_value") -> ApiError:
    """400: a field of the request is wrong."""
    return ApiError(400, message, param=param, code=code)


def model_not_found(model: str) -> ApiError:
    """404: only for a model that no catalogue entry, alias or revision names."""
    shown = model if len(model) <= 100 else model[:100] + "…"
    return ApiError(
        404,
        f"The model `{shown}` does not exist or you do not have access to it.",
        param="model",
        code="model_not_found",
    )


def context_length_exceeded(limit: int, prompt: int, completion: int, *, at_least: bool = False) -> ApiError:
    """400: prompt and requested output do not fit. `at_least`: the prompt was not counted to its end."""
    count = f"at least {prompt}" if at_least else str(prompt)
    if completion:
        asked = (
            f"you requested {prompt + completion} tokens ({count} in the prompt, "
            f"{completion} for the completion)"
        )
    else:
        asked = f"your prompt has {count} tokens and at least one is needed for the completion"
    return ApiError(
        400,
        f"This model's maximum context length is {limit} tokens. However, {asked}. "
        "Please reduce the length of the prompt or of the completion.",
        param="prompt" if not completion else None,
        code="context_length_exceeded",
    )
