"""Sends spans to an OpenTelemetry collector (OTLP over HTTP), behind serving's back.

On where OTEL_EXPORTER_OTLP_ENDPOINT (or ..._TRACES_ENDPOINT) is set, off otherwise and with
OTEL_SDK_DISABLED; the exporter is OpenTelemetry's own and heeds its other variables (headers, timeout,
compression, certificates), as do service name and resource attributes. Serving hands over what was recorded
and goes on: spans are built and sent on a thread, the queue is bounded, and what cannot be sent is counted.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from controlplane.jobs import metrics
from controlplane.jobs.records import JobRecord
from controlplane.jobs.traces import Span, job_spans, sampled

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan

log = logging.getLogger(__name__)

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
SAMPLER_ARG = "OTEL_TRACES_SAMPLER_ARG"
MAX_QUEUED = 2048
"""Jobs and starts that wait to be sent, as OpenTelemetry's own queue of spans; more are dropped."""
BATCH = 128
PAUSE_SECONDS = 1.0
END_SECONDS = 5.0
"""For what is left when the gateway ends."""

Build = Callable[[], list[Span]]


class TracingError(Exception):
    """Traces are asked for and cannot be sent."""


@dataclass(frozen=True, slots=True)
class Sampler:
    """OpenTelemetry's samplers by name: which requests are told of."""

    ratio: float = 1.0  # of traces that nobody decided on, by their id
    parent_based: bool = True  # the client's flag decides where it gave a trace context

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Sampler:
        """Of OTEL_TRACES_SAMPLER and OTEL_TRACES_SAMPLER_ARG. Raises TracingError."""
        name = env.get("OTEL_TRACES_SAMPLER") or "parentbased_always_on"
        kind = name.removeprefix("parentbased_")
        try:
            ratios = {"always_on": 1.0, "always_off": 0.0, "traceidratio": float(env.get(SAMPLER_ARG) or 1.0)}
            ratio = ratios[kind]
        except (KeyError, ValueError):
            raise TracingError(f"OTEL_TRACES_SAMPLER {name!r} with {SAMPLER_ARG} {env.get(SAMPLER_ARG)!r}: "
                               "always_on, always_off or traceidratio with a ratio, "
                               "each also as parentbased_...") from None  # fmt: skip
        if not 0 <= ratio <= 1:
            raise TracingError(f"{SAMPLER_ARG} {ratio} must lie between 0 and 1")
        return cls(ratio, name != kind)

    def keeps(self, traceparent: str, parent_span: str) -> bool:
        if self.parent_based and parent_span:
            return sampled(traceparent)
        return len(traceparent) == 55 and int(traceparent[19:35], 16) < self.ratio * 2**64


class Tracing:
    """`job` and `start` from serving; `run` until cancelled; `flush` at the end."""

    def __init__(self, exporter: Any, resource: Resource, sampler: Sampler) -> None:
        """`exporter` is an opentelemetry.sdk SpanExporter."""
        self._exporter = exporter
        self._sampler = sampler
        self._resource = resource
        self._queue: deque[Build] = deque()
        self._work = asyncio.Event()
        self._failing = False

    @classmethod
    def from_env(cls, env: Mapping[str, str], gateway_id: str) -> Tracing | None:
        """None where no traces are asked for. Raises TracingError."""
        asked = any(env.get(name) for name in ENDPOINTS)
        if not asked or env.get("OTEL_SDK_DISABLED", "").lower() == "true":
            return None
        if env.get("OTEL_TRACES_EXPORTER", "otlp") == "none":
            return None
        sampler = Sampler.from_env(env)
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        except ImportError as error:
            raise TracingError(
                f"{ENDPOINTS[1]} is set but traces cannot be sent ({error}): pip install 'deepflow[otel]'"
            ) from error
        base = Resource({"service.name": "deepflow-gateway", "service.instance.id": gateway_id})
        tracing = cls(OTLPSpanExporter(), base.merge(OTELResourceDetector().detect()), sampler)
        log.info("traces go to %s", next(env[name] for name in ENDPOINTS if env.get(name)))
        return tracing

    # -- from serving ----------------------------------------------------------------------------

    def job(self, record: JobRecord) -> None:
        """A job has ended. Never blocks; nothing for one that is not sampled."""
        if self._sampler.keeps(record.request.traceparent, record.request.parent_span):
            self._put(lambda: job_spans(record))

    def start(self, build: Build) -> None:
        """`build` makes the spans of an executor's start. Never blocks."""
        self._put(build)

    def _put(self, build: Build) -> None:
        if len(self._queue) >= MAX_QUEUED:
            metrics.TRACES.labels("dropped").inc()
            return
        self._queue.append(build)
        self._work.set()

    # -- behind it -------------------------------------------------------------------------------

    async def run(self) -> None:
        while True:
            await self._work.wait()
            await asyncio.sleep(PAUSE_SECONDS)
            await self.flush()

    async def flush(self) -> None:
        """Sends what waits; what fails is dropped and counted."""
        self._work.clear()
        while self._queue:
            batch = [self._queue.popleft() for _ in range(min(BATCH, len(self._queue)))]
            sent = await asyncio.to_thread(self._send, batch)
            metrics.TRACES.labels("sent" if sent else "failed").inc(len(batch))
            if sent == self._failing:
                if sent:
                    log.info("traces are sent again")
                else:
                    log.warning("traces cannot be sent, serving goes on")
            self._failing = not sent

    async def close(self) -> None:
        """Sends what is left, within a bound."""
        try:
            async with asyncio.timeout(END_SECONDS):
                await self.flush()
        except TimeoutError:
            metrics.TRACES.labels("dropped").inc(len(self._queue))
        await asyncio.to_thread(self._exporter.shutdown)

    def _send(self, batch: list[Build]) -> bool:
        """On a worker thread."""
        from opentelemetry.sdk.trace.export import SpanExportResult

        try:
            spans = [self._readable(span) for build in batch for span in build()]
            return not spans or self._exporter.export(spans) is SpanExportResult.SUCCESS
        except Exception:  # a library's boundary: whatever it raises, serving goes on
            log.exception("spans could not be made or sent")
            return False

    def _readable(self, span: Span) -> ReadableSpan:
        from opentelemetry.sdk.trace import ReadableSpan
        from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

        def context(identifier: int) -> SpanContext:
            return SpanContext(span.trace, identifier, is_remote=False, trace_flags=TraceFlags(1))

        attributes = {**span.attributes, "error.type": span.error} if span.error else dict(span.attributes)
        return ReadableSpan(
            name=span.name,
            context=context(span.span),
            parent=context(span.parent) if span.parent else None,
            resource=self._resource,
            attributes=attributes,
            kind=SpanKind[span.kind.upper()],
            status=Status(StatusCode.ERROR, span.error) if span.error else Status(StatusCode.UNSET),
            start_time=round(span.start * 1e9),
            end_time=round(span.end * 1e9),
        )
