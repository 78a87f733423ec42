"""`/deepflow/v1`: jobs with their tasks, executors. A tenant sees its own jobs; admin keys see all."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Query, Request
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from starlette.responses import Response

from controlplane.api.errors import ApiError
from controlplane.api.jobs import ExecutorList, JobList, JobView
from controlplane.gateway.routes.documented import READING, answers
from controlplane.gateway.state import identify

router = APIRouter()


@router.get("/deepflow/v1/jobs", responses=answers(JobList, READING), response_class=Response)
async def list_jobs(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    cursor: Annotated[str | None, Query(max_length=256)] = None,
) -> Response:
    """Newest first, by pages."""
    gateway, principal = await identify(request, "jobs")
    tenant = None if principal.sees_all_tenants else principal.tenant
    found = await _ask_store(gateway.runtime.store.list(limit, cursor, tenant))
    records, next_cursor = found if isinstance(found, tuple) else (found, None)
    jobs = [{"object": "deepflow.job", **as_json(record)} for record in records]
    return _json({"object": "list", "data": jobs, "next_cursor": next_cursor})


@router.get(
    "/deepflow/v1/jobs/{job_id}", responses=answers(JobView, (*READING, 403)), response_class=Response
)
async def get_job(request: Request, job_id: str) -> Response:
    """One job with its tasks, their executors, states and times."""
    gateway, principal = await identify(request, "jobs")
    record = None
    if len(job_id) <= 128 and job_id.isprintable():
        record = await _ask_store(gateway.runtime.store.get(job_id))
    job = None if record is None else as_json(record)
    # Another tenant's job is not told apart from none.
    if job is None or not (principal.sees_all_tenants or job.get("tenant") == principal.tenant):
        raise ApiError(404, "No such job.", param="job_id", code="job_not_found")
    return _json({"object": "deepflow.job", **job})


@router.get(
    "/deepflow/v1/executors", responses=answers(ExecutorList, (*READING, 403)), response_class=Response
)
async def list_executors(request: Request) -> Response:
    """Task executors as this gateway sees them."""
    gateway, principal = await identify(request, "executors")
    if not principal.sees_all_tenants:
        raise ApiError(403, "This needs an admin key.", code="admin_required")
    return _json({"object": "list", "data": [as_json(item) for item in gateway.runtime.fleet.executors()]})


async def _ask_store(answer: Any) -> Any:
    from redis.exceptions import RedisError

    try:
        return await answer
    except (RedisError, OSError, TimeoutError) as error:
        raise ApiError(503, "The job store cannot be reached.", code="store_unavailable") from error


def as_json(value: Any) -> Any:
    """Records (dataclasses, protobuf messages, enums) as plain JSON values."""
    if isinstance(value, Message):
        return MessageToDict(
            value, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
    if hasattr(value, "to_json") and callable(value.to_json):
        return value.to_json()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: as_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(as_json(key)): as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [as_json(item) for item in value]
    if isinstance(value, bytes):
        return value.hex()
    return value


def _json(value: Any) -> Response:
    return Response(orjson.dumps(value, default=str), media_type="application/json")
