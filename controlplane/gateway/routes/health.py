"""`/`, `/healthz`, `/readyz`, `/metrics`."""

from __future__ import annotations

import os
from typing import Any

import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response

from controlplane.api.errors import ApiError
from controlplane.gateway import metrics
from controlplane.gateway.auth import is_local
from controlplane.gateway.context import context_of
from controlplane.gateway.routes.documented import answers
from controlplane.gateway.state import gateway_of, identify

router = APIRouter()


def _json(value: dict[str, Any], status: int = 200) -> Response:
    return Response(orjson.dumps(value), status, media_type="application/json")


@router.get("/", responses=answers(None, ()), response_class=Response)
async def root(request: Request) -> Response:
    """What this is, and where to go on."""
    context_of(request).route = "root"
    return _json(
        {
            "name": "deepflow",
            "what": "OpenAI-compatible LLM serving",
            "endpoints": [
                "POST /v1/chat/completions",
                "POST /v1/completions",
                "GET /v1/models",
                "POST /v1/tokenize",
                "POST /v1/detokenize",
                "GET /deepflow/v1/jobs",
                "GET /deepflow/v1/executors",
                "GET /readyz?model=ID",
                "GET /openapi.json",
            ],
        }
    )


@router.get("/healthz", responses=answers(None, ()), response_class=Response)
async def healthz(request: Request) -> Response:
    """The process is alive; also while it drains."""
    context_of(request).route = "healthz"
    return _json({"status": "ok"})


@router.get("/readyz", responses=answers(None, (400, 404, 500, 503)), response_class=Response)
async def readyz(request: Request, model: str | None = None) -> Response:
    """Without `model`: this gateway can serve or hold. With it: that model answers, as a probe found."""
    context_of(request).route = "readyz"
    gateway = gateway_of(request)
    if gateway.draining or not gateway.catalogue.loaded or not gateway.executor.accepting:
        reason = "draining" if gateway.draining else "not accepting yet"
        raise ApiError(503, f"The gateway is not ready: {reason}.", code="not_ready", retry_after=1)
    if model is None:
        return _json({"status": "ready"})
    result = await gateway.prober.check(gateway.catalogue.resolve(model))
    if not result.ready:
        raise ApiError(
            503, f"The model is not ready: {result.reason}.", code="model_not_ready", retry_after=1
        )
    return _json({"status": "ready", "model": model, "probe_seconds": round(result.seconds, 4)})


@router.get("/metrics", responses=answers(None, (401, 500, 503)), response_class=Response)
async def prometheus(request: Request) -> Response:
    """Prometheus text, over all processes of this gateway. From other hosts it needs a key by default."""
    context_of(request).route = "metrics"
    gateway = gateway_of(request)
    if not (gateway.settings.metrics_open or is_local(request)):
        await identify(request, "metrics")
    body = metrics.render(os.environ.get("PROMETHEUS_MULTIPROC_DIR"))
    return Response(body, media_type="text/plain; version=0.0.4; charset=utf-8")
