"""A serving executor for tests of the gateway: echoes the prompt's tokens, or says what it is told.

It keeps to the protocols of `controlplane/jobs/serving.py` and does nothing else: no fleet, no Redis.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from controlplane.gateway.settings import GatewaySettings
from controlplane.jobs.delivery import Delivery
from controlplane.jobs.serving import ChoiceDelta, ServingError, ServingRequest, TokenLogprobs


@dataclass
class EchoJob:
    job_id: str
    request: ServingRequest
    executor: EchoExecutor
    cancelled: str | None = None
    finished: set[int] = field(default_factory=set)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    over: bool = False
    delivery: Delivery = field(default_factory=lambda: Delivery(1))
    feeding: asyncio.Task[None] | None = None

    def __post_init__(self) -> None:
        self.delivery = Delivery(self.request.n)

    def listen(self, wake: Callable[[], None]) -> None:
        self.delivery.listen(wake)
        if self.feeding is None:
            self.feeding = asyncio.create_task(self._feed())

    def take(self) -> list[ChoiceDelta]:
        return self.delivery.take()

    @property
    def ended(self) -> bool:
        return self.delivery.ended

    async def _feed(self) -> None:
        async for delta in self.deltas():
            self.delivery.push(
                delta.index, delta.tokens, delta.logprobs, delta.cached_tokens, delta.prompt_logprobs
            )
            if delta.finish is not None:
                self.delivery.close(delta.index, delta.finish, delta.error)
            # Each delta alone, as executors' steps come.
            await asyncio.sleep(0)

    async def deltas(self) -> AsyncIterator[ChoiceDelta]:
        executor, request = self.executor, self.request
        await self._sleep(executor.first_delay)
        if self.cancelled is not None:
            return
        if executor.fail is not None:
            yield ChoiceDelta(0, finish="error", error=executor.fail)
            return
        outputs = [list(executor.answer(request, index)) for index in range(request.n)]
        chunk = executor.chunk
        position = 0
        live = set(range(request.n))
        while live:
            for index in sorted(live - self.finished):
                if self.cancelled is not None:
                    return
                yield self._delta(index, outputs[index], position, chunk, live)
            live -= self.finished
            position += chunk
            if executor.fail_after is not None and position >= executor.fail_after:
                yield ChoiceDelta(0, finish="error", error=ServingError(503, "no_executor", "gone"))
                return
            if live:
                await self._sleep(executor.delay)
                if self.cancelled is not None:
                    return
        self.over = True

    def _delta(self, index: int, output: list[int], position: int, chunk: int, live: set[int]) -> ChoiceDelta:
        request = self.request
        most = request.max_output_tokens
        tokens = output[position : min(position + chunk, most)]
        delta = ChoiceDelta(index, tokens=tokens)
        if position == 0:
            delta.cached_tokens = 16 if len(request.prompt) > 16 else 0
            wanted = request.sampling.prompt_logprobs
            if wanted is not None:
                delta.prompt_logprobs = [None, *(_logprobs(t, wanted) for t in request.prompt[1:])]
        if request.sampling.logprobs is not None:
            delta.logprobs = [_logprobs(token, request.sampling.logprobs) for token in tokens]
        if position + chunk >= min(len(output), most):
            delta.finish = "length" if len(output) > most else "stop"
            live.discard(index)
        return delta

    async def _sleep(self, seconds: float) -> None:
        if seconds:
            try:
                async with asyncio.timeout(seconds):
                    await self.wake.wait()
            except TimeoutError:
                pass
        else:
            await asyncio.sleep(0)

    def finish_choice(self, index: int) -> None:
        self.finished.add(index)

    def cancel(self, reason: str) -> None:
        ended = self.over if self.feeding is None else self.ended
        if self.cancelled is None and not ended:
            self.cancelled = reason
            self.wake.set()


def _logprobs(token: int, top: int) -> TokenLogprobs:
    return TokenLogprobs(token, -0.5, 1, tuple((token + i, -0.5 - i) for i in range(top)))


@dataclass
class EchoExecutor:
    """Answers with the prompt's own tokens and an end token, unless `script` says otherwise."""

    eos: int = 2
    script: Callable[[ServingRequest, int], list[int]] | None = None
    first_delay: float = 0
    delay: float = 0
    chunk: int = 1
    fail: ServingError | None = None
    fail_after: int | None = None
    refuse: ServingError | None = None
    accepting: bool = True
    serving: bool = True
    jobs: list[EchoJob] = field(default_factory=list)

    def answer(self, request: ServingRequest, index: int) -> list[int]:
        if self.script is not None:
            return self.script(request, index)
        return [*request.prompt, self.eos]

    def submit(self, request: ServingRequest) -> EchoJob:
        if self.refuse is not None:
            raise self.refuse
        job = EchoJob(f"job_{len(self.jobs)}", request, self)
        self.jobs.append(job)
        return job

    def can_serve(self, model_revision: str) -> bool:
        return self.serving

    @property
    def requests(self) -> list[ServingRequest]:
        return [job.request for job in self.jobs]


@dataclass
class DictStore:
    records: list[dict[str, Any]] = field(default_factory=list)

    async def get(self, job_id: str) -> dict[str, Any] | None:
        return next((record for record in self.records if record["job_id"] == job_id), None)

    async def list(self, limit: int, cursor: str | None, tenant: str | None) -> tuple[list[Any], str | None]:
        found = [record for record in self.records if tenant in (None, record["tenant"])]
        return found[:limit], None


class DictFleet:
    def executors(self) -> list[dict[str, Any]]:
        return [{"te_id": "te-0", "state": "ready"}]


@dataclass
class EchoRuntime:
    executor: EchoExecutor = field(default_factory=EchoExecutor)
    store: DictStore = field(default_factory=DictStore)
    fleet: DictFleet = field(default_factory=DictFleet)

    @asynccontextmanager
    async def open(self, settings: GatewaySettings) -> AsyncIterator[EchoRuntime]:
        yield self
