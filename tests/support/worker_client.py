"""A bare client of the worker protocol: drives executors without gateway, job executor or tokenizer.

Benches use it as the "direct" baseline beside the gateway; tests use it to look at one executor alone.
One client is one gateway incarnation: closing it makes the executor drop its tasks.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
import numpy as np
from deepflow.v1 import common_pb2, worker_pb2, worker_pb2_grpc

from kvtransfer.auth import call_metadata
from kvtransfer.channel import open_channel
from kvtransfer.framed import StreamEnded, open_stream
from kvtransfer.tls import Tls

_ids = itertools.count()


@dataclass
class TaskRun:
    """What came back for one task: tokens with the time each event arrived (seconds, perf_counter)."""

    tokens: list[int] = field(default_factory=list)
    arrivals: list[tuple[float, int]] = field(default_factory=list)  # (time, new tokens)
    finish: int = 0
    error: common_pb2.TaskError | None = None
    handover: worker_pb2.Handover | None = None
    cached_tokens: int = 0
    start_indexes: list[int] = field(default_factory=list)


def encode_tokens(tokens: Sequence[int]) -> bytes:
    return np.asarray(tokens, dtype="<u4").tobytes()


class WorkerClient:
    """One Tasks stream to one executor. Use as an async context manager."""

    def __init__(
        self,
        address: str,
        token: str,
        gateway_id: str = "direct",
        *,
        tasks_address: str = "",
        tls: Tls | None = None,
    ) -> None:
        """`tasks_address`: of the stream without gRPC, where that one is to be used."""
        self.address = address
        self._tasks_address = tasks_address
        self._tls = tls
        self._metadata = call_metadata(token)
        self._gateway_id = gateway_id
        self._runs: dict[str, tuple[TaskRun, asyncio.Event, asyncio.Event]] = {}
        self._writing = asyncio.Lock()  # a stream takes one write at a time
        self.welcome: worker_pb2.Welcome | None = None
        self.load: common_pb2.LoadReport | None = None

    async def __aenter__(self) -> WorkerClient:
        options = [("grpc.max_receive_message_length", 64 << 20)]
        self._channel = open_channel(self.address, self._tls, options)
        self.stub = worker_pb2_grpc.TaskExecutorStub(self._channel)
        self._call: Any = self.stub.Tasks(metadata=self._metadata) if not self._tasks_address else None
        if self._call is None:
            self._call = await open_stream(
                self._tasks_address, self._metadata, worker_pb2.TasksResponse.FromString, seconds=10,
                tls=self._tls,
            )  # fmt: skip
        hello = worker_pb2.Hello(gateway_id=self._gateway_id, incarnation=f"{time.time_ns():x}-{next(_ids)}")
        await self._call.write(worker_pb2.TasksRequest(hello=hello))
        self._welcomed = asyncio.Event()
        self._reader = asyncio.create_task(self._read())
        await asyncio.wait_for(self._welcomed.wait(), 10)
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._call.cancel()
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)
        await self._channel.close()

    async def status(self) -> worker_pb2.ExecutorStatus:
        return await self.stub.GetStatus(worker_pb2.GetStatusRequest(), metadata=self._metadata)

    async def set_role(self, role: int, epoch: int) -> worker_pb2.SetRoleResponse:
        return await self.stub.SetRole(
            worker_pb2.SetRoleRequest(role=role, epoch=epoch), metadata=self._metadata
        )

    async def _read(self) -> None:
        try:
            async for response in self._call:
                if response.WhichOneof("message") == "welcome":
                    self.welcome = response.welcome
                    self._welcomed.set()
                    continue
                now = time.perf_counter()
                if response.step.HasField("load"):
                    self.load = response.step.load
                for delta in response.step.deltas:
                    self._apply(delta, now)
        except (grpc.aio.AioRpcError, StreamEnded, OSError):
            pass
        finally:
            for run, done, first in self._runs.values():
                if not run.finish:
                    run.finish = common_pb2.FINISH_REASON_ERROR
                    run.error = common_pb2.TaskError(
                        code=common_pb2.ERROR_CODE_INTERNAL, message="stream lost", retryable=True
                    )
                first.set()
                done.set()

    def _apply(self, delta: worker_pb2.TaskDelta, now: float) -> None:
        entry = self._runs.get(delta.task_id)
        if entry is None:
            return
        run, done, first = entry
        if delta.tokens:
            run.start_indexes.append(delta.start_index)
            run.tokens.extend(delta.tokens)
            run.arrivals.append((now, len(delta.tokens)))
            first.set()
        if delta.HasField("cached_tokens"):
            run.cached_tokens = delta.cached_tokens
        if delta.HasField("handover"):  # also when a prefill says that it has started
            run.handover = delta.handover
        if delta.finish:
            run.finish = delta.finish
            if delta.HasField("error"):
                run.error = delta.error
            first.set()
            done.set()

    async def submit(
        self,
        prompt: Sequence[int],
        *,
        revision: str,
        max_tokens: int,
        kind: int = common_pb2.TASK_KIND_UNIFIED,
        output: Sequence[int] = (),
        kv_source: common_pb2.KVSource | None = None,
        sampling: common_pb2.SamplingParams | None = None,
        task_id: str | None = None,
        attempt: int = 1,
        timeout_ms: int = 0,
        processor_state: bytes = b"",
        cache_salt: bytes = b"",
        tell_start: bool = False,
        early: bool = False,
        prefix_source: worker_pb2.PrefixSource | None = None,
    ) -> tuple[TaskRun, asyncio.Event, asyncio.Event]:
        """Submits a task; returns (run, finished, first token) without waiting for either."""
        task_id = task_id or f"direct-{time.time_ns():x}-{next(_ids)}"
        entry = (TaskRun(), asyncio.Event(), asyncio.Event())
        self._runs[task_id] = entry
        task = worker_pb2.SubmitTask(
            task_id=task_id,
            attempt=attempt,
            kind=kind,  # type: ignore[arg-type]  # an enum value passed around as int
            model_revision=revision,
            prompt_tokens=encode_tokens(prompt),
            output_tokens=encode_tokens(output),
            max_output_tokens=max_tokens,
            sampling=sampling or greedy(),
            kv_source=kv_source,
            timeout_ms=timeout_ms,
            processor_state=processor_state,
            cache_salt=cache_salt,
            tell_start=tell_start,
            early=early,
            prefix_source=prefix_source,
        )
        async with self._writing:
            await self._call.write(worker_pb2.TasksRequest(submit=task))
        return entry

    async def abort(self, task_id: str, attempt: int = 1) -> None:
        abort = worker_pb2.AbortTask(task_id=task_id, attempt=attempt, reason="test")
        async with self._writing:
            await self._call.write(worker_pb2.TasksRequest(abort=abort))

    async def generate(self, prompt: Sequence[int], *, timeout: float = 120, **kwargs: object) -> TaskRun:
        """Submits and waits for the end."""
        run, done, _ = await self.submit(prompt, **kwargs)  # type: ignore[arg-type]  # passed through
        await asyncio.wait_for(done.wait(), timeout)
        return run


def greedy(**kwargs: object) -> common_pb2.SamplingParams:
    values: dict[str, object] = {"temperature": 0.0, "top_p": 1.0, "repetition_penalty": 1.0}
    values.update(kwargs)
    return common_pb2.SamplingParams(**values)  # type: ignore[arg-type]  # keyword passthrough


async def generate_disaggregated(
    prefill: WorkerClient,
    decode: WorkerClient,
    prompt: Sequence[int],
    *,
    revision: str,
    max_tokens: int,
    timeout: float = 120,
    sampling: common_pb2.SamplingParams | None = None,
    cache_salt: bytes = b"",
) -> TaskRun:
    """Prefill on one executor, pull, decode on the other; the merged run of both."""
    task_id = f"pd-{time.time_ns():x}-{next(_ids)}"
    common = {
        "revision": revision,
        "max_tokens": max_tokens,
        "sampling": sampling,
        "task_id": task_id,
        "cache_salt": cache_salt,
    }
    first = await prefill.generate(prompt, timeout=timeout, kind=common_pb2.TASK_KIND_PREFILL, **common)
    if first.handover is None:
        return first
    second = await decode.generate(
        prompt,
        timeout=timeout,
        kind=common_pb2.TASK_KIND_DECODE,
        output=first.tokens,
        kv_source=first.handover.source,
        processor_state=first.handover.processor_state,
        **common,
    )
    second.tokens = first.tokens + second.tokens
    second.arrivals = first.arrivals + second.arrivals
    second.cached_tokens = first.cached_tokens
    second.handover = first.handover
    return second
