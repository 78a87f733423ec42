"""One submit of a choice to one executor, while it is open; becomes an `AttemptRecord`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from deepflow.v1 import common_pb2
from deepflow.v1.worker_pb2 import TaskDelta, TaskTimings

from controlplane.jobs.records import AttemptRecord
from controlplane.jobs.wire import KINDS
from controlplane.scheduling.types import Decision


@dataclass(slots=True)
class Attempt:
    number: int
    kind: common_pb2.TaskKind.ValueType
    te_id: str
    incarnation: str
    reason: str
    submitted_at: float  # Unix seconds, as the other times
    first_token_at: float | None = None
    ended_at: float | None = None
    outcome: str | None = None
    tokens: int = 0
    cached_tokens: int | None = None
    heard: bool = False  # the executor said something of it
    timings: TaskTimings | None = None
    decision: Decision | None = None  # what the placement was chosen by

    def end(self, outcome: str, at: float) -> None:
        if self.ended_at is None:
            self.ended_at, self.outcome = at, outcome

    def record(self) -> AttemptRecord:
        timings = self.timings
        return AttemptRecord(
            attempt=self.number,
            kind=KINDS[self.kind],
            te_id=self.te_id,
            incarnation=self.incarnation,
            reason=self.reason,
            submitted_at=self.submitted_at,
            first_token_at=self.first_token_at,
            ended_at=self.ended_at,
            outcome=self.outcome,
            tokens=self.tokens,
            cached_tokens=self.cached_tokens,
            queued_seconds=timings.queued_seconds if timings else None,
            transfer_seconds=timings.transfer_seconds if timings else None,
            compute_seconds=timings.compute_seconds if timings else None,
            preemptions=timings.preemptions if timings else None,
            decision=explained(self.decision) if self.decision is not None else None,
        )


@dataclass(frozen=True, slots=True)
class Offer:
    """A finished prefill's KV, waiting to be pulled."""

    te_id: str
    attempt: int
    source: common_pb2.KVSource
    processor_state: bytes
    since: float  # monotonic
    until: float  # monotonic: give up before the lease runs out


@dataclass(slots=True)
class Ahead:
    """A decode placed while its prefill still computes, and what it said before that handed over."""

    attempt: Attempt
    held: list[TaskDelta] = field(default_factory=list)


def explained(decision: Decision) -> dict[str, Any]:
    """The decision as its job's record keeps it, for `deepflow explain`."""
    return {
        "mode": str(decision.mode),
        "candidates": decision.candidates,
        "heat": decision.heat,
        "scores": {
            te_id: {
                "queue": round(terms.queue, 4),
                "prefill": round(terms.prefill, 4),
                "pressure": round(terms.pressure, 4),
                "cached_tokens": terms.cached_tokens,
            }
            for te_id, terms in decision.terms.items()
        },
        "dropped": {te_id: str(why) for te_id, why in decision.dropped.items()},
    }
