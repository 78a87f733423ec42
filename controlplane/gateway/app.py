"""The FastAPI application: routes, error shapes, OpenAPI, and a lifespan that opens the serving runtime."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from redis.asyncio import BlockingConnectionPool, Redis
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from controlplane.api.errors import ApiError
from controlplane.api.openai import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from controlplane.fleet.demand import DemandWriter
from controlplane.gateway.auth import Authenticator
from controlplane.gateway.catalogue import Catalogue, CatalogueEntry
from controlplane.gateway.context import SCOPE_KEY
from controlplane.gateway.holding import Holding
from controlplane.gateway.limits import Limiter
from controlplane.gateway.metering import Meter
from controlplane.gateway.middleware import RequestMiddleware, send_error
from controlplane.gateway.probe import Prober
from controlplane.gateway.routes import deepflow, generation, health, models
from controlplane.gateway.routes.documented import add_schemas
from controlplane.gateway.servings import Servings
from controlplane.gateway.settings import GatewaySettings
from controlplane.gateway.state import Gateway, Runtime
from controlplane.gateway.tokenizing import TokenizerPool
from controlplane.gateway.wake import Stage, fleet_stage

log = logging.getLogger(__name__)

REDIS_CONNECTIONS = 64
"""Calls to Redis under way at once, for keys, limits and usage (ours: a call takes well under 1 ms)."""

RuntimeFactory = Callable[[GatewaySettings], AbstractAsyncContextManager[Runtime]]


def serving_runtime(settings: GatewaySettings) -> AbstractAsyncContextManager[Runtime]:
    """The real one: job executor, job store and fleet over Redis and gRPC."""
    from controlplane.jobs.runtime import RuntimeSettings, ServingRuntime

    overrides = {"gateway_id": settings.gateway_id, "redis_url": settings.redis_url}
    return ServingRuntime(RuntimeSettings.from_env(overrides=overrides))


class _Application(FastAPI):
    """With our layer outermost: what it calls directly passes none of the framework's."""

    metric_labels = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As Starlette's, without what FastAPI asks of the environment at every request."""
        if self.middleware_stack is None:
            self.middleware_stack = self.build_middleware_stack()
        scope["app"] = self
        await self.middleware_stack(scope, receive, send)

    def build_middleware_stack(self) -> ASGIApp:
        inner = super().build_middleware_stack()
        return RequestMiddleware(inner, metric_labels=self.metric_labels, direct=generation.ENDPOINTS)


def create_app(
    settings: GatewaySettings, *, runtime: RuntimeFactory = serving_runtime, redis: Redis | None = None
) -> FastAPI:
    """`redis` is for tests that bring their own client; by default one is made from the settings."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with _open(settings, runtime, redis) as gateway:
            app.state.gateway = gateway
            yield

    app = _Application(
        title="DeepFlow gateway",
        version="1",
        summary="OpenAI-compatible LLM serving",
        lifespan=lifespan,
        docs_url="/docs",
        redoc_url=None,
        redirect_slashes=False,
    )
    for module in (generation, models, health, deepflow):
        app.include_router(module.router)
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.metric_labels = settings.metric_labels
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]  # FastAPI's documented way
    return app


@asynccontextmanager
async def _open(
    settings: GatewaySettings, runtime: RuntimeFactory, redis: Redis | None
) -> AsyncIterator[Gateway]:
    own_redis = redis is None
    if redis is None:
        # Blocking: a burst of requests waits for a connection. A plain pool would raise at its bound, which
        # reads as "Redis is away": unknown keys refused, limits counted by this process alone.
        redis = Redis(
            connection_pool=BlockingConnectionPool.from_url(
                settings.redis_url,
                max_connections=REDIS_CONNECTIONS,
                timeout=settings.redis_seconds,
                socket_connect_timeout=settings.redis_seconds,
                socket_timeout=settings.redis_seconds,
            )
        )
    catalogue = Catalogue(settings)
    await catalogue.load()
    # A name of this process and of no other, not even of its successor.
    demand = DemandWriter(redis, f"{settings.gateway_id}-{secrets.token_hex(4)}")
    catalogue.on_pending = demand.record_demand
    servings = Servings(catalogue, redis, settings) if settings.kubernetes else None
    auth = Authenticator(redis, settings)
    meter = Meter(redis, auth, settings)
    limiter = Limiter(redis, settings)
    pool = TokenizerPool(settings)
    async with runtime(settings) as opened:
        prober = Prober(opened.executor, settings)

        def stage(entry: CatalogueEntry) -> Stage:
            known = servings.stage(entry.demand) if servings is not None else None
            return known or fleet_stage(opened.fleet.executors(), entry.revision)

        holding = Holding(opened.executor, demand, settings, stage=stage)
        loops = [catalogue.run(), meter.run(), demand.run(), holding.run()]
        if servings is not None:
            loops.append(servings.run())
        tasks = [asyncio.create_task(loop) for loop in loops]
        for task in tasks:
            task.add_done_callback(_report_death)
        try:
            yield Gateway(
                settings=settings,
                runtime=opened,
                catalogue=catalogue,
                auth=auth,
                limiter=limiter,
                meter=meter,
                pool=pool,
                prober=prober,
                holding=holding,
                demand=demand,
                started=time.time(),
            )
        finally:
            for task in tasks:
                task.cancel()
            for task in tasks:
                with suppress(asyncio.CancelledError):
                    await task
            await prober.close()
            await limiter.close()
            await meter.flush()
            pool.close()
            if own_redis:
                await redis.aclose()


def _report_death(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.error("a background task of the gateway ended", exc_info=task.exception())


class _ErrorResponse(Response):
    """An ApiError as a response."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(status_code=error.status)
        self._error = error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        context = scope.get(SCOPE_KEY)
        if context is not None:
            context.error = self._error.code or str(self._error.status)
        await send_error(self._error, send, head=scope["method"] == "HEAD")


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _ErrorResponse(error)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    """Query and path parameters; bodies are validated in `body.py`."""
    assert isinstance(error, RequestValidationError)
    problem = error.errors()[0]
    param = str(problem["loc"][-1])
    return _ErrorResponse(
        ApiError(400, f"Invalid value for '{param}': {problem['msg']}.", param=param, code="invalid_value")
    )


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.scope["path"][:200]
    if error.status_code == 404:
        return _ErrorResponse(ApiError(404, f"Unknown route: {request.method} {path}", code="unknown_url"))
    if error.status_code == 405:
        response = ApiError(
            405, f"Method {request.method} is not allowed for {path}.", code="method_not_allowed"
        )
        return _ErrorWithAllow(response, (error.headers or {}).get("Allow", ""))
    return _ErrorResponse(ApiError(error.status_code, str(error.detail)))


class _ErrorWithAllow(_ErrorResponse):
    def __init__(self, error: ApiError, allow: str) -> None:
        super().__init__(error)
        self._allow = allow

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        context = scope.get(SCOPE_KEY)
        if context is not None and self._allow:
            context.response_headers.append((b"allow", self._allow.encode()))
        await super().__call__(scope, receive, send)


def _openapi(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
        add_schemas(document, ChatCompletionRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest)
        app.openapi_schema = document
    return app.openapi_schema
