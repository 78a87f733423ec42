"""The outermost layer: request ids, trace context, one access-log line, metrics. Plain ASGI.

Generations are called from here: their routes stand in the router, for the document and for whatever is not
a plain POST of theirs, but a request need not pass the router and its exit stacks to get there.

Everything inside may assume `scope["deepflow.context"]`. An exception that nothing inside turned into an
answer becomes a 500 here, in OpenAI's shape; its text stays in the log.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Mapping

import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from controlplane.api.errors import ApiError
from controlplane.gateway import metrics
from controlplane.gateway.context import SCOPE_KEY, RequestContext, request_id_from, traceparent_from

log = logging.getLogger(__name__)
access_log = logging.getLogger("deepflow.gateway.access")

Endpoint = Callable[[Request], Awaitable[Response]]

_QUIET = frozenset({"/healthz", "/readyz", "/metrics"})  # polled: logged only when they fail


class RequestMiddleware:
    """Wraps the application. `direct`: endpoints by path, called for a POST without the layers between."""

    def __init__(
        self, app: ASGIApp, *, metric_labels: int = 200, direct: Mapping[str, Endpoint] | None = None
    ) -> None:
        self._app = app
        self._direct = dict(direct or {})
        self._model_label = metrics.LabelCap(metric_labels)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1000})
                return
            await self._app(scope, receive, send)
            return
        given: dict[bytes, bytes] = {}
        for name, value in scope["headers"]:
            if name in (b"x-request-id", b"traceparent"):
                given.setdefault(name, value)
        traceparent, parent_span = traceparent_from(given.get(b"traceparent"))
        context = RequestContext(
            request_id=request_id_from(given.get(b"x-request-id")),
            traceparent=traceparent,
            parent_span=parent_span,
            send=send,
        )
        scope[SCOPE_KEY] = context

        async def send_with_ids(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *context.start(message["status"])]
            await send(message)

        try:
            endpoint = self._direct.get(scope["path"]) if scope["method"] == "POST" else None
            if endpoint is None:
                await self._app(scope, receive, send_with_ids)
            else:
                response = await endpoint(Request(scope, receive, send_with_ids))
                await response(scope, receive, send_with_ids)
        except ClientDisconnect:
            context.status = 499
        except ApiError as error:
            if context.answering:
                raise
            context.error = error.code or str(error.status)
            await send_error(error, send_with_ids)
        except Exception:
            # The request's task boundary: nothing above could report this better.
            log.exception("request %s failed", context.request_id)
            context.error = "internal_error"
            if context.answering:
                raise
            await send_error(ApiError(500, "The server had an error.", code="internal_error"), send_with_ids)
        finally:
            self._report(scope, context)

    def _report(self, scope: Scope, context: RequestContext) -> None:
        seconds = time.perf_counter() - context.started
        status = context.status or 499
        metrics.REQUESTS.labels(context.route, str(status), self._model_label(context.model)).inc()
        metrics.SECONDS.labels(context.route).observe(seconds)
        for stage, took in context.stages.items():
            metrics.STAGE_SECONDS.labels(stage).observe(took)
        if (scope["path"] in _QUIET and status < 400) or not access_log.isEnabledFor(logging.INFO):
            return
        client = scope.get("client")
        line: dict[str, object] = {
            "time": round(time.time(), 3),
            "client": client[0] if client else None,
            "method": scope["method"],
            "path": scope["path"][:256],
            "status": status,
            "ms": round(seconds * 1000, 2),
            "request_id": context.request_id,
            "trace": context.traceparent[3:35],
        }
        for name in ("tenant", "key_id", "model", "job_id", "error"):
            value = getattr(context, name)
            if value:
                line[name] = value
        if context.held_seconds:
            line["held_ms"] = round(context.held_seconds * 1000, 1)
        if context.first_token is not None:
            line["first_token_ms"] = round(context.first_token * 1000, 2)
        if context.prompt_tokens:
            line["tokens"] = [context.prompt_tokens, context.cached_tokens, context.completion_tokens]
        if context.stages:
            line["stages_ms"] = {name: round(took * 1000, 2) for name, took in context.stages.items()}
        access_log.info("%s", orjson.dumps(line, default=str).decode())


async def send_error(error: ApiError, send: Send, *, head: bool = False) -> None:
    """Answers with an error in OpenAI's shape."""
    body = orjson.dumps(error.body())
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send(
        {"type": "http.response.start", "status": error.status, "headers": [*headers, *error.headers()]}
    )
    await send({"type": "http.response.body", "body": b"" if head else body})
