"""A fleet of scripted executors without sockets, and a job executor on a clock that tests turn."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import pytest
from deepflow.v1 import common_pb2, worker_pb2

from controlplane.fleet.channel import LinkUnavailable
from controlplane.jobs.executor import JobExecutor
from controlplane.jobs.job import Job
from controlplane.jobs.serving import ChoiceDelta, Sampling, ServingRequest
from controlplane.jobs.settings import RuntimeSettings
from controlplane.scheduling.columns import Columns
from controlplane.scheduling.prefix import Matches, PrefixIndex
from controlplane.scheduling.types import ExecutorView, Policy, Role

REVISION = "m@1"


@dataclass
class Submitted:
    te_id: str
    task: worker_pb2.SubmitTask
    listener: object
    open: bool = True

    @property
    def output(self) -> list[int]:
        return [
            int.from_bytes(self.task.output_tokens[i : i + 4], "little")
            for i in range(0, len(self.task.output_tokens), 4)
        ]

    def delta(self, tokens: Sequence[int] = (), start: int | None = None, **fields: object) -> None:
        """Delivers a delta to the choice, whether the attempt is still open or not."""
        start = len(self.output) if start is None else start
        self.listener.on_delta(  # type: ignore[attr-defined]
            self.te_id,
            worker_pb2.TaskDelta(
                task_id=self.task.task_id,
                attempt=self.task.attempt,
                start_index=start,
                tokens=tokens,
                **fields,  # type: ignore[arg-type]
            ),
        )

    def finish(self, tokens: Sequence[int] = (), start: int | None = None, *, length: bool = False) -> None:
        reason = common_pb2.FINISH_REASON_LENGTH if length else common_pb2.FINISH_REASON_STOP
        self.delta(tokens, start, finish=reason)

    def hand_over(self, token: int, *, lease_ms: int = 30_000) -> None:
        length = (len(self.task.prompt_tokens) + len(self.task.output_tokens)) // 4
        source = common_pb2.KVSource(transfer_id=f"{self.task.task_id}.{self.task.attempt}", te_id=self.te_id)
        handover = worker_pb2.Handover(
            source=source, length=length, lease_ms=lease_ms, processor_state=b"state"
        )
        self.delta([token], finish=common_pb2.FINISH_REASON_HANDOVER, handover=handover)

    def start(self) -> None:
        """A prefill that was asked to tells that its transfer is open."""
        assert self.task.tell_start
        source = common_pb2.KVSource(transfer_id=f"{self.task.task_id}.{self.task.attempt}", te_id=self.te_id)
        self.delta(handover=worker_pb2.Handover(source=source, lease_ms=30_000))

    def error(self, code: int, *, retryable: bool = False) -> None:
        error = common_pb2.TaskError(code=code, message="scripted", retryable=retryable)  # type: ignore[arg-type]
        self.delta(finish=common_pb2.FINISH_REASON_ERROR, error=error)

    def lose(self) -> None:
        self.listener.on_lost(self.te_id, self.task.attempt, "scripted")  # type: ignore[attr-defined]


@dataclass
class ScriptedFleet:
    """Stands in for `controlplane.fleet.view.FleetView`."""

    views: dict[str, ExecutorView] = field(default_factory=dict)
    submitted: list[Submitted] = field(default_factory=list)
    aborted: list[tuple[str, str, int]] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)  # links that refuse
    prefixes: PrefixIndex = field(default_factory=PrefixIndex)
    on_change: Callable[[], None] = lambda: None

    def add(self, te_id: str, role: Role = Role.COLOCATED, **fields: object) -> None:
        values = {"kv_blocks_total": 1000, "kv_blocks_free": 1000, **fields}
        self.views[te_id] = ExecutorView(te_id, f"{te_id}-inc", role, REVISION, **values)  # type: ignore[arg-type]
        self.on_change()

    def change(self, te_id: str, **fields: object) -> None:
        self.views[te_id] = replace(self.views[te_id], **fields)  # type: ignore[arg-type]
        self.on_change()

    def cluster_view(self, model_revision: str) -> Columns:
        mine = (v for v in self.views.values() if v.model_revision == model_revision)
        return Columns.of(mine, Policy())

    def can_serve(self, model_revision: str) -> bool:
        return bool(self.cluster_view(model_revision).executors)

    def block_tokens(self, model_revision: str) -> int | None:
        return 16 if self.can_serve(model_revision) else None

    def cached_blocks(self, hashes: Sequence[bytes]) -> Matches:
        return self.prefixes.match(hashes)

    def prefix_source(
        self, hashes: Sequence[bytes], block_tokens: int, te_id: str
    ) -> worker_pb2.PrefixSource | None:
        found = self.prefixes.match(hashes)
        for other, blocks in found.beyond(found.get(te_id, 0)):
            return worker_pb2.PrefixSource(te_id=other, tokens=blocks * block_tokens)
        return None

    def submit(
        self,
        te_id: str,
        incarnation: str,
        task: worker_pb2.SubmitTask,
        listener: object,
        *,
        uncached_tokens: int,
    ) -> None:
        if te_id in self.broken or te_id not in self.views:
            raise LinkUnavailable(te_id)
        self.submitted.append(Submitted(te_id, task, listener))

    def abort(self, te_id: str, task_id: str, attempt: int, reason: str) -> None:
        self.aborted.append((te_id, task_id, attempt))

    @property
    def last(self) -> Submitted:
        return self.submitted[-1]


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


_numbers = itertools.count()


def request(prompt: int = 40, **fields: object) -> ServingRequest:
    values: dict[str, object] = {
        "request_id": f"req-{next(_numbers)}",
        "tenant": "t",
        "model_id": "m",
        "model_revision": REVISION,
        "kind": "completion",
        "prompt": tuple(range(prompt)),
        "sampling": Sampling(temperature=0, seed=7),
        "max_output_tokens": 16,
        **fields,
    }
    return ServingRequest(**values)  # type: ignore[arg-type]


@dataclass
class Bench:
    fleet: ScriptedFleet
    clock: Clock
    jobs: JobExecutor

    def submit(self, **fields: object) -> Job:
        return self.jobs.submit(request(**fields))  # type: ignore[arg-type]

    def turn(self, seconds: float = 0.0, step: float = 0.5) -> None:
        """Lets time pass, with the clock's and the pump's loops run as they would."""
        end = self.clock.now + seconds
        while True:
            self.clock.now = min(end, self.clock.now + step)
            for choice in list(self.jobs._live.values()):
                choice.tick(self.clock.now)
            self.jobs.place_waiting()
            if self.clock.now >= end:
                return


def drain(job: Job) -> list[ChoiceDelta]:
    """What the consumer would find now."""
    ready = job.delivery._ready
    taken = list(ready.values())
    ready.clear()
    return taken


@pytest.fixture
def bench() -> Bench:
    return make_bench()


def make_bench(**settings: object) -> Bench:
    fleet, clock = ScriptedFleet(), Clock()
    values = RuntimeSettings(**{"retry_base_seconds": 0.0, **settings})  # type: ignore[arg-type]
    jobs = JobExecutor(fleet, values, clock=clock, wall=clock, rng=random.Random(1))  # type: ignore[arg-type]
    return Bench(fleet, clock, jobs)
