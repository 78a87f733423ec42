"""The worker protocol over a real gRPC server with a scripted engine: streams, refusals, slow readers.

Needs a loopback port. Real engines and processes: tests/integration/flowserve.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from deepflow.v1 import common_pb2 as cpb
from deepflow.v1 import worker_pb2 as pb
from deepflow.v1 import worker_pb2_grpc

from flowserve.engine.types import (
    EngineTask,
    ErrorCode,
    FinishReason,
    KVEvents,
    LoadReport,
    Role,
    StepEvent,
    TaskDelta,
    TaskError,
    TaskRejected,
)
from flowserve.shell import health, service
from flowserve.shell.lifecycle import Lifecycle, State
from flowserve.shell.loading import LoadFailed, LoadReason, LoadSpec
from flowserve.shell.service import Identity, TaskExecutorService
from flowserve.shell.start import Start
from flowserve.shell.streams import Streams
from kvtransfer.auth import TokenAuth, call_metadata

TOKEN = "secret"
METADATA = call_metadata(TOKEN)


class Engine:
    """Remembers what it is told; emits what the test says."""

    def __init__(self) -> None:
        self.submitted: list[EngineTask] = []
        self.aborted: list[tuple[str, int]] = []
        self.owners_aborted: list[str] = []
        self.reject: TaskError | None = None
        self.active_tasks = 0
        self.blocks: list[bytes] = []
        self.next = 1
        self.step = 0
        self.snapshots = 0

    def submit(self, task: EngineTask) -> None:
        if self.reject is not None:
            raise TaskRejected(self.reject)
        self.submitted.append(task)

    def abort(self, task_id: str, attempt: int, reason: str) -> None:
        self.aborted.append((task_id, attempt))

    def abort_owner(self, owner: str) -> None:
        self.owners_aborted.append(owner)

    def set_role(self, role: Role) -> None:
        pass

    def load(self) -> LoadReport:
        return LoadReport(step=self.step)

    def snapshot_kv_events(self) -> KVEvents:
        self.snapshots += 1
        return KVEvents(self.next, stored=list(self.blocks), cleared=True)

    def store(self, blocks: Iterable[bytes]) -> KVEvents:
        events = KVEvents(self.next, stored=list(blocks))
        self.blocks.extend(events.stored)
        self.next += len(events.stored)
        return events


class FakeModel:
    def __init__(self, spec: LoadSpec) -> None:
        self.spec = spec
        self.engine = Engine()
        self.num_blocks, self.block_tokens, self.max_model_len = 10, 16, 100
        self.load_seconds = 0.0
        self.start = Start("warm", {"te_load": 0.1}, 1.0)

        self.can_sleep = True

    def sleep(self) -> FakeModel:
        return self


class Shell:
    """A served TaskExecutor; `emit` stands for the engine's thread."""

    def __init__(self) -> None:
        self.streams = Streams(max_streams=3)
        self.exits = 0
        self.failure: LoadFailed | None = None
        self.lifecycle = Lifecycle(
            self,
            role=Role.COLOCATED,
            on_model=lambda model: self.streams.restart_kv("load"),
            on_sleep=self._let_go,
            on_change=self.streams.poke,
            transfers_left=lambda: 0,
        )
        self.service = TaskExecutorService(
            Identity("te-0", "inc", "host:1"),
            self.lifecycle,
            self.streams,
            record=lambda: pb.ExecutorRecord(te_id="te-0"),
            on_exit=self._exit,
        )
        self.address = ""

    def __call__(self, spec: LoadSpec, role: Role) -> Any:
        if self.failure is not None:
            raise self.failure
        return FakeModel(spec)

    def wake(self, asleep: Any, spec: LoadSpec, role: Role) -> Any:
        return asleep

    def preload_weights(self, spec: LoadSpec) -> str:
        if self.failure is not None:
            raise self.failure
        return "built"

    async def _let_go(self) -> None:
        pass

    def _exit(self) -> None:
        self.exits += 1

    @property
    def engine(self) -> Engine:
        engine: Any = self.lifecycle.model and self.lifecycle.model.engine
        assert isinstance(engine, Engine)
        return engine

    async def load(self) -> None:
        await self.lifecycle.load_model(LoadSpec("m@1", "/m"))

    def emit(self, deltas: list[TaskDelta] | None = None, kv: KVEvents | None = None) -> None:
        """From another thread, as the engine does."""
        loop, event = asyncio.get_running_loop(), StepEvent(deltas or [], kv)
        thread = threading.Thread(target=loop.call_soon_threadsafe, args=(self.streams.dispatch, event))
        thread.start()
        thread.join()


@pytest.fixture
async def shell() -> AsyncIterator[Shell]:
    shell = Shell()
    server = grpc.aio.server(interceptors=[TokenAuth(TOKEN, exempt=(health.METHODS,))])
    worker_pb2_grpc.add_TaskExecutorServicer_to_server(shell.service, server)
    health.add_to_server(server, lambda: True, lambda: shell.lifecycle.state is State.READY)
    shell.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    yield shell
    await server.stop(0)


class Gateway:
    """A raw stream: what is sent and read is up to the test."""

    def __init__(self, channel: grpc.aio.Channel, call: Any) -> None:
        self.stub = worker_pb2_grpc.TaskExecutorStub(channel)
        self.call = call

    async def send(self, **kwargs: Any) -> None:
        await self.call.write(pb.TasksRequest(**kwargs))

    async def read(self, timeout: float = 5.0) -> pb.TasksResponse:
        async with asyncio.timeout(timeout):
            response = await self.call.read()
        assert response is not grpc.aio.EOF, await self.call.details()
        return response

    async def step(self) -> pb.StepEvent:
        """The next message with more than a load report."""
        while True:
            step = (await self.read()).step
            if step.deltas or step.HasField("kv_events"):
                return step

    async def delta(self) -> pb.TaskDelta:
        while True:
            step = await self.step()
            if step.deltas:
                assert len(step.deltas) == 1
                return step.deltas[0]

    async def status(self) -> tuple[grpc.StatusCode, str]:
        """How the call ended."""
        async with asyncio.timeout(5):
            with contextlib.suppress(grpc.aio.AioRpcError):
                while await self.call.read() is not grpc.aio.EOF:
                    pass
            return await self.call.code(), await self.call.details()


@asynccontextmanager
async def gateway(
    shell: Shell, incarnation: str = "g1", *, hello: bool = True, metadata: Any = METADATA
) -> AsyncIterator[Gateway]:
    async with grpc.aio.insecure_channel(shell.address) as channel:
        call: Any = worker_pb2_grpc.TaskExecutorStub(channel).Tasks(metadata=metadata)
        gate = Gateway(channel, call)
        if hello:
            await gate.send(hello=pb.Hello(gateway_id="gw-0", incarnation=incarnation))
            assert (await gate.read()).WhichOneof("message") == "welcome"
        yield gate
        call.cancel()


async def until(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


def submit(task_id: str = "t", **kwargs: Any) -> pb.SubmitTask:
    values: dict[str, Any] = {
        "attempt": 1,
        "kind": cpb.TASK_KIND_UNIFIED,
        "model_revision": "m@1",
        "prompt_tokens": b"\1\0\0\0",
        "sampling": cpb.SamplingParams(top_p=1, repetition_penalty=1),
        "max_output_tokens": 4,
    }
    return pb.SubmitTask(task_id=task_id, **{**values, **kwargs})


# -- opening -------------------------------------------------------------------------------------


async def test_welcome_says_who_answers_and_what_is_loaded(shell: Shell) -> None:
    await shell.load()
    async with gateway(shell, hello=False) as gate:
        await gate.send(hello=pb.Hello(gateway_id="gw-0", incarnation="g1"))
        welcome = (await gate.read()).welcome
    assert (welcome.te_id, welcome.incarnation, welcome.model_revision) == ("te-0", "inc", "m@1")
    assert welcome.load.role == cpb.ROLE_COLOCATED


@pytest.mark.parametrize(
    ("metadata", "code", "says"),
    [
        ((), grpc.StatusCode.UNAUTHENTICATED, "token"),
        (call_metadata("wrong"), grpc.StatusCode.UNAUTHENTICATED, "token"),
        ((METADATA[0],), grpc.StatusCode.FAILED_PRECONDITION, "protocol version"),
        ((METADATA[0], ("x-deepflow-protocol", "99")), grpc.StatusCode.FAILED_PRECONDITION, "'99'"),
    ],
)
async def test_streams_without_credential_or_protocol_are_refused(
    shell: Shell, metadata: Any, code: grpc.StatusCode, says: str
) -> None:
    async with gateway(shell, hello=False, metadata=metadata) as gate:
        got, details = await gate.status()
    assert got is code and says in details


@pytest.mark.parametrize(
    "first",
    [
        {"abort": pb.AbortTask()},
        {"hello": pb.Hello()},
        {"hello": pb.Hello(gateway_id="g", incarnation="x" * 300)},
        {},
    ],
)
async def test_the_first_message_must_be_a_proper_hello(shell: Shell, first: Any) -> None:
    async with gateway(shell, hello=False) as gate:
        await gate.send(**first)
        assert (await gate.status())[0] is grpc.StatusCode.INVALID_ARGUMENT
    assert len(shell.streams) == 0


async def test_a_silent_stream_is_closed(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "HELLO_SECONDS", 0.05)
    async with gateway(shell, hello=False) as gate:
        assert (await gate.status())[0] is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_second_hello_ends_the_stream(shell: Shell) -> None:
    async with gateway(shell) as gate:
        await gate.send(hello=pb.Hello(gateway_id="gw-0", incarnation="g1"))
        assert (await gate.status())[0] is grpc.StatusCode.INVALID_ARGUMENT


async def test_streams_are_bounded(shell: Shell) -> None:
    async with gateway(shell, "a"), gateway(shell, "b"), gateway(shell, "c"):
        async with gateway(shell, hello=False) as gate:
            await gate.send(hello=pb.Hello(gateway_id="gw-0", incarnation="d"))
            assert (await gate.status())[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
        async with gateway(shell, "a"):  # replaces one
            assert len(shell.streams) == 3


# -- ending --------------------------------------------------------------------------------------


async def test_a_lost_stream_aborts_its_tasks(shell: Shell) -> None:
    await shell.load()
    async with gateway(shell) as gate:
        await gate.send(submit=submit())
        await until(lambda: shell.engine.submitted)
        owner = shell.engine.submitted[0].owner
        assert owner.startswith("gw-0/g1")
    await until(lambda: shell.engine.owners_aborted == [owner])
    assert len(shell.streams) == 0


async def test_a_half_closed_stream_ends_too(shell: Shell) -> None:
    await shell.load()
    async with gateway(shell) as gate:
        await gate.call.done_writing()
        assert (await gate.status())[0] is grpc.StatusCode.OK
    assert len(shell.streams) == 0 and len(shell.engine.owners_aborted) == 1


async def test_a_second_stream_of_a_gateway_replaces_the_first(shell: Shell) -> None:
    await shell.load()
    async with gateway(shell) as old:
        await old.send(submit=submit("a"))
        await until(lambda: shell.engine.submitted)
        async with gateway(shell) as new:
            first = shell.engine.submitted[0].owner
            assert shell.engine.owners_aborted == [first]
            code, details = await old.status()
            assert code is grpc.StatusCode.ABORTED and "replaced" in details
            await new.send(submit=submit("b"))
            await until(lambda: len(shell.engine.submitted) == 2)
            second = shell.engine.submitted[1].owner
            assert second != first and len(shell.streams) == 1
            # what the engine still says of the first stream's tasks is nobody's
            shell.emit(
                [
                    TaskDelta("a", 1, first, finish=FinishReason.ABORTED),
                    TaskDelta("b", 1, second, tokens=[5]),
                ]
            )
            assert (await new.delta()).task_id == "b"
    await until(lambda: shell.engine.owners_aborted[-1] == second)
    assert second not in shell.engine.owners_aborted[:-1]


# -- submits -------------------------------------------------------------------------------------


async def test_tasks_before_a_model_are_refused_for_elsewhere(shell: Shell) -> None:
    async with gateway(shell) as gate:
        await gate.send(submit=submit())
        delta = await gate.delta()
    assert delta.finish == cpb.FINISH_REASON_ERROR
    assert delta.error.code == cpb.ERROR_CODE_MODEL_NOT_LOADED and delta.error.retryable


async def test_the_engines_refusal_reaches_the_gateway_as_it_is(shell: Shell) -> None:
    await shell.load()
    shell.engine.reject = TaskError(ErrorCode.QUEUE_FULL, "256 tasks", retryable=True)
    async with gateway(shell) as gate:
        await gate.send(submit=submit())
        delta = await gate.delta()
    assert (delta.task_id, delta.attempt) == ("t", 1)
    assert delta.error == cpb.TaskError(code=cpb.ERROR_CODE_QUEUE_FULL, message="256 tasks", retryable=True)


@pytest.mark.parametrize(
    "change",
    [
        {"prompt_tokens": b"\1"},
        {"kind": 77},
        {"sampling": cpb.SamplingParams(temperature=float("nan"), top_p=1, repetition_penalty=1)},
    ],
)
async def test_a_malformed_submit_costs_itself_and_not_the_stream(shell: Shell, change: Any) -> None:
    await shell.load()
    async with gateway(shell) as gate:
        await gate.send(submit=submit("bad", **change))
        delta = await gate.delta()
        assert delta.error.code == cpb.ERROR_CODE_INVALID_ARGUMENT and not delta.error.retryable
        await gate.send(submit=submit("good"))
        await until(lambda: shell.engine.submitted)
    assert [task.task_id for task in shell.engine.submitted] == ["good"]


async def test_a_timeout_becomes_a_deadline_on_the_engines_clock(shell: Shell) -> None:
    await shell.load()
    async with gateway(shell) as gate:
        await gate.send(submit=submit(timeout_ms=5000))
        await until(lambda: shell.engine.submitted)
    deadline = shell.engine.submitted[0].deadline
    assert deadline is not None and 4 < deadline - time.monotonic() <= 5


async def test_aborts_reach_the_engine(shell: Shell) -> None:
    await shell.load()
    async with gateway(shell) as gate:
        await gate.send(abort=pb.AbortTask(task_id="t", attempt=3))
        await until(lambda: shell.engine.aborted == [("t", 3)])


# -- events --------------------------------------------------------------------------------------


async def test_an_idle_stream_hears_of_the_load_every_second(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "LOAD_EVERY_SECONDS", 0.05)
    await shell.load()
    async with gateway(shell) as gate:
        started = time.monotonic()
        for _ in range(4):
            while not (await gate.read()).step.HasField("load"):
                pass
        assert 0.1 < time.monotonic() - started < 2


async def test_a_change_of_state_or_role_is_told_at_once(shell: Shell) -> None:
    await shell.load()
    async with gateway(shell) as gate:
        await gate.step()  # the snapshot
        shell.lifecycle.set_role(Role.DECODE, 4)
        started = time.monotonic()
        while (load := (await gate.read()).step.load).role_epoch != 4:
            pass
        assert load.role == cpb.ROLE_DECODE and time.monotonic() - started < 0.5
        await shell.lifecycle.drain(0)
        while not (await gate.read()).step.load.draining:
            pass


async def test_a_gateway_that_does_not_read_gets_few_large_messages_and_loses_nothing(shell: Shell) -> None:
    await shell.load()
    total = 30_000
    async with gateway(shell) as gate:
        await gate.send(submit=submit())
        await until(lambda: shell.engine.submitted)
        owner = shell.engine.submitted[0].owner
        for start in range(0, total, 10):
            shell.streams.dispatch(
                StepEvent(
                    [TaskDelta("t", 1, owner, start_index=start, tokens=list(range(start, start + 10)))]
                )
            )
            if start % 500 == 0:
                await asyncio.sleep(0)
        shell.emit([TaskDelta("t", 1, owner, finish=FinishReason.LENGTH)])
        tokens: list[int] = []
        messages = 0
        while True:
            delta = await gate.delta()
            if delta.tokens:
                assert delta.start_index == len(tokens)
            tokens.extend(delta.tokens)
            messages += 1
            if delta.finish:
                break
    assert tokens == list(range(total))
    assert messages < total / 10 / 4


async def test_blocks_come_as_a_snapshot_then_exactly(shell: Shell) -> None:
    async with gateway(shell) as gate:
        await shell.load()
        engine = shell.engine
        first = (await gate.step()).kv_events
        assert first.cleared and not first.stored  # of the model that was loaded just now
        shell.emit(kv=engine.store([b"a" * 16, b"b" * 16]))
        more = (await gate.step()).kv_events
        assert not more.cleared and more.sequence == first.sequence
        assert list(more.stored) == [b"a" * 16, b"b" * 16]
    async with gateway(shell, "g2") as gate:
        again = (await gate.step()).kv_events
        assert again.cleared and list(again.stored) == engine.blocks and again.sequence == engine.next


async def test_a_gap_of_block_events_heals_by_a_snapshot(shell: Shell) -> None:
    await shell.load()
    async with gateway(shell) as gate:
        await gate.step()
        engine = shell.engine
        engine.store([b"a" * 16])  # lost
        shell.emit(kv=engine.store([b"b" * 16]))
        healed = (await gate.step()).kv_events
        assert healed.cleared and list(healed.stored) == engine.blocks
    assert engine.snapshots == 2


# -- the leader's calls --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        (LoadReason.NOT_FOUND, grpc.StatusCode.NOT_FOUND),
        (LoadReason.UNSUPPORTED, grpc.StatusCode.INVALID_ARGUMENT),
        (LoadReason.NO_MEMORY, grpc.StatusCode.RESOURCE_EXHAUSTED),
        (LoadReason.INTERNAL, grpc.StatusCode.INTERNAL),
    ],
)
async def test_failed_loads_have_a_status(shell: Shell, reason: LoadReason, code: grpc.StatusCode) -> None:
    shell.failure = LoadFailed(reason, "because")
    async with gateway(shell) as gate:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await gate.stub.LoadModel(pb.LoadModelRequest(model_revision="m@1", path="/m"), metadata=METADATA)
    assert error.value.code() is code and "because" in str(error.value.details())
    assert shell.lifecycle.state is State.WARM


async def test_stale_and_unknown_roles_are_refused(shell: Shell) -> None:
    async with gateway(shell) as gate:

        async def set_role(role: Any, epoch: int) -> pb.SetRoleResponse:
            return await gate.stub.SetRole(pb.SetRoleRequest(role=role, epoch=epoch), metadata=METADATA)

        answer = await set_role(cpb.ROLE_PREFILL, 2)
        assert (answer.role, answer.epoch) == (cpb.ROLE_PREFILL, 2)
        for role, epoch, code in (
            (cpb.ROLE_DECODE, 1, grpc.StatusCode.FAILED_PRECONDITION),
            (cpb.ROLE_UNSPECIFIED, 3, grpc.StatusCode.INVALID_ARGUMENT),
            (44, 3, grpc.StatusCode.INVALID_ARGUMENT),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await set_role(role, epoch)
            assert error.value.code() is code


async def test_drain_answers_what_is_left_and_exits_only_if_asked(shell: Shell) -> None:
    await shell.load()
    shell.engine.active_tasks = 2
    async with gateway(shell) as gate:
        answer = await gate.stub.Drain(pb.DrainRequest(timeout_ms=30), metadata=METADATA)
        assert (answer.drained, answer.tasks_left, shell.exits) == (False, 2, 0)
        shell.engine.active_tasks = 0
        answer = await gate.stub.Drain(pb.DrainRequest(timeout_ms=30, exit=True), metadata=METADATA)
        assert answer.drained and shell.exits == 1


async def test_health_needs_no_credential_and_tells_readiness(shell: Shell) -> None:
    async with grpc.aio.insecure_channel(shell.address) as channel:
        check = channel.unary_unary(health.METHODS + "Check")
        assert await check(b"") == health.SERVING
        name = health.READINESS.encode()
        request = bytes([0x0A, len(name)]) + name
        assert await check(request) == health.NOT_SERVING
        await shell.load()
        assert await check(request) == health.SERVING
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await check(b"\x0a\x01x")
        assert error.value.code() is grpc.StatusCode.NOT_FOUND
