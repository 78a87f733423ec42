"""Between the border's values and the worker protocol: sampling, seeds, tokens, log-probabilities, errors."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence

import numpy as np
from deepflow.v1 import common_pb2, worker_pb2

from controlplane.jobs.serving import Sampling, ServingError, TokenLogprobs

RETRY_AFTER_SECONDS = 1.0
"""Told to clients that met a full queue: placements turn over within seconds (ours)."""

_U64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's increment

KINDS = {
    common_pb2.TASK_KIND_UNIFIED: "unified",
    common_pb2.TASK_KIND_PREFILL: "prefill",
    common_pb2.TASK_KIND_DECODE: "decode",
}


def mix_seed(seed: int, index: int) -> int:
    """Seed of choice `index`: choice 0 draws with the request's own seed, so `n` does not change it;
    the others with splitmix64(seed + index * golden ratio), independent streams of one seed."""
    if index == 0:
        return seed & _U64
    z = (seed + index * _GOLDEN) & _U64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _U64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _U64
    return z ^ (z >> 31)


def encode_tokens(tokens: Sequence[int]) -> bytes:
    """Little-endian uint32 each."""
    packed = array("I", tokens)
    if packed.itemsize != 4:
        return np.asarray(tokens, dtype="<u4").tobytes()
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def sampling_params(sampling: Sampling, seed: int) -> common_pb2.SamplingParams:
    return common_pb2.SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        seed=seed,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        logit_bias=dict(sampling.logit_bias),
        logprobs=sampling.logprobs,
        prompt_logprobs=sampling.prompt_logprobs,
        stop_token_ids=sampling.stop_token_ids,
        ignore_eos=sampling.ignore_eos,
        min_tokens=sampling.min_tokens,
    )


def logprobs(entry: worker_pb2.TokenLogprobs) -> TokenLogprobs:
    top = tuple(zip(entry.top_tokens, entry.top_logprobs, strict=True))
    return TokenLogprobs(entry.token, entry.logprob, entry.rank, top)


def prompt_logprobs(entries: Sequence[worker_pb2.TokenLogprobs]) -> list[TokenLogprobs | None]:
    """The first prompt token has none before it."""
    return [None, *(logprobs(entry) for entry in entries[1:])]


_REFUSALS = {
    common_pb2.ERROR_CODE_QUEUE_FULL: "queue_full",
    common_pb2.ERROR_CODE_DRAINING: "draining",
    common_pb2.ERROR_CODE_MODEL_NOT_LOADED: "model_not_loaded",
}


def refusal(error: common_pb2.TaskError) -> str | None:
    """The executor did not start the task: it goes elsewhere, and nothing has failed."""
    return _REFUSALS.get(error.code)


def code_name(error: common_pb2.TaskError) -> str:
    return common_pb2.ErrorCode.Name(error.code).removeprefix("ERROR_CODE_").lower()


def final_error(error: common_pb2.TaskError) -> ServingError:
    """The client's error for one that is not tried again."""
    if error.code == common_pb2.ERROR_CODE_INVALID_ARGUMENT:
        return ServingError(400, "invalid_request", error.message)
    if error.code == common_pb2.ERROR_CODE_DEADLINE_EXCEEDED:
        return ServingError(504, "deadline_exceeded", "The request was not completed within its deadline.")
    if error.code == common_pb2.ERROR_CODE_OUT_OF_KV:
        return too_large()
    return ServingError(500, "executor_error", error.message or "The executor failed.")


def queue_full() -> ServingError:
    return ServingError(
        429,
        "queue_full",
        "All executors of this model were full for too long, or others went first.",
        retry_after=RETRY_AFTER_SECONDS,
    )


def too_large() -> ServingError:
    return ServingError(
        400,
        "context_length_exceeded",
        "The prompt and its answer do not fit any executor's KV cache. Use a shorter prompt.",
    )
