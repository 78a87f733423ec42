"""The TaskExecutor service: one multiplexed stream per gateway process, and the leader's calls.

A stream's life: Hello, Welcome, then two coroutines. The reader submits and aborts; whatever a
gateway sends wrongly costs it an error delta, never the stream. The writer sends one message per
engine step at most, merged while the gateway is slow, and a load report at least every second.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc
import grpc.aio
from deepflow.v1 import worker_pb2 as pb
from deepflow.v1 import worker_pb2_grpc

from flowserve.engine.types import ErrorCode, FinishReason, TaskDelta, TaskError, TaskRejected
from flowserve.shell import convert, metrics
from flowserve.shell.lifecycle import DEFAULT_DRAIN_SECONDS, Lifecycle, Refusal, Refused
from flowserve.shell.loading import LoadFailed, LoadReason, LoadSpec
from flowserve.shell.outbox import KVState
from flowserve.shell.streams import GatewayStream, Streams, TooManyStreams
from kvtransfer.auth import PROTOCOL_KEY, PROTOCOL_VERSION
from kvtransfer.weights import WeightPeer

log = logging.getLogger(__name__)

HELLO_SECONDS = 10.0
"""A stream that does not say who it is for so long is closed (ours)."""
LOAD_EVERY_SECONDS = 1.0
"""The protocol's bound: a gateway that hears nothing for longer looks elsewhere."""
LOAD_AT_MOST_EVERY_SECONDS = 0.05
"""Faster than a decision can use it; decode steps come every 10 to 50 ms."""
MAX_DRAIN_SECONDS = 3600.0
MAX_WEIGHT_PEERS = 16
"""Sources of weights that a load tries (ours): each is asked what it has."""

Context = grpc.aio.ServicerContext[Any, Any]

_LOAD_STATUS = {
    LoadReason.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    LoadReason.UNSUPPORTED: grpc.StatusCode.INVALID_ARGUMENT,
    LoadReason.NO_MEMORY: grpc.StatusCode.RESOURCE_EXHAUSTED,
    LoadReason.STOPPED: grpc.StatusCode.ABORTED,
    LoadReason.INTERNAL: grpc.StatusCode.INTERNAL,
}
_REFUSED_STATUS = {
    Refusal.INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    Refusal.STALE: grpc.StatusCode.FAILED_PRECONDITION,
    Refusal.BUSY: grpc.StatusCode.ABORTED,
}


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this process is to its peers."""

    te_id: str
    incarnation: str
    address: str


class _Ended(Exception):
    """A stream is over; how its call ends."""

    def __init__(self, reason: str, code: grpc.StatusCode = grpc.StatusCode.OK, message: str = "") -> None:
        super().__init__(message)
        self.reason = reason
        self.code = code


class TaskExecutorService(worker_pb2_grpc.TaskExecutorServicer):
    """Served on the event loop that owns `lifecycle` and `streams`."""

    def __init__(
        self,
        identity: Identity,
        lifecycle: Lifecycle,
        streams: Streams,
        *,
        record: Callable[[], pb.ExecutorRecord],
        on_exit: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`on_exit` is called once a Drain with `exit` was answered. `clock` is the engine's."""
        self._identity = identity
        self._lifecycle = lifecycle
        self._streams = streams
        self._record = record
        self._on_exit = on_exit
        self._clock = clock

    # -- the stream ------------------------------------------------------------------------------

    async def Tasks(self, request_iterator: AsyncIterator[pb.TasksRequest], context: Context) -> None:  # type: ignore[override]  # the read/write API of grpc.aio, which its stubs do not know
        await _check_protocol(context)
        hello = await self._hello(request_iterator, context)
        try:
            stream, replaced = self._streams.open(hello.gateway_id, hello.incarnation)
        except TooManyStreams as error:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        if replaced is not None:
            self._abort_tasks(replaced)
        log.info("stream %s opened", stream.owner)
        ended = _Ended("disconnected")
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._write(stream, context))
                group.create_task(self._read(stream, request_iterator))
        except* _Ended as group_error:
            ended = _first(group_error)
        except* (grpc.RpcError, grpc.aio.UsageError, asyncio.InvalidStateError) as errors:
            log.info("stream %s broke: %s", stream.owner, errors.exceptions[0])
        finally:
            if self._streams.remove(stream):  # else it was replaced, and its tasks aborted with that
                self._abort_tasks(stream)
            metrics.STREAM_ENDS.labels(ended.reason).inc()
            log.info("stream %s ended: %s %s", stream.owner, ended.reason, ended)
        if ended.code is not grpc.StatusCode.OK:
            await context.abort(ended.code, str(ended))

    async def _hello(self, requests: AsyncIterator[pb.TasksRequest], context: Context) -> pb.Hello:
        try:
            async with asyncio.timeout(HELLO_SECONDS):
                first = await anext(requests, None)
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, f"no Hello within {HELLO_SECONDS:g} s")
        if first is None or first.WhichOneof("message") != "hello":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message must be a Hello")
        hello = first.hello
        for name, value in (("gateway_id", hello.gateway_id), ("incarnation", hello.incarnation)):
            if not 0 < len(value) <= convert.MAX_ID_CHARS:
                await context.abort(
                    grpc.StatusCode.INVALID_ARGUMENT,
                    f"hello.{name} must have 1 to {convert.MAX_ID_CHARS} characters",
                )
        return hello

    def _abort_tasks(self, stream: GatewayStream) -> None:
        if self._lifecycle.model is not None:
            self._lifecycle.model.engine.abort_owner(stream.owner)

    async def _read(self, stream: GatewayStream, requests: AsyncIterator[pb.TasksRequest]) -> None:
        async for request in requests:
            match request.WhichOneof("message"):
                case "submit":
                    self._submit(stream, request.submit)
                case "abort":
                    self._abort(request.abort)
                case "hello":
                    raise _Ended("protocol", grpc.StatusCode.INVALID_ARGUMENT, "a second Hello")
                case _:
                    log.warning("stream %s: a message of an unknown kind", stream.owner)
            await stream.outbox.room()  # a gateway that does not read its refusals is not read either
        raise _Ended("closed by the gateway")

    def _submit(self, stream: GatewayStream, message: pb.SubmitTask) -> None:
        error = self._lifecycle.accepts(message.model_revision)
        if error is None:
            error = self._try_submit(stream, message)
        if error is None or stream.ending is not None:
            return
        kind = convert.KINDS.get(message.kind)
        outcome = f"rejected_{error.code.value}"
        metrics.TASKS.labels(kind.value if kind is not None else "unknown", outcome).inc()
        stream.outbox.add_delta(
            TaskDelta(
                task_id=message.task_id[: convert.MAX_ID_CHARS],
                attempt=message.attempt,
                owner=stream.owner,
                finish=FinishReason.ERROR,
                error=error,
            )
        )

    def _try_submit(self, stream: GatewayStream, message: pb.SubmitTask) -> TaskError | None:
        model = self._lifecycle.model
        if model is None:
            raise AssertionError("accepts() saw a model")
        try:
            task = convert.task_of(message, stream.owner, self._clock())
            model.engine.submit(task)
            self._streams.accepted(task)
        except convert.InvalidTask as invalid:
            return TaskError(ErrorCode.INVALID_ARGUMENT, str(invalid))
        except TaskRejected as rejected:
            return rejected.error
        except Exception as error:  # a task boundary: one submit fails, the stream goes on
            log.exception("submit of %s failed", message.task_id[: convert.MAX_ID_CHARS])
            return TaskError(ErrorCode.INTERNAL, f"{type(error).__name__}: {error}", retryable=True)
        return None

    def _abort(self, message: pb.AbortTask) -> None:
        if self._lifecycle.model is not None:
            reason = message.reason[: convert.MAX_ID_CHARS] or "aborted by its gateway"
            self._lifecycle.model.engine.abort(message.task_id, message.attempt, reason)

    async def _write(self, stream: GatewayStream, context: Context) -> None:
        outbox = stream.outbox
        welcome = pb.Welcome(
            te_id=self._identity.te_id,
            incarnation=self._identity.incarnation,
            model_revision=self._lifecycle.revision,
            load=convert.load_message(self._lifecycle.load_report()),
        )
        await context.write(pb.TasksResponse(welcome=welcome))
        last_load = self._clock()
        said = self._said()
        while True:
            await self._snapshot(stream)
            if outbox.empty:
                await outbox.wait(max(0.0, last_load + LOAD_EVERY_SECONDS - self._clock()))
            step = self._step(stream)
            now = self._clock()
            if self._said() != said or now - last_load >= (
                LOAD_AT_MOST_EVERY_SECONDS if step is not None else LOAD_EVERY_SECONDS
            ):
                step = step or pb.StepEvent()
                step.load.CopyFrom(convert.load_message(self._lifecycle.load_report()))
                last_load, said = now, self._said()
            if step is not None:
                await context.write(pb.TasksResponse(step=step))
            if stream.ending is not None and outbox.empty:
                code, message = stream.ending
                raise _Ended("replaced" if code is grpc.StatusCode.ABORTED else "stopping", code, message)

    def _said(self) -> tuple[object, ...]:
        """What a gateway should hear of at once, beside the tasks."""
        return (self._lifecycle.state, self._lifecycle.role, self._lifecycle.role_epoch)

    def _step(self, stream: GatewayStream) -> pb.StepEvent | None:
        """The next message, without the load."""
        deltas, kv_events = stream.outbox.take_deltas(), stream.outbox.take_kv()
        if not deltas and kv_events is None:
            return None
        identity = self._identity
        step = pb.StepEvent(
            deltas=[
                convert.delta_message(delta, identity.te_id, identity.incarnation, identity.address)
                for delta in deltas
            ]
        )
        metrics.OUTBOX_TOKENS.inc(sum(len(delta.tokens) for delta in deltas))
        if kv_events is not None:
            step.kv_events.CopyFrom(convert.kv_events_message(kv_events))
        return step

    async def _snapshot(self, stream: GatewayStream) -> None:
        model = self._lifecycle.model
        if stream.outbox.kv_state is KVState.NEEDS_SNAPSHOT and model is not None and stream.ending is None:
            stream.outbox.begin_snapshot()
            snapshot = await asyncio.to_thread(model.engine.snapshot_kv_events)
            stream.outbox.finish_snapshot(snapshot)

    # -- the leader's calls ----------------------------------------------------------------------

    async def LoadModel(self, request: pb.LoadModelRequest, context: Context) -> pb.LoadModelResponse:
        try:
            model = await self._lifecycle.load_model(_spec(request))
        except LoadFailed as failure:
            await context.abort(_LOAD_STATUS[failure.reason], str(failure))
        except Refused as refused:
            await _refuse(context, refused)
        return pb.LoadModelResponse(
            model_revision=model.spec.revision,
            kv_blocks=model.num_blocks,
            block_tokens=model.block_tokens,
            max_model_len=model.max_model_len,
            load_seconds=model.load_seconds,
        )

    async def Preload(self, request: pb.LoadModelRequest, context: Context) -> pb.PreloadResponse:
        try:
            came, seconds = await self._lifecycle.preload(_spec(request))
        except LoadFailed as failure:
            await context.abort(_LOAD_STATUS[failure.reason], str(failure))
        except Refused as refused:
            await _refuse(context, refused)
        return pb.PreloadResponse(model_revision=request.model_revision, weights=came, seconds=seconds)

    async def Sleep(self, request: pb.SleepRequest, context: Context) -> pb.SleepResponse:
        timeout = min(request.timeout_ms / 1000, MAX_DRAIN_SECONDS) or DEFAULT_DRAIN_SECONDS
        try:
            slept = await self._lifecycle.sleep(timeout)
        except Refused as refused:
            await _refuse(context, refused)
        return pb.SleepResponse(model_revision=slept.revision, seconds=slept.seconds)

    async def SetRole(self, request: pb.SetRoleRequest, context: Context) -> pb.SetRoleResponse:
        role = convert.ROLES.get(request.role)
        if role is None:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"role {request.role} is unknown")
        try:
            self._lifecycle.set_role(role, request.epoch)
        except Refused as refused:
            await _refuse(context, refused)
        return pb.SetRoleResponse(
            role=convert.role_message(self._lifecycle.role), epoch=self._lifecycle.role_epoch
        )

    async def Drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainResponse:
        timeout = min(request.timeout_ms / 1000, MAX_DRAIN_SECONDS) or DEFAULT_DRAIN_SECONDS
        result = await self._lifecycle.drain(timeout)
        if request.exit:
            self._on_exit()
        return pb.DrainResponse(
            drained=result.drained, tasks_left=result.tasks_left, transfers_left=result.transfers_left
        )

    async def GetStatus(self, request: pb.GetStatusRequest, context: Context) -> pb.ExecutorStatus:
        load = convert.load_message(self._lifecycle.load_report())
        status = pb.ExecutorStatus(record=self._record(), load=load)
        model = self._lifecycle.model
        if model is not None:
            audit = await asyncio.to_thread(model.engine.audit)
            status.tasks = model.engine.active_tasks
            status.leaked_blocks = audit.leaked_blocks
            status.stuck_tasks = audit.stuck_tasks
        return status


def _spec(request: pb.LoadModelRequest) -> LoadSpec:
    return LoadSpec(
        revision=request.model_revision,
        path=request.path,
        dtype=request.dtype or "auto",
        kv_cache_bytes=request.kv_cache_bytes,
        max_model_len=request.max_model_len,
        tensor_parallel=request.tensor_parallel,
        quantization=request.quantization,
        decided_unix=request.decided_unix_ms / 1000,
        fork_from=tuple(
            WeightPeer(peer.address, peer.te_id, peer.incarnation)
            for peer in request.fork_from[:MAX_WEIGHT_PEERS]
        ),
    )


async def _check_protocol(context: Context) -> None:
    """The credential check did this already; without a token (loopback only) there is none."""
    for key, value in context.invocation_metadata() or ():
        if key == PROTOCOL_KEY and value == PROTOCOL_VERSION:
            return
    await context.abort(
        grpc.StatusCode.FAILED_PRECONDITION, f"{PROTOCOL_KEY}: {PROTOCOL_VERSION!r} is spoken here"
    )


async def _refuse(context: Context, refused: Refused) -> NoReturn:
    await context.abort(_REFUSED_STATUS[refused.refusal], str(refused))


def _first(group: BaseExceptionGroup[_Ended]) -> _Ended:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if not isinstance(error, _Ended):
        raise AssertionError("filtered by except*")
    return error
