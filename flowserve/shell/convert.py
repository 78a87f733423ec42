"""Between the worker protocol's messages and the engine's values; the border where input is checked.

Everything a gateway can get wrong is refused here or by `Engine.submit`, with words, before it
costs memory. Pure functions; time is passed in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from deepflow.v1 import common_pb2 as cpb
from deepflow.v1 import worker_pb2 as pb

from flowserve.engine.types import (
    EngineTask,
    ErrorCode,
    FinishReason,
    Handover,
    KVEvents,
    KVSource,
    LoadReport,
    PrefixSource,
    Role,
    SamplingParams,
    TaskDelta,
    TaskError,
    TaskKind,
    TokenLogprobs,
)

TOKEN_DTYPE = np.dtype("<u4")
# Bounds of one submit (ours): far above what any model here takes, far below what hurts a worker.
MAX_TOKENS = 1 << 20
MAX_ID_CHARS = 256
MAX_SALT_BYTES = 64  # what the block identities' key takes (kvtransfer.blockhash)
MAX_STOP_TOKENS = 1024
MAX_LOGIT_BIAS = 4096
MAX_LOGPROBS = 128
MAX_PROCESSOR_STATE_BYTES = 1 << 20
MAX_TRACEPARENT_CHARS = 256
MAX_TIMEOUT_SECONDS = 7 * 86_400.0
MAX_BIAS = 1e4
MAX_PENALTY = 1e4

KINDS = {
    cpb.TASK_KIND_UNIFIED: TaskKind.UNIFIED,
    cpb.TASK_KIND_PREFILL: TaskKind.PREFILL,
    cpb.TASK_KIND_DECODE: TaskKind.DECODE,
}
ROLES = {
    cpb.ROLE_COLOCATED: Role.COLOCATED,
    cpb.ROLE_PREFILL: Role.PREFILL,
    cpb.ROLE_DECODE: Role.DECODE,
}
FINISH_REASONS = {
    cpb.FINISH_REASON_STOP: FinishReason.STOP,
    cpb.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    cpb.FINISH_REASON_HANDOVER: FinishReason.HANDOVER,
    cpb.FINISH_REASON_ABORTED: FinishReason.ABORTED,
    cpb.FINISH_REASON_ERROR: FinishReason.ERROR,
}
ERROR_CODES = {
    cpb.ERROR_CODE_INVALID_ARGUMENT: ErrorCode.INVALID_ARGUMENT,
    cpb.ERROR_CODE_QUEUE_FULL: ErrorCode.QUEUE_FULL,
    cpb.ERROR_CODE_DRAINING: ErrorCode.DRAINING,
    cpb.ERROR_CODE_MODEL_NOT_LOADED: ErrorCode.MODEL_NOT_LOADED,
    cpb.ERROR_CODE_KV_TRANSFER_FAILED: ErrorCode.KV_TRANSFER_FAILED,
    cpb.ERROR_CODE_DEADLINE_EXCEEDED: ErrorCode.DEADLINE_EXCEEDED,
    cpb.ERROR_CODE_OUT_OF_KV: ErrorCode.OUT_OF_KV,
    cpb.ERROR_CODE_INTERNAL: ErrorCode.INTERNAL,
}
_ROLES_OUT = {value: key for key, value in ROLES.items()}
_FINISH_OUT = {value: key for key, value in FINISH_REASONS.items()}
_ERRORS_OUT = {value: key for key, value in ERROR_CODES.items()}
T = TypeVar("T")


class InvalidTask(Exception):
    """A SubmitTask that no executor could run; the message names the field."""


# -- in ------------------------------------------------------------------------------------------


def task_of(message: pb.SubmitTask, owner: str, now: float) -> EngineTask:
    """The engine's task. `now` is the engine's clock in seconds. Raises InvalidTask."""
    if not 0 < len(message.task_id) <= MAX_ID_CHARS:
        raise InvalidTask(f"task_id must have 1 to {MAX_ID_CHARS} characters, has {len(message.task_id)}")
    kind = KINDS.get(message.kind)
    if kind is None:
        raise InvalidTask(f"kind {message.kind} is unknown")
    _bounded("cache_salt", message.cache_salt, MAX_SALT_BYTES)
    _bounded("processor_state", message.processor_state, MAX_PROCESSOR_STATE_BYTES)
    _bounded("traceparent", message.traceparent, MAX_TRACEPARENT_CHARS)
    _bounded("adapter_id", message.adapter_id, MAX_ID_CHARS)
    deadline = None
    if message.timeout_ms:
        deadline = now + min(message.timeout_ms / 1000, MAX_TIMEOUT_SECONDS)
    return EngineTask(
        task_id=message.task_id,
        attempt=message.attempt,
        kind=kind,
        prompt=tokens_of("prompt_tokens", message.prompt_tokens),
        sampling=sampling_of(message.sampling),
        max_output_tokens=message.max_output_tokens,
        output=tokens_of("output_tokens", message.output_tokens),
        owner=owner,
        adapter_id=message.adapter_id,
        cache_salt=message.cache_salt,
        priority=message.priority,
        deadline=deadline,
        kv_source=source_of(message.kv_source) if message.HasField("kv_source") else None,
        processor_state=message.processor_state,
        traceparent=message.traceparent,
        tell_start=message.tell_start,
        early=message.early,
        prefix_source=prefix_of(message.prefix_source) if message.HasField("prefix_source") else None,
    )


def tokens_of(name: str, data: bytes) -> list[int]:
    """Little-endian uint32 each. Raises InvalidTask."""
    if len(data) % TOKEN_DTYPE.itemsize:
        raise InvalidTask(f"{name}: {len(data)} bytes are not whole tokens of {TOKEN_DTYPE.itemsize}")
    _bounded(name, data, MAX_TOKENS * TOKEN_DTYPE.itemsize)
    tokens: list[int] = np.frombuffer(data, TOKEN_DTYPE).tolist()
    return tokens


def source_of(message: cpb.KVSource) -> KVSource:
    """Raises InvalidTask."""
    for name in ("transfer_id", "te_id", "incarnation", "address"):
        value = getattr(message, name)
        if not 0 < len(value) <= 2 * MAX_ID_CHARS:
            raise InvalidTask(f"kv_source.{name} must have 1 to {2 * MAX_ID_CHARS} characters")
    return KVSource(message.transfer_id, message.te_id, message.incarnation, message.address)


def prefix_of(message: pb.PrefixSource) -> PrefixSource:
    """Raises InvalidTask."""
    for name in ("te_id", "incarnation", "address"):
        if not 0 < len(getattr(message, name)) <= 2 * MAX_ID_CHARS:
            raise InvalidTask(f"prefix_source.{name} must have 1 to {2 * MAX_ID_CHARS} characters")
    return PrefixSource(message.te_id, message.incarnation, message.address, message.tokens)


def sampling_of(message: cpb.SamplingParams) -> SamplingParams:
    """Every default is the gateway's to fill: a field left at zero means zero. Raises InvalidTask."""
    _within("temperature", message.temperature, 0, MAX_PENALTY)
    _within("top_p", message.top_p, 0, 1, open_low=True)
    _within("min_p", message.min_p, 0, 1)
    for name in ("presence_penalty", "frequency_penalty"):
        _within(name, getattr(message, name), -MAX_PENALTY, MAX_PENALTY)
    _within("repetition_penalty", message.repetition_penalty, 0, MAX_PENALTY, open_low=True)
    _bounded("logit_bias", message.logit_bias, MAX_LOGIT_BIAS)
    for token, bias in message.logit_bias.items():
        # -inf is how a token is forbidden outright
        if bias != -math.inf:
            _within(f"logit_bias[{token}]", bias, -MAX_BIAS, MAX_BIAS)
    _bounded("stop_token_ids", message.stop_token_ids, MAX_STOP_TOKENS)
    for name in ("logprobs", "prompt_logprobs"):
        if message.HasField(name) and getattr(message, name) > MAX_LOGPROBS:  # type: ignore[arg-type]  # one of two literals
            raise InvalidTask(f"{name} must be at most {MAX_LOGPROBS}, is {getattr(message, name)}")
    return SamplingParams(
        temperature=message.temperature,
        top_p=message.top_p,
        top_k=message.top_k,
        min_p=message.min_p,
        seed=message.seed,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        repetition_penalty=message.repetition_penalty,
        logit_bias=dict(message.logit_bias),
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        min_tokens=message.min_tokens,
    )


def _bounded(name: str, value: bytes | str | Sequence[object] | object, limit: int) -> None:
    size = len(value)  # type: ignore[arg-type]  # protobuf's containers have a length, not a common type
    if size > limit:
        raise InvalidTask(f"{name} must not be longer than {limit}, is {size}")


def _within(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    """NaN is outside of every range."""
    if not low <= value <= high or (open_low and value == low):
        bracket = "(" if open_low else "["
        raise InvalidTask(f"{name} must be in {bracket}{low:g}, {high:g}], is {value:g}")


# -- out -----------------------------------------------------------------------------------------


def role_message(role: Role) -> cpb.Role.ValueType:
    return _ROLES_OUT[role]


def error_message(error: TaskError) -> cpb.TaskError:
    return cpb.TaskError(code=_ERRORS_OUT[error.code], message=error.message, retryable=error.retryable)


def load_message(load: LoadReport) -> cpb.LoadReport:
    return cpb.LoadReport(
        step=load.step,
        waiting=load.waiting,
        running=load.running,
        queued_prefill_tokens=load.queued_prefill_tokens,
        kv_blocks_total=load.kv_blocks_total,
        kv_blocks_free=load.kv_blocks_free,
        kv_blocks_cached=load.kv_blocks_cached,
        prefill_tokens_per_second=load.prefill_tokens_per_second,
        decode_step_seconds=load.decode_step_seconds,
        transfers_out=load.transfers_out,
        transfers_in=load.transfers_in,
        role=role_message(load.role),
        role_epoch=load.role_epoch,
        draining=load.draining,
        age_seconds=load.age_seconds,
    )


def kv_events_message(events: KVEvents) -> pb.KVEvents:
    return pb.KVEvents(
        sequence=events.sequence, stored=events.stored, removed=events.removed, cleared=events.cleared
    )


def logprobs_message(entry: TokenLogprobs | None) -> pb.TokenLogprobs:
    """None, the first prompt token's place, becomes an empty message."""
    if entry is None:
        return pb.TokenLogprobs()
    return pb.TokenLogprobs(
        token=entry.token,
        logprob=entry.logprob,
        rank=entry.rank,
        top_tokens=[token for token, _ in entry.top],
        top_logprobs=[logprob for _, logprob in entry.top],
    )


def handover_message(handover: Handover, te_id: str, incarnation: str, address: str) -> pb.Handover:
    """The engine knows the transfer; who offers it, and where, is the shell's to add."""
    source = cpb.KVSource(
        transfer_id=handover.transfer_id, te_id=te_id, incarnation=incarnation, address=address
    )
    return pb.Handover(
        source=source,
        length=handover.length,
        lease_ms=round(handover.lease_seconds * 1000),
        processor_state=handover.processor_state,
    )


def delta_message(delta: TaskDelta, te_id: str, incarnation: str, address: str) -> pb.TaskDelta:
    message = pb.TaskDelta(
        task_id=delta.task_id, attempt=delta.attempt, start_index=delta.start_index, tokens=delta.tokens
    )
    if delta.logprobs:
        message.logprobs.extend(map(logprobs_message, delta.logprobs))
    if delta.finish is not None:
        message.finish = _FINISH_OUT[delta.finish]
    if delta.error is not None:
        message.error.CopyFrom(error_message(delta.error))
    if delta.handover is not None:
        message.handover.CopyFrom(handover_message(delta.handover, te_id, incarnation, address))
    if delta.cached_tokens is not None:
        message.cached_tokens = delta.cached_tokens
    if delta.prompt_logprobs:
        message.prompt_logprobs.extend(map(logprobs_message, delta.prompt_logprobs))
    if delta.timings is not None:
        message.timings.queued_seconds = delta.timings.queued_seconds
        message.timings.transfer_seconds = delta.timings.transfer_seconds
        message.timings.compute_seconds = delta.timings.compute_seconds
        message.timings.preemptions = delta.timings.preemptions
    return message
