"""Traces of real requests at a collector that speaks OTLP over HTTP."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from deepflow.v1 import worker_pb2
from prometheus_client import REGISTRY

from controlplane.jobs import tracing
from controlplane.jobs.runtime import RuntimeSettings, ServingRuntime
from controlplane.jobs.tracing import TracingError
from tests.integration.jobs.conftest import collect, linked, request

pytest.importorskip("opentelemetry.sdk", reason="traces need the extra otel: pip install 'deepflow[otel]'")
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

TRACE, CLIENT, OURS = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331", "00f067aa0ba902b7"


class Collector:
    """Keeps what it is sent; answers 503 while `down`."""

    def __init__(self) -> None:
        self.received: list[ExportTraceServiceRequest] = []
        self.down = False
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                if not outer.down:
                    outer.received.append(ExportTraceServiceRequest.FromString(body))
                self.send_response(400 if outer.down else 200)
                self.end_headers()

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def spans(self) -> list[Any]:
        return [
            span
            for sent in self.received
            for resource in sent.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]


def attributes(span: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes}


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    made = Collector()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", made.url)
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    monkeypatch.setattr(tracing, "PAUSE_SECONDS", 0.05)
    yield made
    made.server.shutdown()
    made.server.server_close()


def value(outcome: str) -> float:
    return REGISTRY.get_sample_value("deepflow_jobs_traces_total", {"outcome": outcome}) or 0.0


async def test_a_request_is_a_trace_of_its_parts_below_the_clients_span(
    open_cluster: Any, collector: Collector
) -> None:
    async with open_cluster() as cluster:
        await cluster.source("te-p", "prefill")
        await cluster.source("te-d", "decode")
        runtime = await cluster.runtime(gateway_id="gw-7")
        await linked(runtime, "te-p", "te-d")
        context = {"traceparent": f"00-{TRACE}-{OURS}-01", "parent_span": CLIENT}
        await collect(runtime.executor.submit(request(output=30, **context)))
        unsampled = {"traceparent": f"00-{TRACE[::-1]}-{OURS}-00", "parent_span": CLIENT}
        await collect(runtime.executor.submit(request(output=4, **unsampled)))
        record = worker_pb2.ExecutorRecord(te_id="te-9", start_path="hot", ready_unix_ms=1_000_000)
        record.start_phases.add(phase="te_load", seconds=0.25)
        runtime.fleet.on_start(record, 1000.01)
    spans = collector.spans()
    assert {span.trace_id.hex() for span in spans if "deepflow.start.path" not in attributes(span)} >= {TRACE}
    mine = {span.name: span for span in spans if span.trace_id.hex() == TRACE}
    assert TRACE[::-1] not in {span.trace_id.hex() for span in spans}
    root = next(span for name, span in mine.items() if name.startswith(("chat", "text_completion")))
    assert (root.span_id.hex(), root.parent_span_id.hex()) == (OURS, CLIENT)
    told = attributes(root)
    assert told["gen_ai.usage.output_tokens"] == 30
    assert told["gen_ai.response.finish_reasons"] == "length"
    for name in ("queue", "prefill", "decode"):
        assert mine[name].parent_span_id == root.span_id
        assert root.start_time_unix_nano <= mine[name].start_time_unix_nano <= mine[name].end_time_unix_nano
    assert attributes(mine["prefill"])["deepflow.executor.id"] == "te-p"
    assert attributes(mine["decode"])["deepflow.executor.id"] == "te-d"
    assert attributes(mine["decode"])["deepflow.outcome"] == "length"
    start = {span.name: span for span in spans if span.trace_id.hex() not in (TRACE, TRACE[::-1])}
    assert set(start) == {"start hot", "te_load", "scaler_post"}
    assert start["te_load"].end_time_unix_nano == start["scaler_post"].start_time_unix_nano == 1000 * 10**9
    resource = {
        one.key: one.value.string_value for one in collector.received[0].resource_spans[0].resource.attributes
    }
    assert resource["service.name"] == "deepflow-gateway"
    assert resource["service.instance.id"] == "gw-7"
    assert resource["deployment.environment.name"] == "test"


async def test_a_collector_that_refuses_costs_its_traces_alone(
    open_cluster: Any, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed, dropped, sent = value("failed"), value("dropped"), value("sent")
    collector.down = True
    async with open_cluster() as cluster:
        await cluster.source("te-0")
        runtime = await cluster.runtime()
        await linked(runtime, "te-0")
        context = {"traceparent": f"00-{TRACE}-{OURS}-01"}
        got = await collect(runtime.executor.submit(request(output=4, **context)))
        assert got.finish == {0: "length"}
        monkeypatch.setattr(tracing, "MAX_QUEUED", 0)
        await collect(runtime.executor.submit(request(output=4, **context)))
    assert (value("failed"), value("dropped")) == (failed + 1, dropped + 1)
    assert value("sent") == sent


def test_what_cannot_be_sent_is_said_before_serving(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "sometimes")
    with pytest.raises(TracingError, match="sometimes"):
        ServingRuntime(RuntimeSettings())
