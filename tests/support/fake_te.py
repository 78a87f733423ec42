"""A fake executor: speaks the leader's half of the worker protocol, and says of itself that it is a fake.

For tests of the operator: there is no engine in it. It holds to the real one's rules (one model at a time,
epochs of roles, drain) and can be told to be slow, to fail, to be busy or to fall silent.
"""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
from deepflow.v1 import common_pb2, worker_pb2, worker_pb2_grpc

from controlplane.operator.executors import NO_FILE
from kvtransfer.auth import call_metadata
from kvtransfer.channel import add_port
from kvtransfer.tls import Tls

DEVICE = "fake"
State = worker_pb2.ExecutorState


@dataclass
class FakeTe(worker_pb2_grpc.TaskExecutorServicer):
    """State of one; change it at any time."""

    te_id: str
    token: str
    load_seconds: float = 0.05
    fail_load: str = ""
    tasks: int = 0
    state: Any = worker_pb2.EXECUTOR_STATE_WARM
    role: Any = common_pb2.ROLE_COLOCATED
    epoch: int = 0
    revision: str = ""
    queued_tokens: int = 0
    waiting: int = 0
    kv_used: float = 0.0
    loads: int = 0
    weight_cache: bool = True
    fail_fork: bool = False
    asleep: str = ""  # revision
    requests: list[worker_pb2.LoadModelRequest] = field(default_factory=list)
    preloads: list[worker_pb2.LoadModelRequest] = field(default_factory=list)
    drained_with: list[int] = field(default_factory=list)
    incarnation: str = field(default_factory=lambda: uuid.uuid4().hex)
    loading: asyncio.Task[None] | None = None

    async def GetStatus(
        self, request: worker_pb2.GetStatusRequest, context: Any
    ) -> worker_pb2.ExecutorStatus:
        await self._check(context)
        record = worker_pb2.ExecutorRecord(
            te_id=self.te_id, incarnation=self.incarnation, state=self.state, model_revision=self.revision,
            device=DEVICE, role=self.role, role_epoch=self.epoch, weight_cache=self.weight_cache,
            asleep=[self.asleep] if self.asleep else [],
            preloaded=[request.model_revision for request in self.preloads],
        )  # fmt: skip
        load = common_pb2.LoadReport(
            role=self.role, role_epoch=self.epoch, running=self.tasks, waiting=self.waiting,
            queued_prefill_tokens=self.queued_tokens,
            prefill_tokens_per_second=1000.0, kv_blocks_total=1000,
            kv_blocks_free=round(1000 * (1 - self.kv_used)),
            draining=self.state == worker_pb2.EXECUTOR_STATE_DRAINING,
        )  # fmt: skip
        return worker_pb2.ExecutorStatus(record=record, load=load, tasks=self.tasks)

    async def LoadModel(
        self, request: worker_pb2.LoadModelRequest, context: Any
    ) -> worker_pb2.LoadModelResponse:
        await self._check(context)
        if self.state in (worker_pb2.EXECUTOR_STATE_WARM, worker_pb2.EXECUTOR_STATE_SLEEPING):
            self.requests.append(request)
            if self.asleep == request.model_revision:
                self.asleep = ""
            elif self.fail_fork and request.path == NO_FILE:
                await context.abort(grpc.StatusCode.NOT_FOUND, "no executor feeds it, and no file is there")
            if self.fail_load:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, self.fail_load)
            self.state = worker_pb2.EXECUTOR_STATE_LOADING
            self.revision = request.model_revision
            self.loads += 1
            self.loading = asyncio.create_task(self._finish())
        if request.model_revision != self.revision or self.state not in (
            worker_pb2.EXECUTOR_STATE_LOADING, worker_pb2.EXECUTOR_STATE_READY
        ):  # fmt: skip
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "another model, or no state to load in")
        assert self.loading is not None
        await asyncio.shield(self.loading)
        return worker_pb2.LoadModelResponse(model_revision=self.revision, load_seconds=self.load_seconds)

    async def _finish(self) -> None:
        await asyncio.sleep(self.load_seconds)
        if self.state == worker_pb2.EXECUTOR_STATE_LOADING:
            self.state = worker_pb2.EXECUTOR_STATE_READY

    async def SetRole(self, request: worker_pb2.SetRoleRequest, context: Any) -> worker_pb2.SetRoleResponse:
        await self._check(context)
        if (request.role, request.epoch) != (self.role, self.epoch):
            if request.epoch <= self.epoch:
                await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "stale epoch")
            self.role, self.epoch = request.role, request.epoch
        return worker_pb2.SetRoleResponse(role=self.role, epoch=self.epoch)

    async def Preload(self, request: worker_pb2.LoadModelRequest, context: Any) -> worker_pb2.PreloadResponse:
        await self._check(context)
        if self.state != worker_pb2.EXECUTOR_STATE_WARM:
            await context.abort(grpc.StatusCode.ABORTED, "it has its model")
        self.preloads.append(request)
        return worker_pb2.PreloadResponse(model_revision=request.model_revision, weights="built")

    async def Sleep(self, request: worker_pb2.SleepRequest, context: Any) -> worker_pb2.SleepResponse:
        await self._check(context)
        if self.tasks:
            await context.abort(grpc.StatusCode.ABORTED, f"{self.tasks} tasks were left")
        if self.state == worker_pb2.EXECUTOR_STATE_READY:
            self.state, self.asleep, self.revision = worker_pb2.EXECUTOR_STATE_SLEEPING, self.revision, ""
        return worker_pb2.SleepResponse(model_revision=self.asleep)

    async def Drain(self, request: worker_pb2.DrainRequest, context: Any) -> worker_pb2.DrainResponse:
        await self._check(context)
        self.state = worker_pb2.EXECUTOR_STATE_DRAINING
        self.drained_with.append(self.tasks)
        return worker_pb2.DrainResponse(drained=not self.tasks, tasks_left=self.tasks)

    async def _check(self, context: Any) -> None:
        wanted = dict(call_metadata(self.token))
        given = dict(context.invocation_metadata() or ())
        if any(given.get(name) != value for name, value in wanted.items()):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the cluster token is wrong")


class FakePod:
    """A fake executor and a real fetcher, served at an address of their own."""

    def __init__(self, te: FakeTe, host: str, cache: Any, tls: Tls | None = None) -> None:
        self.te, self.host, self._cache = te, host, cache
        self.tls = tls
        self._server: grpc.aio.Server | None = None
        self._runner: Any = None

    async def start(self) -> None:
        from aiohttp import web

        from controlplane.api.resources.names import PORT_FETCH, PORT_GRPC
        from controlplane.nodeagent.fetcher import Fetcher, application

        await self.start_executor(PORT_GRPC)
        self._runner = web.AppRunner(application(Fetcher(self._cache), self.te.token), access_log=None)
        await self._runner.setup()
        context = None if self.tls is None else self.tls.server_context()
        await web.TCPSite(self._runner, self.host, PORT_FETCH, ssl_context=context).start()

    async def start_executor(self, port: int) -> None:
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        worker_pb2_grpc.add_TaskExecutorServicer_to_server(self.te, self._server)
        assert add_port(self._server, f"{self.host}:{port}", self.tls) == port
        await self._server.start()

    async def silence(self) -> None:
        """The executor's process is gone."""
        if self._server is not None:
            await self._server.stop(0)
            self._server = None

    async def stop(self) -> None:
        if self.te.loading is not None:
            self.te.loading.cancel()
        await self.silence()
        if self._runner is not None:
            await self._runner.cleanup()
