"""A real serving runtime over real gRPC and real Valkey, with token sources as executors."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from controlplane.jobs.runtime import RuntimeSettings, ServingRuntime
from controlplane.jobs.serving import ChoiceDelta, Sampling, ServingError, ServingJob, ServingRequest
from tests.fakes.token_source import TokenSource, answer

REVISION = "model@1"
TOKEN = "secret"
ROOT = Path(__file__).resolve().parents[3]


def request(length: int = 40, output: int = 20, **changes: Any) -> ServingRequest:
    """`length` prompt tokens, `output` tokens to make; `first` sets the prompt's first token."""
    first = changes.pop("first", 0)
    sampling = changes.pop("sampling", None) or Sampling(seed=changes.pop("seed", 7))
    values: dict[str, Any] = {
        "request_id": "req",
        "tenant": "tenant",
        "model_id": "model",
        "model_revision": REVISION,
        "kind": "chat",
        "prompt": tuple(range(first, first + length)),
        "sampling": sampling,
        "max_output_tokens": output,
        "timeout_seconds": 20.0,
    }
    return ServingRequest(**{**values, **changes})


@dataclass
class Answer:
    """What a client would have got of one job."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    finish: dict[int, str] = field(default_factory=dict)
    errors: dict[int, ServingError] = field(default_factory=dict)
    logprobs: dict[int, list[Any]] = field(default_factory=dict)
    cached: dict[int, int] = field(default_factory=dict)

    def add(self, delta: ChoiceDelta) -> None:
        assert delta.index not in self.finish, "a delta after the last"
        self.tokens.setdefault(delta.index, []).extend(delta.tokens)
        self.logprobs.setdefault(delta.index, []).extend(delta.logprobs or ())
        if delta.cached_tokens is not None:
            assert delta.index not in self.cached
            self.cached[delta.index] = delta.cached_tokens
        if delta.finish is not None:
            self.finish[delta.index] = delta.finish
        if delta.error is not None:
            self.errors[delta.index] = delta.error


async def collect(job: ServingJob, seconds: float = 25.0) -> Answer:
    got = Answer()
    async with asyncio.timeout(seconds):
        async for delta in job.deltas():
            got.add(delta)
    return got


async def until(condition: Callable[[], Any], seconds: float = 10.0) -> None:
    """Waits for it; raises TimeoutError."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


def exact(asked: ServingRequest) -> list[int]:
    return answer(asked.prompt, asked.max_output_tokens, asked.sampling.seed)


@dataclass
class Process:
    """A token source as a process of its own, to be killed."""

    popen: subprocess.Popen[bytes]

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait()


@dataclass
class Cluster:
    """Opens runtimes and executors; all are closed with the test."""

    redis_url: str
    stack: AsyncExitStack
    folder: Path
    runtimes: list[ServingRuntime] = field(default_factory=list)

    async def runtime(self, **settings: Any) -> ServingRuntime:
        values = {
            "redis_url": self.redis_url,
            "cluster_token": TOKEN,
            "registry_poll_seconds": 0.05,
            "tick_seconds": 0.02,
            "drain_seconds": 0.0,
            "record_flush_seconds": 0.02,
            "redis_seconds": 0.5,
        }
        made = ServingRuntime(RuntimeSettings.model_validate({**values, **settings}))
        self.runtimes.append(await self.stack.enter_async_context(made))
        return made

    async def source(self, te_id: str, role: str = "colocated", **options: Any) -> TokenSource:
        made = TokenSource(
            te_id, revision=REVISION, role=role, redis_url=self.redis_url, token=TOKEN, **options
        )
        return await self.stack.enter_async_context(made)

    def process(self, te_id: str, role: str = "colocated", *options: str) -> Process:
        command = [sys.executable, "-m", "tests.fakes.token_source", "--te-id", te_id, "--role", role]
        command += ["--revision", REVISION, "--redis-url", self.redis_url, *options]
        paths = os.pathsep.join((str(ROOT), str(ROOT / "protos"), os.environ.get("PYTHONPATH", "")))
        env = {**os.environ, "PYTHONPATH": paths, "DEEPFLOW_CLUSTER_TOKEN": TOKEN}
        made = Process(subprocess.Popen(command, env=env, cwd=ROOT))
        self.stack.callback(made.kill)
        return made


def link(runtime: ServingRuntime, te_id: str) -> str:
    return next((item["link"] for item in runtime.fleet.executors() if item["te_id"] == te_id), "none")


async def linked(runtime: ServingRuntime, *te_ids: str, seconds: float = 15.0) -> None:
    await until(lambda: all(link(runtime, te_id) == "up" for te_id in te_ids), seconds)


Run = Callable[[Callable[[Cluster], Awaitable[None]]], Awaitable[None]]


@pytest.fixture
def open_cluster(clean_valkey: str, tmp_path: Path) -> Callable[[], AsyncIterator[Cluster]]:
    """`async with open_cluster() as cluster:` — in the test's own task, as TaskGroups want it."""
    from contextlib import asynccontextmanager

    @asynccontextmanager
    async def opened(redis_url: str = clean_valkey) -> AsyncIterator[Cluster]:
        async with AsyncExitStack() as stack:
            cluster = Cluster(redis_url, stack, tmp_path)
            yield cluster
            for runtime in cluster.runtimes:
                assert not list(runtime.executor.live_jobs), "jobs are left"

    return opened  # type: ignore[return-value]  # a context manager's factory
