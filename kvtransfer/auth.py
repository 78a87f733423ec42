"""Credentials of calls between executors and gateways: one cluster token as a bearer.

The TE-shell puts `TokenAuth` before all of its services; every client sends `call_metadata`. The
unix socket that passes pool descriptors checks the same token (`kvtransfer.shm`).
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, NoReturn, TypeVar

import grpc
import grpc.aio

AUTHORIZATION_KEY = "authorization"
PROTOCOL_KEY = "x-deepflow-protocol"
TRACEPARENT_KEY = "traceparent"
PROTOCOL_VERSION = "1"
"""Of the internal protocol (protos/deepflow/v1); a peer that speaks another one is refused."""

TRequest = TypeVar("TRequest")
TResponse = TypeVar("TResponse")


def call_metadata(token: str, traceparent: str = "") -> tuple[tuple[str, str], ...]:
    """Metadata of every internal call: credential, protocol version, and the trace where one exists."""
    metadata: tuple[tuple[str, str], ...] = (
        (AUTHORIZATION_KEY, f"Bearer {token}"),
        (PROTOCOL_KEY, PROTOCOL_VERSION),
    )
    return (*metadata, (TRACEPARENT_KEY, traceparent)) if traceparent else metadata


def token_matches(given: str, token: str) -> bool:
    """Compares credentials in constant time."""
    return hmac.compare_digest(given.encode(), token.encode())


def refusal(metadata: Iterable[tuple[str, str | bytes]], token: str) -> tuple[grpc.StatusCode, str] | None:
    """Why a call with this metadata is refused; None if it may pass."""
    values = {key: value if isinstance(value, str) else value.decode("latin-1") for key, value in metadata}
    scheme, _, given = values.get(AUTHORIZATION_KEY, "").partition(" ")
    if scheme.lower() != "bearer" or not token_matches(given, token):
        return grpc.StatusCode.UNAUTHENTICATED, "missing or wrong cluster token"
    version = values.get(PROTOCOL_KEY, "")
    if version != PROTOCOL_VERSION:
        return (
            grpc.StatusCode.FAILED_PRECONDITION,
            f"protocol version {version!r} is not spoken here, {PROTOCOL_VERSION!r} is",
        )
    return None


class TokenAuth(grpc.aio.ServerInterceptor):
    """Refuses calls without the cluster token, or with another protocol version."""

    def __init__(self, token: str, exempt: tuple[str, ...] = ()) -> None:
        """`exempt` holds method prefixes that pass without a token, as "/grpc.health.v1.Health/"."""
        if not token:
            raise ValueError("an empty cluster token would admit everyone")
        self._token = token
        self._exempt = exempt

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[TRequest, TResponse] | None]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[TRequest, TResponse] | None:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method or ""
        if handler is None or (self._exempt and method.startswith(self._exempt)):
            return handler
        reason = refusal(handler_call_details.invocation_metadata or (), self._token)
        return handler if reason is None else _refusing(handler, *reason)


def _refusing(
    handler: grpc.RpcMethodHandler[Any, Any], code: grpc.StatusCode, message: str
) -> grpc.RpcMethodHandler[Any, Any]:
    """A handler of the same shape that ends every call with `code`."""

    async def refuse(_request: object, context: grpc.aio.ServicerContext[Any, Any]) -> NoReturn:
        await context.abort(code, message)

    make = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[(handler.request_streaming, handler.response_streaming)]
    refusing: grpc.RpcMethodHandler[Any, Any] = make(
        refuse, handler.request_deserializer, handler.response_serializer
    )
    return refusing
