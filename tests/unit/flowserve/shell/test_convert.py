"""Messages to values and back: nothing is lost, and whatever is wrong is named. Needs nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
from deepflow.v1 import common_pb2 as cpb
from deepflow.v1 import worker_pb2 as pb
from hypothesis import given, settings
from hypothesis import strategies as st

from flowserve.engine.types import (
    ErrorCode,
    FinishReason,
    Handover,
    KVEvents,
    KVSource,
    LoadReport,
    Role,
    TaskDelta,
    TaskError,
    TaskKind,
    TaskTimings,
    TokenLogprobs,
)
from flowserve.shell import convert

floats = st.floats(-100, 0, width=32)
tokens = st.integers(0, 2**32 - 1)
texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)


def encode(ids: list[int]) -> bytes:
    return b"".join(token.to_bytes(4, "little") for token in ids)


def submit(**kwargs: Any) -> pb.SubmitTask:
    values: dict[str, Any] = {
        "task_id": "t",
        "attempt": 1,
        "kind": cpb.TASK_KIND_UNIFIED,
        "prompt_tokens": encode([1, 2]),
        "sampling": cpb.SamplingParams(top_p=1, repetition_penalty=1),
        "max_output_tokens": 4,
    }
    return pb.SubmitTask(**{**values, **kwargs})


# -- in ------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_every_field_of_a_submit_arrives(data: st.DataObject) -> None:
    draw = data.draw
    prompt, output = draw(st.lists(tokens, max_size=8)), draw(st.lists(tokens, max_size=8))
    bias = draw(st.dictionaries(tokens, floats, max_size=3))
    sampling = cpb.SamplingParams(
        temperature=draw(st.floats(0, 4, width=32)),
        top_p=draw(st.floats(0.125, 1, width=16)),
        top_k=draw(st.integers(0, 2**32 - 1)),
        min_p=draw(st.floats(0, 1, width=32)),
        seed=draw(st.integers(0, 2**64 - 1)),
        presence_penalty=draw(floats),
        frequency_penalty=draw(floats),
        repetition_penalty=draw(st.floats(0.5, 2, width=32)),
        logit_bias=bias,
        logprobs=draw(st.none() | st.integers(0, convert.MAX_LOGPROBS)),
        prompt_logprobs=draw(st.none() | st.integers(0, convert.MAX_LOGPROBS)),
        stop_token_ids=draw(st.lists(tokens, max_size=3)),
        ignore_eos=draw(st.booleans()),
        min_tokens=draw(st.integers(0, 2**32 - 1)),
    )
    source = draw(
        st.none() | st.builds(cpb.KVSource, transfer_id=texts, te_id=texts, incarnation=texts, address=texts)
    )
    message = pb.SubmitTask(
        task_id=draw(texts),
        attempt=draw(st.integers(0, 2**32 - 1)),
        kind=draw(st.sampled_from(list(convert.KINDS))),
        model_revision=draw(texts),
        adapter_id=draw(st.text(max_size=5)),
        cache_salt=draw(st.binary(max_size=64)),
        prompt_tokens=encode(prompt),
        output_tokens=encode(output),
        sampling=sampling,
        max_output_tokens=draw(st.integers(0, 2**32 - 1)),
        priority=draw(st.integers(-(2**31), 2**31 - 1)),
        timeout_ms=draw(st.integers(0, 10**6)),
        traceparent=draw(st.text(max_size=60)),
        kv_source=source,
        processor_state=draw(st.binary(max_size=20)),
    )
    task = convert.task_of(message, "owner", now=100.0)
    assert task.owner == "owner" and task.kind is convert.KINDS[message.kind]
    assert list(task.prompt) == prompt and list(task.output) == output
    for name in ("task_id", "attempt", "adapter_id", "cache_salt", "max_output_tokens", "priority"):
        assert getattr(task, name) == getattr(message, name)
    assert (task.traceparent, task.processor_state) == (message.traceparent, message.processor_state)
    assert task.deadline == (100.0 + message.timeout_ms / 1000 if message.timeout_ms else None)
    expected = None
    if source is not None:
        expected = KVSource(source.transfer_id, source.te_id, source.incarnation, source.address)
    assert task.kv_source == expected
    for field in sampling.DESCRIPTOR.fields:
        got: Any = getattr(task.sampling, field.name)
        if field.name in ("logprobs", "prompt_logprobs"):
            assert got == (getattr(sampling, field.name) if sampling.HasField(field.name) else None)
        elif field.name == "logit_bias":
            assert got == bias
        elif field.name == "stop_token_ids":
            assert list(got) == list(sampling.stop_token_ids)
        else:
            assert got == getattr(sampling, field.name)


def test_a_deadline_is_on_the_engines_clock_and_bounded() -> None:
    assert convert.task_of(submit(timeout_ms=1500), "o", now=10.0).deadline == 11.5
    assert convert.task_of(submit(timeout_ms=0), "o", now=10.0).deadline is None
    huge = convert.task_of(submit(timeout_ms=2**64 - 1), "o", now=10.0).deadline
    assert huge == 10.0 + convert.MAX_TIMEOUT_SECONDS


def sampled(**kwargs: Any) -> pb.SubmitTask:
    return submit(sampling=cpb.SamplingParams(**{"top_p": 1.0, "repetition_penalty": 1.0, **kwargs}))


@pytest.mark.parametrize(
    ("message", "named"),
    [
        (submit(task_id=""), "task_id"),
        (submit(task_id="x" * 257), "task_id"),
        (submit(kind=0), "kind"),
        (submit(kind=99), "kind"),
        (submit(prompt_tokens=b"\1\2\3"), "prompt_tokens"),
        (submit(output_tokens=b"\1" * 5), "output_tokens"),
        (submit(prompt_tokens=bytes(4 * (convert.MAX_TOKENS + 1))), "prompt_tokens"),
        (submit(cache_salt=b"x" * 65), "cache_salt"),
        (submit(processor_state=bytes(convert.MAX_PROCESSOR_STATE_BYTES + 1)), "processor_state"),
        (submit(traceparent="x" * 300), "traceparent"),
        (submit(kv_source=cpb.KVSource(transfer_id="a")), "kv_source.te_id"),
        (sampled(temperature=-1), "temperature"),
        (sampled(temperature=math.nan), "temperature"),
        (sampled(temperature=math.inf), "temperature"),
        (sampled(top_p=0), "top_p"),
        (sampled(top_p=1.5), "top_p"),
        (sampled(min_p=-0.1), "min_p"),
        (sampled(presence_penalty=math.nan), "presence_penalty"),
        (sampled(frequency_penalty=-math.inf), "frequency_penalty"),
        (sampled(repetition_penalty=0), "repetition_penalty"),
        (sampled(logit_bias={5: math.nan}), "logit_bias"),
        (sampled(logit_bias={5: math.inf}), "logit_bias"),
        (sampled(logit_bias=dict.fromkeys(range(5000), 1.0)), "logit_bias"),
        (sampled(stop_token_ids=range(2000)), "stop_token_ids"),
        (sampled(logprobs=10_000), "logprobs"),
        (sampled(prompt_logprobs=10_000), "prompt_logprobs"),
    ],
)
def test_what_is_wrong_is_refused_by_name(message: pb.SubmitTask, named: str) -> None:
    with pytest.raises(convert.InvalidTask, match=named.replace(".", r"\.")):
        convert.task_of(message, "owner", now=0.0)


def test_a_token_can_be_forbidden_outright() -> None:
    assert convert.task_of(sampled(logit_bias={5: -math.inf}), "o", 0.0).sampling.logit_bias == {5: -math.inf}


# -- out -----------------------------------------------------------------------------------------

logprobs = st.builds(
    TokenLogprobs,
    token=tokens,
    logprob=floats,
    rank=st.integers(1, 1000),
    top=st.lists(st.tuples(tokens, floats), max_size=3).map(tuple),
)
seconds = st.floats(0, 1e6)
deltas = st.builds(
    TaskDelta,
    task_id=texts,
    attempt=st.integers(0, 2**32 - 1),
    owner=texts,
    start_index=st.integers(0, 2**32 - 1),
    tokens=st.lists(tokens, max_size=5),
    logprobs=st.none() | st.lists(logprobs, min_size=1, max_size=3),
    finish=st.none() | st.sampled_from(FinishReason),
    error=st.none() | st.builds(TaskError, st.sampled_from(ErrorCode), texts, st.booleans()),
    handover=st.none()
    | st.builds(
        Handover,
        texts,
        st.integers(1, 10**6),
        st.integers(0, 10**6).map(lambda ms: ms / 1000),
        st.binary(max_size=9),
    ),
    cached_tokens=st.none() | st.integers(0, 10**6),
    prompt_logprobs=st.none() | st.lists(logprobs, max_size=3).map(lambda entries: [None, *entries]),
    timings=st.none() | st.builds(TaskTimings, seconds, seconds, seconds, st.integers(0, 9)),
)


def delta_of(message: pb.TaskDelta, owner: str) -> TaskDelta:
    """The way back, as a gateway reads it."""

    def entry(item: pb.TokenLogprobs) -> TokenLogprobs:
        top = tuple(zip(item.top_tokens, item.top_logprobs, strict=True))
        return TokenLogprobs(item.token, item.logprob, item.rank, top)

    error = handover = timings = None
    if message.HasField("error"):
        error = TaskError(
            convert.ERROR_CODES[message.error.code], message.error.message, message.error.retryable
        )
    if message.HasField("handover"):
        given_back = message.handover
        assert given_back.source.te_id == "te-0" and given_back.source.incarnation == "inc"
        assert given_back.source.address == "host:1"
        handover = Handover(
            given_back.source.transfer_id,
            given_back.length,
            given_back.lease_ms / 1000,
            given_back.processor_state,
        )
    if message.HasField("timings"):
        t = message.timings
        timings = TaskTimings(t.queued_seconds, t.transfer_seconds, t.compute_seconds, t.preemptions)
    prompt = [entry(item) if item.rank else None for item in message.prompt_logprobs]
    return TaskDelta(
        message.task_id,
        message.attempt,
        owner,
        start_index=message.start_index,
        tokens=list(message.tokens),
        logprobs=[entry(item) for item in message.logprobs] or None,
        finish=convert.FINISH_REASONS[message.finish] if message.finish else None,
        error=error,
        handover=handover,
        cached_tokens=message.cached_tokens if message.HasField("cached_tokens") else None,
        prompt_logprobs=prompt or None,
        timings=timings,
    )


@settings(max_examples=100, deadline=None)
@given(delta=deltas)
def test_a_delta_survives_the_trip(delta: TaskDelta) -> None:
    message = convert.delta_message(delta, "te-0", "inc", "host:1")
    parsed = pb.TaskDelta.FromString(message.SerializeToString())
    assert delta_of(parsed, delta.owner) == delta


def test_load_report_and_kv_events_survive_the_trip() -> None:
    load = LoadReport(1, 2, 3, 4, 5, 6, 7, 8.5, 9.5, 10, 11, Role.DECODE, 12, True, 13.5)
    message = convert.load_message(load)
    for name in LoadReport.__slots__:
        if name != "role":
            assert getattr(message, name) == getattr(load, name)
    assert message.role == cpb.ROLE_DECODE
    events = convert.kv_events_message(KVEvents(7, [b"a" * 16], [b"b" * 16], True))
    assert (events.sequence, events.cleared) == (7, True)
    assert (list(events.stored), list(events.removed)) == ([b"a" * 16], [b"b" * 16])


def test_every_enum_value_has_one_on_the_other_side() -> None:
    pairs: list[tuple[Any, dict[Any, Any], Any]] = [
        (cpb.TaskKind, convert.KINDS, TaskKind),
        (cpb.Role, convert.ROLES, Role),
        (cpb.FinishReason, convert.FINISH_REASONS, FinishReason),
        (cpb.ErrorCode, convert.ERROR_CODES, ErrorCode),
    ]
    for wire, table, ours in pairs:
        assert set(table) == set(wire.values()) - {0}
        assert set(table.values()) == set(ours)
    assert {convert.role_message(role) for role in Role} == set(convert.ROLES)
