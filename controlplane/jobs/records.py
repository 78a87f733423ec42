"""What is kept of a request, its job and its tasks: values, and their JSON in the store and over HTTP.

Times are Unix seconds; durations are seconds. A record holds counts and names, never a prompt or an
answer. `to_json` is what `/deepflow/v1/jobs` shows and what lies in Redis; `from_json` reads it back.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, fields
from typing import Any

from controlplane.jobs.states import TERMINAL_JOB_STATES, JobState, TaskState


class TaskKind(enum.StrEnum):
    UNIFIED = "unified"
    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """What the client sent, without its words."""

    request_id: str
    tenant: str
    key_id: str
    endpoint: str  # "chat" | "completion"
    model_id: str
    model_revision: str
    prompt_tokens: int
    max_output_tokens: int
    n: int
    stream: bool
    priority: int
    adapter_id: str = ""
    traceparent: str = ""


@dataclass(frozen=True, slots=True)
class TaskRecord:
    """One placement of one choice on one executor."""

    task_id: str  # the same over the attempts of a choice
    attempt: int
    choice: int
    kind: TaskKind | None  # None until it is placed
    state: TaskState
    executor: str = ""
    executor_incarnation: str = ""
    reason: str = ""  # why this executor, or why the task ended as it did
    created_at: float = 0.0
    assigned_at: float | None = None
    first_token_at: float | None = None
    finished_at: float | None = None
    start_index: int = 0  # output tokens that earlier attempts delivered
    tokens: int = 0  # output tokens delivered by this attempt
    cached_tokens: int | None = None
    queued_seconds: float | None = None  # on the executor, before it was first scheduled
    transfer_seconds: float | None = None
    compute_seconds: float | None = None
    preemptions: int = 0

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _TASK_FIELDS}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> TaskRecord:
        known = {name: value[name] for name in _TASK_FIELDS if name in value}
        kind = known.get("kind")
        known["kind"] = None if kind is None else TaskKind(kind)
        known["state"] = TaskState(known["state"])
        return cls(**known)


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A request's handler and what became of it."""

    job_id: str
    kind: str  # "serving"
    state: JobState
    request: RequestRecord
    gateway_id: str
    created_at: float
    tasks: tuple[TaskRecord, ...] = ()
    mode: str = ""  # "unified" | "disaggregated": how the first choice was first placed
    started_at: float | None = None  # first task placed
    first_token_at: float | None = None
    finished_at: float | None = None
    cached_tokens: int = 0
    completion_tokens: int = 0
    error_code: str = ""
    error: str = ""

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def tenant(self) -> str:
        return self.request.tenant

    @property
    def terminal(self) -> bool:
        return self.state in TERMINAL_JOB_STATES

    def to_json(self) -> dict[str, Any]:
        """Flat: the request's fields beside the job's. `id` and `model` are what lists show."""
        value: dict[str, Any] = {"id": self.job_id, "model": self.request.model_id}
        value.update((name, getattr(self, name)) for name in _JOB_FIELDS)
        value.update((name, getattr(self.request, name)) for name in _REQUEST_FIELDS)
        value["tasks"] = [task.to_json() for task in self.tasks]
        return value

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> JobRecord:
        """Unknown fields are ignored: a newer gateway may have written more. Raises KeyError, ValueError."""
        request = RequestRecord(**{name: value[name] for name in _REQUEST_FIELDS if name in value})
        known = {name: value[name] for name in _JOB_FIELDS if name in value}
        known["state"] = JobState(known["state"])
        tasks = tuple(TaskRecord.from_json(task) for task in value.get("tasks", ()))
        return cls(request=request, tasks=tasks, **known)


_TASK_FIELDS = tuple(field.name for field in fields(TaskRecord))
_REQUEST_FIELDS = tuple(field.name for field in fields(RequestRecord))
_JOB_FIELDS = tuple(field.name for field in fields(JobRecord) if field.name not in ("request", "tasks"))
