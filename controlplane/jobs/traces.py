"""Spans of jobs and of executors' starts, built from what was recorded of them once they ended.

Nothing is measured for a trace: times are the record's, so a token costs nothing and a request what its
record costs. `controlplane.jobs.tracing` exports them. Names and attributes are those of OpenTelemetry for
generative AI where it has some (gen_ai.*), ours otherwise (deepflow.*). Identifiers follow from what they
name, so that two who tell of the same thing tell of one span.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import orjson
from deepflow.v1 import worker_pb2

from controlplane.jobs.records import AttemptRecord, JobRecord, TaskRecord

Value = str | int | float | bool
MAX_DECISION_CHARS = 4096
"""Of the scores of a placement (ours): backends refuse longer attributes."""
_OPERATIONS = {"chat": "chat", "completion": "text_completion"}
_FINISHED = ("stop", "length", "handover")


@dataclass(frozen=True, slots=True)
class Span:
    """Times are Unix seconds. `parent` is 0 for a root; `error` "" for what went well."""

    name: str
    trace: int
    span: int
    parent: int
    start: float
    end: float
    attributes: Mapping[str, Value]
    kind: str = "internal"  # "server" | "client" | "internal"
    error: str = ""


def sampled(traceparent: str) -> bool:
    """What the trace context says of being recorded; False for none."""
    return len(traceparent) == 55 and int(traceparent[53:55], 16) & 1 == 1


def job_spans(record: JobRecord) -> list[Span]:
    """The request, its wait for a place, and each attempt with its parts; none of a job that has not ended or
    has no trace context."""
    request, ended = record.request, record.ended_at
    if ended is None or len(request.traceparent) != 55:
        return []
    trace, root = int(request.traceparent[3:35], 16), int(request.traceparent[36:52], 16)
    operation = _OPERATIONS.get(request.kind, request.kind)
    attributes: dict[str, Value] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "deepflow",
        "gen_ai.request.model": request.model_id,
        "gen_ai.request.max_tokens": request.max_output_tokens,
        "gen_ai.request.choice.count": request.n,
        "gen_ai.usage.input_tokens": request.prompt_tokens,
        "gen_ai.usage.output_tokens": sum(task.output_tokens for task in record.tasks),
        "gen_ai.response.finish_reasons": ",".join(task.finish or "" for task in record.tasks),
        "deepflow.job.id": record.job_id,
        "deepflow.request.id": request.request_id,
        "deepflow.tenant": request.tenant,
        "deepflow.model.revision": request.model_revision,
        "deepflow.stream": request.stream,
    }
    if record.first_token_at is not None:
        attributes["deepflow.time_to_first_token"] = record.first_token_at - record.created_at
    name = f"{operation} {request.model_id}"
    parent = int(request.parent_span or "0", 16)
    spans = [
        Span(name, trace, root, parent, record.created_at, ended, attributes, "server", record.error or "")
    ]
    if record.placed_at is not None:
        spans.append(_child(spans[0], "queue", record.job_id, record.created_at, record.placed_at))
    for task in record.tasks:
        for attempt in task.attempts:
            spans.extend(_attempt_spans(spans[0], task, attempt, ended))
    return spans


def _attempt_spans(root: Span, task: TaskRecord, attempt: AttemptRecord, job_ended: float) -> Iterator[Span]:
    key = f"{task.task_id}/{attempt.attempt}/{attempt.kind}"
    attributes: dict[str, Value] = {
        "deepflow.task.id": task.task_id,
        "deepflow.attempt": attempt.attempt,
        "deepflow.executor.id": attempt.te_id,
        "deepflow.executor.incarnation": attempt.incarnation,
        "deepflow.placement.reason": attempt.reason,
        "deepflow.outcome": attempt.outcome or "",
        "gen_ai.usage.output_tokens": attempt.tokens,
    }
    if attempt.cached_tokens is not None:
        attributes["deepflow.cached_tokens"] = attempt.cached_tokens
    if attempt.preemptions:
        attributes["deepflow.preemptions"] = attempt.preemptions
    if attempt.decision is not None:
        attributes["deepflow.placement.decision"] = orjson.dumps(attempt.decision).decode()[
            :MAX_DECISION_CHARS
        ]
    end = attempt.ended_at or job_ended
    error = "" if attempt.outcome in _FINISHED else attempt.outcome or "unfinished"
    span = _child(root, attempt.kind, key, attempt.submitted_at, end, attributes, "client", error)
    yield span
    waited = attempt.queued_seconds
    if waited is not None:
        started = attempt.submitted_at + waited
        yield _child(span, "wait for a step", key, attempt.submitted_at, started)
        if attempt.transfer_seconds:  # the pull begins when the task is accepted, and waits for the prefill
            begun = attempt.submitted_at
            yield _child(span, "kv transfer", key, begun, begun + attempt.transfer_seconds)
        if attempt.compute_seconds is not None:
            yield _child(span, "compute", key, started, started + attempt.compute_seconds)


def start_spans(record: worker_pb2.ExecutorRecord, reached: float, gateway_id: str) -> list[Span]:
    """How an executor came to serve: its steps in order until it was ready, and when this gateway could send
    to it. None of one that does not tell."""
    if not record.ready_unix_ms or not record.start_phases:
        return []
    ready = record.ready_unix_ms / 1000
    seconds = [phase.seconds for phase in record.start_phases]
    key = f"{record.te_id}/{record.incarnation}/{record.ready_unix_ms}"
    attributes: dict[str, Value] = {
        "deepflow.executor.id": record.te_id,
        "deepflow.executor.incarnation": record.incarnation,
        "deepflow.model.revision": record.model_revision,
        "deepflow.start.path": record.start_path,
        "deepflow.device": record.device,
    }
    at = ready - sum(seconds)
    trace = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=16).digest())
    name = f"start {record.start_path}"
    root = Span(name, trace, _identifier(key), 0, at, ready, attributes)
    spans = [root]
    for phase, taken in zip(record.start_phases, seconds, strict=True):
        spans.append(_child(root, phase.phase, key, at, at + taken))
        at += taken
    told: dict[str, Value] = {"deepflow.gateway.id": gateway_id}
    end = max(ready, reached)
    return [*spans, _child(root, "scaler_post", f"{key}/{gateway_id}", ready, end, told)]


def _child(  # noqa: PLR0917  a span's parts in their order
    parent: Span, name: str, key: str, start: float, end: float,
    attributes: Mapping[str, Value] | None = None, kind: str = "internal", error: str = "",
) -> Span:  # fmt: skip
    identifier = _identifier(f"{parent.span:016x}/{name}/{key}")
    return Span(
        name, parent.trace, identifier, parent.span, start, max(start, end), attributes or {}, kind, error
    )


def _identifier(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) or 1
