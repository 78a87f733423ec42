"""`/deepflow/v1`: jobs with their tasks, and executors. Times are Unix seconds."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class _Wire(BaseModel):
    model_config = ConfigDict(extra="allow")


class JobView(_Wire):
    """One job with its tasks."""

    object: Literal["deepflow.job"] = "deepflow.job"
    job_id: str
    request_id: str
    tenant: str
    kind: str
    state: str
    tasks: list[dict[str, Any]]


class JobList(_Wire):
    """Newest first. `next_cursor` is null on the last page."""

    object: Literal["list"] = "list"
    data: list[dict[str, Any]]
    next_cursor: str | None


class ExecutorList(_Wire):
    """Task executors as this gateway sees them: registry record, latest load, state of the stream."""

    object: Literal["list"] = "list"
    data: list[dict[str, Any]]
