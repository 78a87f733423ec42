"""Seeds, sampling parameters and errors on the wire."""

from __future__ import annotations

import pytest
from deepflow.v1 import common_pb2, worker_pb2
from hypothesis import given
from hypothesis import strategies as st

from controlplane.jobs import wire
from controlplane.jobs.serving import Sampling


@given(seed=st.integers(-(2**63), 2**64 - 1), n=st.integers(2, 64))
def test_choices_draw_with_different_seeds_and_the_first_with_the_requests(seed: int, n: int) -> None:
    seeds = [wire.mix_seed(seed, index) for index in range(n)]
    assert seeds[0] == seed % 2**64
    assert len(set(seeds)) == n
    assert all(0 <= value < 2**64 for value in seeds)


def test_seeds_are_fixed_for_ever() -> None:
    # A replay on another gateway version must draw the same tokens: these values may never change.
    assert [wire.mix_seed(7, index) for index in (0, 1, 2)] == [
        7,
        7191089600892374487,
        309689372594955804,
    ]


def test_unset_options_stay_unset_and_zero_is_not_unset() -> None:
    message = wire.sampling_params(Sampling(), 1)
    assert not message.HasField("logprobs") and not message.HasField("prompt_logprobs")
    message = wire.sampling_params(Sampling(logprobs=0, prompt_logprobs=0, logit_bias={5: -1.0}), 1)
    assert message.HasField("logprobs") and message.HasField("prompt_logprobs")
    assert dict(message.logit_bias) == {5: -1.0}


def test_logprobs_come_back_as_values() -> None:
    entry = worker_pb2.TokenLogprobs(
        token=3, logprob=-0.5, rank=2, top_tokens=[9, 3], top_logprobs=[-0.25, -0.5]
    )
    value = wire.logprobs(entry)
    assert (value.token, value.rank, value.top) == (3, 2, ((9, -0.25), (3, -0.5)))
    assert wire.prompt_logprobs([worker_pb2.TokenLogprobs(), entry]) == [None, value]


@pytest.mark.parametrize(
    ("code", "status"),
    [
        (common_pb2.ERROR_CODE_INVALID_ARGUMENT, 400),
        (common_pb2.ERROR_CODE_OUT_OF_KV, 400),
        (common_pb2.ERROR_CODE_DEADLINE_EXCEEDED, 504),
        (common_pb2.ERROR_CODE_INTERNAL, 500),
    ],
)
def test_final_errors_have_the_clients_status(code: int, status: int) -> None:
    error = common_pb2.TaskError(code=code, message="x")  # type: ignore[arg-type]  # an enum value as int
    assert wire.final_error(error).status == status
    assert wire.refusal(error) is None
