"""A fake worker: speaks the worker protocol over real gRPC, and makes tokens up at a set pace.

For tests of the control plane and for benches of the gateway alone; there is no model in it. Token `i` of
an answer is a hash of (prompt, seed, i), so whoever puts attempts together wrongly is found out. Prefill
tasks hand over, decode tasks "pull" by telling the sender so (KVTransfer.Finish), tasks share a prefix
cache of block identities that is announced as exact KV events, and the record in Redis is kept alive.
Faults are set on `source.faults` while it runs. As a process: `python -m tests.fakes.token_source --help`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import secrets
import struct
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import uvloop
from deepflow.v1 import (
    common_pb2,
    kvtransfer_pb2,
    kvtransfer_pb2_grpc,
    worker_pb2,
    worker_pb2_grpc,
)
from redis.asyncio import Redis
from redis.exceptions import RedisError

from controlplane.fleet.registry import heed_cancellation
from kvtransfer.auth import PROTOCOL_VERSION, TokenAuth, call_metadata
from kvtransfer.blockhash import block_hashes, chain_seed
from kvtransfer.channel import SERVER_OPTIONS, open_channel
from kvtransfer.framed import StreamServer

VOCABULARY = 32_000
BLOCK_TOKENS = 16
REPORT_SECONDS = 0.25
LEASE_SECONDS = 10.0
HEARTBEAT_SECONDS = 1.0
RECORD_MILLISECONDS = 10_000
STEPS_AHEAD = 2
"""At full speed a stream's tasks wait once so many steps are unsent, as an engine's outbox merges."""

ROLES = {
    "colocated": common_pb2.ROLE_COLOCATED,
    "prefill": common_pb2.ROLE_PREFILL,
    "decode": common_pb2.ROLE_DECODE,
}
Key = tuple[str, int]


def token_at(prompt: Sequence[int], index: int, seed: int = 0) -> int:
    """What every token source says at output index `index`."""
    return _token(np.asarray(prompt, dtype="<u4").tobytes(), index, seed)


def answer(prompt: Sequence[int], count: int, seed: int = 0) -> list[int]:
    """The first `count` tokens of the undisturbed answer."""
    return [token_at(prompt, index, seed) for index in range(count)]


def _token(prompt: bytes, index: int, seed: int) -> int:
    digest = hashlib.blake2b(prompt, digest_size=8, key=struct.pack("<QQ", seed, index)).digest()
    return int.from_bytes(digest, "little") % VOCABULARY


@dataclass
class Faults:
    """What goes wrong; change it at any time."""

    submit_error: int = 0  # ErrorCode that every submit is answered with
    submit_errors_left: int = 1 << 30
    error_after: int | None = None  # an attempt fails once it has made so many tokens
    error_code: int = common_pb2.ERROR_CODE_INTERNAL
    error_retryable: bool = True
    die_after: int | None = None  # the whole source, once it has made so many tokens
    stall: bool = False  # no tokens; reports go on
    stall_after: int | None = None  # an attempt falls silent after so many tokens
    silent: bool = False  # nothing at all is sent
    duplicates: int = 0  # every delta again, with so many earlier tokens in front
    skip_token: bool = False  # a hole in the indexes
    pull_fails: bool = False
    pull_seconds: float = 0.0
    hung: bool = False  # the step loop does not turn, says the load report


@dataclass
class _Task:
    submit: worker_pb2.SubmitTask
    stream: _Stream
    ready_at: float
    output: int  # tokens so far, over all attempts
    made: int = 0  # by this attempt
    cached: int = 0
    started: float = 0.0
    announced: bool = False

    @property
    def key(self) -> Key:
        return (self.submit.task_id, self.submit.attempt)

    @property
    def prompt(self) -> int:
        return len(self.submit.prompt_tokens) // 4


@dataclass(eq=False)
class _Stream:
    hello: worker_pb2.Hello
    outbox: asyncio.Queue[worker_pb2.TasksResponse] = field(default_factory=asyncio.Queue)


class TokenSource(worker_pb2_grpc.TaskExecutorServicer, kvtransfer_pb2_grpc.KVTransferServicer):
    """`async with TokenSource(...) as source:`; the server is up and registered inside."""

    def __init__(
        self,
        te_id: str,
        *,
        revision: str = "model@1",
        role: str = "colocated",
        redis_url: str = "",
        token: str = "secret",
        token_seconds: float = 0.002,
        prefill_tokens_per_second: float = 1e6,
        max_tasks: int = 256,
        kv_blocks: int = 4096,
        max_model_len: int = 1 << 20,
        exit_on_death: bool = False,
        kv_events: bool = True,
        plain_stream: bool = True,
    ) -> None:
        """`token_seconds`: one token per task in so much; 0: as fast as the streams take them. `max_tasks`:
        beyond, QUEUE_FULL. Without `kv_events` prompts are not hashed: for benches of the gateway."""
        self.te_id, self.revision, self.role, self.token = te_id, revision, role, token
        self.incarnation = secrets.token_hex(6)
        self.redis_url = redis_url
        self.token_seconds = token_seconds
        self.prefill_rate = prefill_tokens_per_second
        self.max_tasks, self.kv_blocks, self.max_model_len = max_tasks, kv_blocks, max_model_len
        self.faults = Faults()
        self.state = worker_pb2.EXECUTOR_STATE_READY
        self.role_epoch = 0
        self.draining = False
        # What tests look at.
        self.submits: list[worker_pb2.SubmitTask] = []
        self.aborts: list[worker_pb2.AbortTask] = []
        self.offers: dict[str, tuple[Key, _Stream, float]] = {}
        self.released: list[tuple[str, str]] = []
        self.tasks: dict[Key, _Task] = {}
        self.tokens_made = 0
        self._exit_on_death = exit_on_death
        self._kv_events = kv_events
        self._work = asyncio.Event()
        self._streams: set[_Stream] = set()
        self._held: OrderedDict[bytes, None] = OrderedDict()
        self._kv_sequence = 1
        self._step = 0
        self._port = 0
        self._server: grpc.aio.Server | None = None
        self._plain_stream = plain_stream
        self._tasks_server: StreamServer[worker_pb2.TasksRequest] | None = None
        self._tasks_port = 0
        self._loops: list[asyncio.Task[None]] = []
        self._pulls: set[asyncio.Task[None]] = set()

    # -- life ------------------------------------------------------------------------------------

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._port}"

    @property
    def tasks_address(self) -> str:
        """Of the Tasks stream without gRPC."""
        return f"127.0.0.1:{self._tasks_port}" if self._plain_stream else ""

    async def __aenter__(self) -> TokenSource:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        self._server = grpc.aio.server(interceptors=[TokenAuth(self.token)], options=SERVER_OPTIONS)
        worker_pb2_grpc.add_TaskExecutorServicer_to_server(self, self._server)
        kvtransfer_pb2_grpc.add_KVTransferServicer_to_server(self, self._server)
        self._port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        if self._plain_stream:
            self._tasks_server = StreamServer(
                self.Tasks, worker_pb2.TasksRequest.FromString, token=self.token
            )
            self._tasks_port = await self._tasks_server.start("127.0.0.1")
        self._loops = [asyncio.create_task(self._run())]
        if self.redis_url:
            self._loops.append(asyncio.create_task(self._register()))

    async def stop(self) -> None:
        """In order: the record is taken back."""
        await self.crash()
        if self.redis_url:
            with contextlib.suppress(RedisError, OSError):
                async with Redis.from_url(self.redis_url) as redis:
                    await redis.srem("deepflow:te:ids", self.te_id)
                    await redis.delete(f"deepflow:te:{self.te_id}")

    async def crash(self) -> None:
        """As kill -9 would: streams break, the record stays until its lease ends."""
        me = asyncio.current_task()
        others = [task for task in (*self._loops, *self._pulls) if task is not me]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        if self._tasks_server is not None:
            await self._tasks_server.stop()
            self._tasks_server = None
        if self._server is not None:
            await self._server.stop(None)
            self._server = None
        self.tasks.clear()
        self.offers.clear()

    async def drop_streams(self) -> None:
        """Every gateway's stream breaks; the server stays."""
        for stream in list(self._streams):
            stream.outbox.put_nowait(worker_pb2.TasksResponse())

    async def idle(self, seconds: float = 5.0) -> None:
        """Waits until nothing is left here: no task, no offer. Raises TimeoutError."""
        async with asyncio.timeout(seconds):
            while self.tasks or self.offers:
                await asyncio.sleep(0.01)

    def record(self) -> worker_pb2.ExecutorRecord:
        return worker_pb2.ExecutorRecord(
            te_id=self.te_id,
            incarnation=self.incarnation,
            address=self.address,
            state=self.state,
            model_revision=self.revision,
            device="none",
            role=ROLES[self.role],
            role_epoch=self.role_epoch,
            kv_blocks=self.kv_blocks,
            block_tokens=BLOCK_TOKENS,
            max_model_len=self.max_model_len,
            dtype="none",
            pid=os.getpid(),
            host="localhost",
            max_tasks=self.max_tasks,
            protocol_version=PROTOCOL_VERSION,
            started_unix_ms=int(time.time() * 1000),
            tasks_address=self.tasks_address,
        )

    async def register_once(self, redis: Redis) -> None:
        await redis.set(
            f"deepflow:te:{self.te_id}", self.record().SerializeToString(), px=RECORD_MILLISECONDS
        )
        await redis.sadd("deepflow:te:ids", self.te_id)
        await redis.publish("deepflow:te:events", self.te_id)

    async def _register(self) -> None:
        # No socket timeout: with one, redis-py sends through asyncio.wait_for, which until Python 3.12 loses
        # a cancellation that arrives as the send completes.
        redis = Redis.from_url(self.redis_url, socket_timeout=None)
        try:
            while True:
                with contextlib.suppress(RedisError, OSError, TimeoutError):
                    async with asyncio.timeout(1):
                        await self.register_once(redis)
                heed_cancellation()
                await asyncio.sleep(HEARTBEAT_SECONDS)
        finally:
            await redis.aclose()

    # -- the engine ------------------------------------------------------------------------------

    async def _run(self) -> None:
        reported = 0.0
        while True:
            if self.token_seconds:
                await asyncio.sleep(self.token_seconds)
            else:
                await self._until_work()
            now = time.monotonic()
            self._step += 1
            for transfer_id, (_, _, until) in list(self.offers.items()):
                if now > until:
                    self._release(transfer_id, "expired")
            if self.faults.silent:
                continue
            events: dict[_Stream, list[worker_pb2.TaskDelta]] = {}
            for task in list(self.tasks.values()):
                if not self.token_seconds and task.stream.outbox.qsize() >= STEPS_AHEAD:
                    continue
                delta = self._advance(task, now)
                if delta is not None:
                    events.setdefault(task.stream, []).append(delta)
            if self.faults.die_after is not None and self.tokens_made >= self.faults.die_after:
                if self._exit_on_death:
                    os._exit(9)
                await self.crash()
                return
            if now - reported >= REPORT_SECONDS:
                reported = now
                for stream in self._streams:
                    events.setdefault(stream, [])
            load = self.load()
            for stream, deltas in events.items():
                self._send(stream, worker_pb2.StepEvent(deltas=deltas, load=load))

    async def _until_work(self) -> None:
        """At full speed: until a task came or a stream took a step, or it is time for a report."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(REPORT_SECONDS):
                await self._work.wait()
        self._work.clear()
        await asyncio.sleep(0)  # what else arrived in this turn goes into the same step

    def _advance(self, task: _Task, now: float) -> worker_pb2.TaskDelta | None:
        """One step of one task."""
        faults, submit = self.faults, task.submit
        stalled = faults.stall or (faults.stall_after is not None and task.made >= faults.stall_after)
        if now < task.ready_at or stalled:
            return None
        if faults.error_after is not None and task.made >= faults.error_after:
            return self._finish(task, error=(faults.error_code, "told to fail", faults.error_retryable))
        if not task.started:
            task.started = now
            self._remember(task)
        seed = submit.sampling.seed
        delta = worker_pb2.TaskDelta(task_id=submit.task_id, attempt=submit.attempt, start_index=task.output)
        again = min(faults.duplicates, task.made)
        token = _token(submit.prompt_tokens, task.output, seed)
        if faults.skip_token and task.made == 1:
            delta.start_index += 1
        delta.start_index -= again
        delta.tokens.extend(
            _token(submit.prompt_tokens, index, seed) for index in range(task.output - again, task.output + 1)
        )
        if submit.sampling.HasField("logprobs"):
            delta.logprobs.extend(_logprobs(each, submit.sampling.logprobs) for each in delta.tokens)
        if not task.announced:
            task.announced = True
            delta.cached_tokens = task.cached
        task.output += 1
        task.made += 1
        self.tokens_made += 1
        if token in submit.sampling.stop_token_ids and task.output > submit.sampling.min_tokens:
            delta.finish = common_pb2.FINISH_REASON_STOP
        elif task.output >= submit.max_output_tokens:
            delta.finish = common_pb2.FINISH_REASON_LENGTH
        elif submit.kind == common_pb2.TASK_KIND_PREFILL:
            delta.finish = common_pb2.FINISH_REASON_HANDOVER
            self._offer(task, delta, now)
        if delta.finish:
            delta.timings.compute_seconds = now - task.started
            self.tasks.pop(task.key, None)
        if faults.duplicates and not delta.finish:
            step = worker_pb2.StepEvent(deltas=[delta])
            self._send(task.stream, step)
        return delta

    def _offer(self, task: _Task, delta: worker_pb2.TaskDelta, now: float) -> None:
        transfer_id = f"{task.submit.task_id}.{task.submit.attempt}"
        self.offers[transfer_id] = (task.key, task.stream, now + LEASE_SECONDS)
        delta.handover.CopyFrom(
            worker_pb2.Handover(
                source=common_pb2.KVSource(
                    transfer_id=transfer_id,
                    te_id=self.te_id,
                    incarnation=self.incarnation,
                    address=self.address,
                ),
                length=task.prompt + task.output - 1,
                lease_ms=int(LEASE_SECONDS * 1000),
                processor_state=b"after the first token",
            )
        )

    def _finish(self, task: _Task, error: tuple[int, str, bool]) -> worker_pb2.TaskDelta:
        self.tasks.pop(task.key, None)
        return _error(task.submit, *error, start=task.output)

    def _release(self, transfer_id: str, outcome: str) -> bool:
        if self.offers.pop(transfer_id, None) is None:
            return False
        self.released.append((transfer_id, outcome))
        return True

    def _blocks_used(self) -> int:
        return sum(-(-(task.prompt + task.output) // BLOCK_TOKENS) for task in self.tasks.values())

    def load(self) -> common_pb2.LoadReport:
        waiting = [task for task in self.tasks.values() if not task.started]
        free = max(0, self.kv_blocks - self._blocks_used())
        return common_pb2.LoadReport(
            step=self._step,
            waiting=len(waiting),
            running=len(self.tasks) - len(waiting),
            queued_prefill_tokens=sum(max(0, task.prompt - task.cached) for task in waiting),
            kv_blocks_total=self.kv_blocks,
            kv_blocks_free=free,
            kv_blocks_cached=min(free, len(self._held)),
            prefill_tokens_per_second=self.prefill_rate,
            decode_step_seconds=self.token_seconds,
            transfers_out=len(self.offers),
            role=ROLES[self.role],
            role_epoch=self.role_epoch,
            draining=self.draining,
            age_seconds=3600.0 if self.faults.hung else 0.0,
        )

    # -- prefix cache ----------------------------------------------------------------------------

    def _identities(self, submit: worker_pb2.SubmitTask) -> list[bytes]:
        tokens = np.frombuffer(submit.prompt_tokens, "<u4")
        seed = chain_seed(submit.model_revision, submit.adapter_id, submit.cache_salt)
        return block_hashes(tokens.tolist(), seed, BLOCK_TOKENS)

    def _cached(self, submit: worker_pb2.SubmitTask) -> int:
        depth = 0
        for identity in self._identities(submit):
            if identity not in self._held:
                break
            depth += 1
        return max(0, min(depth * BLOCK_TOKENS, len(submit.prompt_tokens) // 4 - 1))

    def _remember(self, task: _Task) -> None:
        if not self._kv_events:
            return
        stored = [identity for identity in self._identities(task.submit) if identity not in self._held]
        if not stored:
            return
        for identity in stored:
            self._held[identity] = None
        removed = []
        while len(self._held) > self.kv_blocks:
            removed.append(self._held.popitem(last=False)[0])
        events = worker_pb2.KVEvents(sequence=self._kv_sequence, stored=stored, removed=removed)
        self._kv_sequence += len(stored) + len(removed)
        for stream in self._streams:
            self._send(stream, worker_pb2.StepEvent(kv_events=events))

    # -- TaskExecutor ----------------------------------------------------------------------------

    async def Tasks(
        self, request_iterator: AsyncIterator[worker_pb2.TasksRequest], context: Any
    ) -> AsyncIterator[worker_pb2.TasksResponse]:
        first = await anext(request_iterator)
        stream = _Stream(first.hello)
        welcome = worker_pb2.Welcome(
            te_id=self.te_id, incarnation=self.incarnation, model_revision=self.revision, load=self.load()
        )
        yield worker_pb2.TasksResponse(welcome=welcome)
        self._streams.add(stream)
        snapshot = worker_pb2.KVEvents(sequence=self._kv_sequence, stored=list(self._held), cleared=True)
        self._send(stream, worker_pb2.StepEvent(kv_events=snapshot))
        reader = asyncio.create_task(self._read(stream, request_iterator))
        try:
            while True:
                response = await stream.outbox.get()
                self._work.set()
                if response.WhichOneof("message") is None or self._server is None:
                    return
                if not self.faults.silent:
                    yield response
        finally:
            reader.cancel()
            self._streams.discard(stream)
            for key in [key for key, task in self.tasks.items() if task.stream is stream]:
                del self.tasks[key]
            for transfer_id in [tid for tid, (_, owner, _) in self.offers.items() if owner is stream]:
                self._release(transfer_id, "owner_lost")

    async def _read(self, stream: _Stream, requests: AsyncIterator[worker_pb2.TasksRequest]) -> None:
        with contextlib.suppress(grpc.RpcError, asyncio.CancelledError):
            async for request in requests:
                if request.WhichOneof("message") == "submit":
                    self._submit(stream, request.submit)
                elif request.WhichOneof("message") == "abort":
                    self._abort(request.abort)
        stream.outbox.put_nowait(worker_pb2.TasksResponse())  # the gateway half-closed: over

    def _submit(self, stream: _Stream, submit: worker_pb2.SubmitTask) -> None:
        self.submits.append(submit)
        refusal = self._refusal(submit)
        if refusal is not None:
            delta = _error(submit, *refusal, start=len(submit.output_tokens) // 4)
            self._send(stream, worker_pb2.StepEvent(deltas=[delta], load=self.load()))
            return
        cached = self._cached(submit) if self._kv_events else 0
        tokens = (len(submit.prompt_tokens) + len(submit.output_tokens)) // 4
        task = _Task(
            submit=submit,
            stream=stream,
            ready_at=time.monotonic() + (tokens - cached) / self.prefill_rate,
            output=len(submit.output_tokens) // 4,
            cached=cached,
        )
        self.tasks[task.key] = task
        self._work.set()
        if submit.kind == common_pb2.TASK_KIND_DECODE:
            task.ready_at = float("inf")
            pull = asyncio.create_task(self._pull(task))
            self._pulls.add(pull)
            pull.add_done_callback(self._pulls.discard)

    def _refusal(self, submit: worker_pb2.SubmitTask) -> tuple[int, str, bool] | None:
        faults = self.faults
        if faults.submit_error and faults.submit_errors_left > 0:
            faults.submit_errors_left -= 1
            return faults.submit_error, "told to refuse", False
        if self.draining:
            return common_pb2.ERROR_CODE_DRAINING, "draining", True
        if submit.model_revision != self.revision:
            return common_pb2.ERROR_CODE_MODEL_NOT_LOADED, f"{self.revision} is loaded", True
        if len(self.tasks) >= self.max_tasks:
            return common_pb2.ERROR_CODE_QUEUE_FULL, f"{len(self.tasks)} tasks", True
        if (submit.task_id, submit.attempt) in self.tasks or not submit.attempt:
            return common_pb2.ERROR_CODE_INVALID_ARGUMENT, "this attempt is known", False
        if submit.kind == common_pb2.TASK_KIND_DECODE and not (
            submit.output_tokens and submit.HasField("kv_source")
        ):
            return common_pb2.ERROR_CODE_INVALID_ARGUMENT, "a decode task continues a handover", False
        return None

    async def _pull(self, task: _Task) -> None:
        source = task.submit.kv_source
        await asyncio.sleep(self.faults.pull_seconds)
        message = "told to fail" if self.faults.pull_fails else ""
        if not message:
            finish = kvtransfer_pb2.FinishRequest(
                transfer_id=source.transfer_id, receiver=f"{self.te_id}/{self.incarnation}", ok=True
            )
            try:
                async with open_channel(source.address) as channel:
                    stub = kvtransfer_pb2_grpc.KVTransferStub(channel)
                    reply = await stub.Finish(finish, metadata=call_metadata(self.token), timeout=2)
                    message = "" if reply.first else "the transfer had ended before"
            except grpc.aio.AioRpcError as error:
                message = f"{error.code().name}: {error.details()}"
        if self.tasks.get(task.key) is not task:
            return  # aborted meanwhile
        if message:
            error = (common_pb2.ERROR_CODE_KV_TRANSFER_FAILED, message, True)
            self._send(task.stream, worker_pb2.StepEvent(deltas=[self._finish(task, error)]))
        else:
            task.cached = task.prompt
            task.ready_at = time.monotonic()

    def _abort(self, abort: worker_pb2.AbortTask) -> None:
        self.aborts.append(abort)
        self.tasks.pop((abort.task_id, abort.attempt), None)
        self._release(f"{abort.task_id}.{abort.attempt}", "withdrawn")

    def _send(self, stream: _Stream, step: worker_pb2.StepEvent) -> None:
        stream.outbox.put_nowait(worker_pb2.TasksResponse(step=step))

    async def LoadModel(self, request: Any, context: Any) -> worker_pb2.LoadModelResponse:
        self.revision, self.state = request.model_revision, worker_pb2.EXECUTOR_STATE_READY
        return worker_pb2.LoadModelResponse(
            model_revision=self.revision,
            kv_blocks=self.kv_blocks,
            block_tokens=BLOCK_TOKENS,
            max_model_len=self.max_model_len,
        )

    async def SetRole(self, request: Any, context: Any) -> worker_pb2.SetRoleResponse:
        if request.epoch < self.role_epoch:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "stale epoch")
        self.role = next(name for name, value in ROLES.items() if value == request.role)
        self.role_epoch = request.epoch
        return worker_pb2.SetRoleResponse(role=request.role, epoch=request.epoch)

    async def Preload(self, request: Any, context: Any) -> worker_pb2.PreloadResponse:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "this stand-in has no weights")
        raise AssertionError("aborted")

    async def Sleep(self, request: Any, context: Any) -> worker_pb2.SleepResponse:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "this stand-in does not sleep")
        raise AssertionError("aborted")

    async def Drain(self, request: Any, context: Any) -> worker_pb2.DrainResponse:
        self.draining = True
        with contextlib.suppress(TimeoutError):
            await self.idle(request.timeout_ms / 1000)
        return worker_pb2.DrainResponse(
            drained=not self.tasks, tasks_left=len(self.tasks), transfers_left=len(self.offers)
        )

    async def GetStatus(self, request: Any, context: Any) -> worker_pb2.ExecutorStatus:
        return worker_pb2.ExecutorStatus(record=self.record(), load=self.load(), tasks=len(self.tasks))

    # -- KVTransfer ------------------------------------------------------------------------------

    async def Finish(self, request: Any, context: Any) -> kvtransfer_pb2.FinishResponse:
        return kvtransfer_pb2.FinishResponse(first=self._release(request.transfer_id, "acked"))


def _logprobs(token: int, top: int) -> worker_pb2.TokenLogprobs:
    """Made up, but each token's own: whoever shifts them against the tokens is found out."""
    return worker_pb2.TokenLogprobs(
        token=token,
        logprob=-token / VOCABULARY,
        rank=1,
        top_tokens=range(token, token + top),
        top_logprobs=[-token / VOCABULARY - i for i in range(top)],
    )


def _error(
    submit: worker_pb2.SubmitTask, code: int, message: str, retryable: bool, *, start: int
) -> worker_pb2.TaskDelta:
    return worker_pb2.TaskDelta(
        task_id=submit.task_id,
        attempt=submit.attempt,
        start_index=start,
        finish=common_pb2.FINISH_REASON_ERROR,
        error=common_pb2.TaskError(code=code, message=message, retryable=retryable),
    )


async def _serve(arguments: argparse.Namespace) -> None:
    source = TokenSource(
        arguments.te_id,
        revision=arguments.revision,
        role=arguments.role,
        redis_url=arguments.redis_url,
        token=os.environ.get("DEEPFLOW_CLUSTER_TOKEN", "secret"),
        token_seconds=arguments.token_seconds,
        prefill_tokens_per_second=arguments.prefill_rate,
        max_tasks=arguments.max_tasks,
        kv_blocks=arguments.kv_blocks,
        exit_on_death=True,
        kv_events=not arguments.no_kv_events,
    )
    source.faults.die_after = arguments.die_after
    async with source:
        if arguments.endpoint_file:
            value = {
                "address": source.address,
                "tasks_address": source.tasks_address,
                "pid": os.getpid(),
                "incarnation": source.incarnation,
            }
            target = Path(arguments.endpoint_file)
            temporary = target.with_suffix(".new")
            temporary.write_text(json.dumps(value))
            temporary.replace(target)
        await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--te-id", default="te-0")
    parser.add_argument("--revision", default="model@1")
    parser.add_argument("--role", choices=sorted(ROLES), default="colocated")
    parser.add_argument("--redis-url", default="")
    parser.add_argument("--token-seconds", type=float, default=0.002, help="one token per task in so much")
    parser.add_argument("--prefill-rate", type=float, default=1e6, help="tokens per second")
    parser.add_argument("--max-tasks", type=int, default=256)
    parser.add_argument("--kv-blocks", type=int, default=4096)
    parser.add_argument("--no-kv-events", action="store_true", help="no prefix cache: no prompt is hashed")
    parser.add_argument("--die-after", type=int, help="exit(9) after so many tokens")
    parser.add_argument("--endpoint-file", default="")
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(_serve(parser.parse_args()))


if __name__ == "__main__":
    main()
