"""The error shape and its headers."""

from __future__ import annotations

import pytest

from controlplane.api.errors import ApiError, ErrorResponse, context_length_exceeded


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, "invalid_request_error"), (401, "authentication_error"), (403, "permission_error"),
     (404, "invalid_request_error"), (429, "rate_limit_error"), (500, "server_error"),
     (504, "timeout_error")],
)  # fmt: skip
def test_every_error_has_openais_shape(status: int, kind: str) -> None:
    body = ApiError(status, "why", param="p", code="c").body()
    assert list(body["error"]) == ["message", "type", "param", "code"]
    assert ErrorResponse.model_validate(body).error.type == kind


def test_retry_after_is_whole_seconds_and_always_there_when_full() -> None:
    assert (b"retry-after", b"2") in ApiError(429, "full", retry_after=1.2).headers()
    assert (b"retry-after", b"1") in ApiError(429, "full").headers()
    assert (b"retry-after", b"1") in ApiError(503, "none").headers()
    assert ApiError(400, "bad").headers() == []


def test_context_errors_name_the_numbers() -> None:
    message = context_length_exceeded(2048, 2000, 100).message
    assert "2048" in message and "2100" in message and "2000 in the prompt" in message
    assert "at least 9000" in context_length_exceeded(2048, 9000, 0, at_least=True).message
