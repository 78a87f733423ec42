"""Which requests are traced, and spans of what was recorded."""

from __future__ import annotations

import pytest
from deepflow.v1 import worker_pb2

from controlplane.jobs.traces import job_spans, sampled, start_spans
from controlplane.jobs.tracing import Sampler, Tracing, TracingError

from .conftest import Bench

LOW, HIGH = f"00-{'1' * 32}-{'2' * 16}-01", f"00-{'f' * 32}-{'2' * 16}-00"


@pytest.mark.parametrize(
    ("env", "kept"),
    [
        ({}, (True, True, True, False)),
        ({"OTEL_TRACES_SAMPLER": "always_off"}, (False, False, False, False)),
        ({"OTEL_TRACES_SAMPLER": "parentbased_always_off"}, (False, False, True, False)),
        (
            {"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.5"},
            (True, False, True, False),
        ),
    ],
)
def test_samplers_are_those_of_the_standard(env: dict[str, str], kept: tuple[bool, ...]) -> None:
    sampler = Sampler.from_env(env)
    found = [sampler.keeps(context, parent) for parent in ("", "3" * 16) for context in (LOW, HIGH)]
    assert tuple(found) == kept


@pytest.mark.parametrize(
    "env",
    [
        {"OTEL_TRACES_SAMPLER": "often"},
        {"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "2"},
        {"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "half"},
    ],
)
def test_a_sampler_that_is_none_is_refused(env: dict[str, str]) -> None:
    with pytest.raises(TracingError, match="OTEL_TRACES_SAMPLER"):
        Sampler.from_env(env)


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_SDK_DISABLED": "true"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_without_a_collector_nothing_is_traced(env: dict[str, str]) -> None:
    assert Tracing.from_env(env, "gw") is None


async def test_the_same_record_tells_of_the_same_spans(bench: Bench) -> None:
    bench.fleet.add("a")
    job = bench.submit(traceparent=LOW, parent_span="3" * 16)
    assert job_spans(job.record("gw", bench.clock.now)) == []  # it has not ended
    bench.fleet.last.finish([1])
    record = job.record("gw", bench.clock.now)
    spans = job_spans(record)
    assert spans == job_spans(record)
    assert len({span.span for span in spans}) == len(spans) > 1
    assert spans[0].parent == int("3" * 16, 16) and sampled(LOW) and not sampled("")
    assert all(span.start <= span.end for span in spans)


def test_two_gateways_tell_of_one_start() -> None:
    record = worker_pb2.ExecutorRecord(te_id="te", start_path="fork", ready_unix_ms=5_000)
    for phase, seconds in (("te_load", 1.0), ("te_post_load", 0.5)):
        record.start_phases.add(phase=phase, seconds=seconds)
    one, two = start_spans(record, 5.1, "a"), start_spans(record, 4.9, "b")
    assert [span.name for span in one] == ["start fork", "te_load", "te_post_load", "scaler_post"]
    assert one[:3] == two[:3] and one[3].span != two[3].span
    assert (one[0].start, one[0].end, one[1].end, one[3].end, two[3].end) == (3.5, 5.0, 4.5, 5.1, 5.0)
    assert start_spans(worker_pb2.ExecutorRecord(te_id="te"), 1.0, "a") == []
