"""Executors of one machine without a stack around them: to measure how long a start takes, and of what.

Called by `deepflow bench scale` and tests/bench/scale.py. The parts are the supervisor's own: children, the
template process, the leader of each executor. There is no registry and no gateway: a start ends when a
request has had its first token over the worker protocol (DeepServe, section 6: ready means serving).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import struct
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio
from deepflow.v1 import common_pb2, worker_pb2, worker_pb2_grpc

from controlplane.local import commands, template
from controlplane.local.children import Child
from controlplane.local.executors import Executor, ModelTarget, RoleEpochs, Source
from controlplane.local.settings import StackSettings, StatePaths
from controlplane.local.topology import RoleName
from kvtransfer.auth import call_metadata
from kvtransfer.channel import open_channel

TOKEN = "starts"
REVISION = "model@starts"
PROMPT = list(range(500, 532))
"""As long as a short chat; tokens that every vocabulary has."""
START_SECONDS = 300.0
WARM_SECONDS = 0.5
"""From serving to warm, in a forked process: an order more than it takes."""
PHASES = ("scaler_pre", "te_pre_load", "te_load", "te_post_load")


class StartFailed(Exception):
    """An executor did not get to its first token; the message says why."""


class Node:
    """Executors as the supervisor has them, a template, and memory for weights."""

    def __init__(self, folder: Path, model: Path, dtype: str = "auto") -> None:
        self.paths = StatePaths(folder)
        self.paths.prepare()
        self._target = (str(model), dtype)
        self._settings = StackSettings(state_dir=folder, models=(), threads=1)
        self._epochs = RoleEpochs(self.paths.role_epoch)
        self._numbers = 0
        self._work: dict[str, list[asyncio.Task[None]]] = {}
        spec = commands.template_spec(self._settings, self.paths, dict(os.environ))
        self.template = Child(spec, lambda: None)
        self._template = template.Template(self.template, self.paths.template_socket)
        self._template_run = asyncio.create_task(self.template.run())

    async def ready(self) -> None:
        """Until the template forks. Raises StartFailed."""
        async with _bounded("the template is not ready"):
            while not self.paths.template_socket.exists():
                if self.template.restarts:
                    raise StartFailed(f"no template: {self.template.log_tail(3)}")
                await asyncio.sleep(0.01)

    def add(self, *, forked: bool, options: tuple[str, ...] = ()) -> Executor:
        """An executor whose process starts now and which knows no model; `options` of flowserve.shell."""
        te_id = f"te-{self._numbers}"
        self._numbers += 1
        executor = Executor(
            te_id,
            child=self.child(te_id, forked=forked, options=options),
            endpoint_file=self.paths.run / f"{te_id}.json",
            role=RoleName.COLOCATED,
            epochs=self._epochs,
            token=TOKEN,
            on_change=lambda: None,
        )
        executor.child.on_change = executor.look
        self._work[te_id] = [asyncio.create_task(one) for one in (executor.child.run(), executor.tend())]
        return executor

    def child(self, te_id: str, *, forked: bool, options: tuple[str, ...] = ()) -> Child:
        """Its process alone, which nobody leads; `run` starts it."""
        env = commands.base_env(self.paths, "", TOKEN)
        spec = commands.executor_spec(self._settings, self.paths, te_id, RoleName.COLOCATED, env, options)
        return Child(spec, lambda: None, self._template.start if forked else None)

    async def waits(self, executor: Executor) -> None:
        """Until its process is warm."""
        async with _bounded(f"{executor.te_id} does not serve"):
            while executor.status is None:
                _check(executor)
                await asyncio.sleep(0.01)
            await asyncio.sleep(WARM_SECONDS)

    def elsewhere(self, transport: str, reserve: int) -> tuple[str, ...]:
        """Options of an executor that shares no weights with the others, as on another node, with `reserve`
        bytes of memory set aside for them."""
        folder = self.paths.weights.with_name(f"{self.paths.weights.name}-elsewhere")
        shutil.rmtree(folder, ignore_errors=True)
        return (
            *("--weights-dir", str(folder), "--kv-transport", transport),
            *("--weights-reserve-bytes", str(reserve)),
        )

    async def first_token(self, executor: Executor, kv_bytes: int, source: Executor | None = None) -> float:
        """Gives it the model, with weights of `source`; when a request had its first token (perf_counter).
        Raises StartFailed."""
        path, dtype = self._target
        sources: tuple[Source, ...] = ()
        if source is not None and source.status is not None:
            sources = (Source(source.te_id, source.status.record.incarnation, source.address),)
        executor.set_target(ModelTarget("model", REVISION, path, dtype, kv_bytes, 0, fork_from=sources))
        async with _bounded(f"{executor.te_id} does not load its model"):
            while not executor.ready:
                _check(executor)
                await asyncio.sleep(0.002)
            await _collect(executor.address, 1)
        return time.perf_counter()

    async def generate(self, executor: Executor, tokens: int) -> list[float]:
        """So many tokens of a request; when each came (perf_counter). Raises StartFailed."""
        async with _bounded(f"{executor.te_id} does not answer"):
            return await _collect(executor.address, tokens)

    async def remove(self, executor: Executor) -> None:
        work = self._work.pop(executor.te_id)
        work[1].cancel()
        await executor.child.stop()
        await asyncio.gather(*work, return_exceptions=True)

    def forget_weights(self) -> None:
        """The next load reads storage."""
        for folder in self.paths.weights.parent.glob(f"{self.paths.weights.name}*"):
            shutil.rmtree(folder, ignore_errors=True)

    async def close(self) -> None:
        """Ends all of it and leaves nothing."""
        for te_id in list(self._work):
            run, tend = self._work.pop(te_id)
            tend.cancel()
            run.cancel()
            await asyncio.gather(run, tend, return_exceptions=True)
        await self.template.stop()
        await self._template_run
        self.forget_weights()


@contextlib.asynccontextmanager
async def node(model: Path, dtype: str = "auto") -> AsyncIterator[Node]:
    """A node whose template is ready. Raises StartFailed where executors cannot be forked."""
    if not template.supported():
        raise StartFailed("executors are forked on Linux only")
    with tempfile.TemporaryDirectory(prefix="deepflow-starts-") as folder, template.subreaper():
        made = Node(Path(folder), model, dtype)
        try:
            await made.ready()
            yield made
        finally:
            await made.close()


def steps(executor: Executor) -> dict[str, float]:
    """Seconds by phase (flowserve/shell/start.py), as a ready executor tells; those of PHASES alone."""
    record = executor.status.record if executor.status is not None else worker_pb2.ExecutorRecord()
    return {phase.phase: phase.seconds for phase in record.start_phases if phase.phase in PHASES}


def _check(executor: Executor) -> None:
    if executor.load_hopeless:
        raise StartFailed(executor.message)
    if executor.child.restarts:
        raise StartFailed(f"{executor.te_id} {executor.child.last_exit}: {executor.child.log_tail(3)}")


@contextlib.asynccontextmanager
async def _bounded(what: str) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(START_SECONDS):
            yield
    except TimeoutError:
        raise StartFailed(f"{what} after {START_SECONDS:.0f} s") from None


async def _collect(address: str, tokens: int) -> list[float]:
    """When each of so many tokens of PROMPT came. Raises StartFailed."""
    task = worker_pb2.SubmitTask(
        task_id=f"t-{time.time_ns():x}",
        attempt=1,
        kind=common_pb2.TASK_KIND_UNIFIED,
        model_revision=REVISION,
        prompt_tokens=struct.pack(f"<{len(PROMPT)}I", *PROMPT),
        max_output_tokens=tokens,
        sampling=common_pb2.SamplingParams(top_p=1.0, repetition_penalty=1.0, ignore_eos=True),
    )
    hello = worker_pb2.Hello(gateway_id=f"starts-{time.time_ns():x}", incarnation="1")
    came: list[float] = []
    try:
        async with open_channel(address, None) as channel:
            call = worker_pb2_grpc.TaskExecutorStub(channel).Tasks(metadata=call_metadata(TOKEN))
            await call.write(worker_pb2.TasksRequest(hello=hello))
            await call.write(worker_pb2.TasksRequest(submit=task))
            async for response in call:
                now = time.perf_counter()
                for delta in response.step.deltas:
                    if delta.HasField("error"):
                        raise StartFailed(delta.error.message)
                    came.extend([now] * len(delta.tokens))
                if len(came) >= tokens:
                    call.cancel()
                    return came
    except grpc.aio.AioRpcError as error:
        raise StartFailed(f"{error.code().name}: {error.details()}") from error
    raise StartFailed(f"its stream ended after {len(came)} of {tokens} tokens")
