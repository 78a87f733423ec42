"""What the routes share: one `Gateway` per application, made by the lifespan in `app.py`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.requests import Request

from controlplane.api.errors import ApiError
from controlplane.fleet.demand import DemandWriter
from controlplane.gateway.auth import Authenticator, Principal
from controlplane.gateway.catalogue import Catalogue
from controlplane.gateway.context import context_of
from controlplane.gateway.holding import Holding
from controlplane.gateway.limits import Limiter
from controlplane.gateway.metering import Meter
from controlplane.gateway.probe import Prober
from controlplane.gateway.settings import GatewaySettings
from controlplane.gateway.tokenizing import TokenizerPool
from controlplane.jobs.serving import ServingExecutor


class JobReader(Protocol):
    """The reading face of the job store."""

    async def get(self, job_id: str) -> Any: ...

    async def list(self, limit: int, cursor: str | None, tenant: str | None) -> Any: ...


class ExecutorReader(Protocol):
    """The reading face of the fleet."""

    def executors(self) -> Any: ...


class Runtime(Protocol):
    """What the gateway takes of `controlplane.jobs.runtime.ServingRuntime`; tests bring their own."""

    @property
    def executor(self) -> ServingExecutor: ...

    @property
    def store(self) -> JobReader: ...

    @property
    def fleet(self) -> ExecutorReader: ...


@dataclass(slots=True)
class Gateway:
    settings: GatewaySettings
    runtime: Runtime
    catalogue: Catalogue
    auth: Authenticator
    limiter: Limiter
    meter: Meter
    pool: TokenizerPool
    prober: Prober
    holding: Holding
    demand: DemandWriter
    started: float
    draining: bool = False

    @property
    def executor(self) -> ServingExecutor:
        return self.runtime.executor


def gateway_of(request: Request) -> Gateway:
    gateway: Gateway = request.app.state.gateway
    return gateway


async def identify(request: Request, route: str) -> tuple[Gateway, Principal]:
    """Names the route for log and metrics, and authenticates. Raises ApiError."""
    gateway, context = gateway_of(request), context_of(request)
    context.route = route
    context.mark = time.perf_counter()
    principal = await gateway.auth.authenticate(request)
    context.tenant, context.key_id = principal.tenant, principal.key_id
    context.stage("auth")
    return gateway, principal


def refuse_if_draining(gateway: Gateway) -> None:
    if gateway.draining:
        raise ApiError(503, "The server is shutting down.", code="shutting_down", retry_after=1)
