"""What is remembered of a job: plain values, written to the store and shown by the API.

Times are Unix seconds, durations seconds, lengths tokens. Prompts and answers are never recorded.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import orjson

from controlplane.jobs.states import JobState, TaskState


@dataclass(frozen=True, slots=True)
class AttemptRecord:
    """One submit to one executor. A handover makes two: the prefill's and the decode's."""

    attempt: int
    kind: str  # "unified" | "prefill" | "decode"
    te_id: str
    incarnation: str
    reason: str  # why there
    submitted_at: float
    first_token_at: float | None = None
    ended_at: float | None = None
    outcome: str | None = None  # "stop", "length", "handover", "aborted", or why it was lost
    tokens: int = 0
    cached_tokens: int | None = None
    queued_seconds: float | None = None  # as the executor measured
    transfer_seconds: float | None = None
    compute_seconds: float | None = None
    preemptions: int | None = None
    decision: dict[str, Any] | None = None  # candidates, their scores by term, who was dropped and why


@dataclass(frozen=True, slots=True)
class TaskRecord:
    """One choice over all its attempts."""

    task_id: str
    index: int
    state: TaskState
    te_id: str | None  # where it is, or was last
    prefill_te: str | None
    decode_te: str | None
    output_tokens: int
    cached_tokens: int | None
    replays: int
    finish: str | None = None
    error: str | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None
    ended_at: float | None = None
    attempts: tuple[AttemptRecord, ...] = ()


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """What a client asked for, without its text."""

    request_id: str
    tenant: str
    key_id: str
    kind: str  # "chat" | "completion"
    model_id: str
    model_revision: str
    prompt_tokens: int
    max_output_tokens: int
    n: int
    stream: bool
    priority: int
    timeout_seconds: float
    traceparent: str
    parent_span: str = ""  # of the client, 16 hex digits; "" where it gave no trace context


@dataclass(frozen=True, slots=True)
class JobRecord:
    job_id: str
    kind: str  # "serving"
    state: JobState
    gateway_id: str
    created_at: float
    request: RequestRecord
    tasks: tuple[TaskRecord, ...]
    placed_at: float | None = None
    first_token_at: float | None = None
    ended_at: float | None = None
    error: str | None = None
    updated_at: float = 0.0

    @property
    def tenant(self) -> str:
        return self.request.tenant

    def to_json(self) -> dict[str, Any]:
        """The API's shape: what lists show stands at the top."""
        request = self.request
        return {
            "id": self.job_id,
            "request_id": request.request_id,
            "tenant": request.tenant,
            "model": request.model_id,
            "model_revision": request.model_revision,
            **asdict(self),
        }


def to_bytes(record: JobRecord) -> bytes:
    return orjson.dumps(record)


def from_bytes(data: bytes) -> JobRecord:
    """Raises ValueError for anything but a record of this version."""
    try:
        raw: dict[str, Any] = orjson.loads(data)
        tasks = tuple(
            TaskRecord(
                **{
                    **task,
                    "state": TaskState(task["state"]),
                    "attempts": tuple(AttemptRecord(**attempt) for attempt in task["attempts"]),
                }
            )
            for task in raw["tasks"]
        )
        request = RequestRecord(**raw["request"])
        return JobRecord(**{**raw, "state": JobState(raw["state"]), "request": request, "tasks": tasks})
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a job record: {error}") from error
