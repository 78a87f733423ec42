"""The standard gRPC health service (grpc.health.v1), for probes that know nothing of ours.

Service "" answers whether the process lives, "deepflow.v1.TaskExecutor" whether it takes tasks. The
two messages are one field each, so they are read and written here without generated code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio

SERVICE = "grpc.health.v1.Health"
METHODS = f"/{SERVICE}/"
"""Prefix of its methods: probes carry no credentials."""
READINESS = "deepflow.v1.TaskExecutor"
SERVING, NOT_SERVING = b"\x08\x01", b"\x08\x02"


def requested_service(request: bytes) -> str:
    """The `service` of a HealthCheckRequest; a name longer than 127 bytes is none of ours."""
    if not request:
        return ""
    if len(request) < 2 or request[0] != 0x0A or request[1] != len(request) - 2:
        return "?"
    return request[2:].decode(errors="replace")


def add_to_server(server: grpc.aio.Server, alive: Callable[[], bool], ready: Callable[[], bool]) -> None:
    async def check(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
        service = requested_service(request)
        if service not in ("", READINESS):
            await context.abort(grpc.StatusCode.NOT_FOUND, f"service {service!r} is not known here")
        return SERVING if (ready if service else alive)() else NOT_SERVING

    handlers: dict[str, Any] = {"Check": grpc.unary_unary_rpc_method_handler(check)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
