"""Drawing tokens: golden numbers, every filter against a naive reference, rows that stand alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from unittest import mock

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st

from flowserve.engine.processors import TokenChoices
from flowserve.engine.sampling import SamplingError, sample, token_logprobs, uniform
from flowserve.engine.types import SamplingParams
from flowserve.executor.interface import SampleSpec

VOCAB = 24
CHI_SQUARE_LIMIT = 36.1  # 7 degrees of freedom, one in 100,000; seeds are fixed, so this never flickers


def spec(
    params: SamplingParams,
    prompt: Sequence[int] = (1, 2),
    output: Sequence[int] = (),
    index: int | None = None,
    ends: tuple[int, ...] = (),
    processor: object | None = None,
) -> SampleSpec:
    return SampleSpec(params, prompt, output, len(output) if index is None else index, ends, processor)


def draw(logits: torch.Tensor, *specs: SampleSpec) -> list[int | None]:
    return [drawn.token for drawn in sample(logits.clone(), specs)]


# -- the uniform numbers --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seed", "index", "value"),
    [
        (0, 0, 0.49050645623222144),
        (0, 1, 0.5089388727797729),
        (42, 0, 0.6935608555874578),
        (42, 1000, 0.17070897189693068),
        (2**64 - 1, 0, 0.7816672594597097),
        (2**63, 7, 0.9922309650472999),
    ],
)
def test_uniforms_are_pinned(seed: int, index: int, value: float) -> None:
    """These numbers are part of the contract: another executor must draw the same tokens for a seed."""
    assert uniform(seed, index) == value


def test_uniforms_are_spread_over_seeds_and_over_indices() -> None:
    for values in ([uniform(9, i) for i in range(8000)], [uniform(s, 3) for s in range(8000)]):
        assert all(0.0 <= value < 1.0 for value in values)
        counts = np.histogram(values, bins=8, range=(0, 1))[0]
        assert ((counts - 1000) ** 2 / 1000).sum() < CHI_SQUARE_LIMIT
        assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.05


# -- the distribution -----------------------------------------------------------------------------


def test_tokens_are_drawn_as_often_as_their_probability_says() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, 1.5, -0.5, 0.3])
    temperature, count = 0.7, 8000
    specs = [spec(SamplingParams(temperature=temperature, seed=1234), index=i) for i in range(count)]
    tokens = draw(logits.repeat(count, 1), *specs)
    expected = (logits.double() / temperature).softmax(-1).numpy() * count
    counts = np.bincount(np.array(tokens, np.int64), minlength=8)
    assert ((counts - expected) ** 2 / expected).sum() < CHI_SQUARE_LIMIT


def test_seed_and_index_alone_decide() -> None:
    logits = torch.randn(1, 1000, generator=torch.Generator().manual_seed(1))
    params = SamplingParams(seed=5)
    a = draw(logits, spec(params, prompt=[1], output=[7, 8], index=2))
    b = draw(logits, spec(params, prompt=[3, 4], output=[9, 9], index=2))
    assert a == b
    others = {draw(logits, spec(params, index=i))[0] for i in range(50)}
    assert len(others) > 25


def test_greedy_takes_the_peak_and_the_lower_id_of_two() -> None:
    logits = torch.zeros(1, 8)
    logits[0, [3, 5]] = 4.0
    assert draw(logits, spec(SamplingParams(temperature=0.0))) == [3]


@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e-12])
def test_temperatures_near_zero_are_greedy(temperature: float) -> None:
    logits = torch.tensor([[1.0, 3.0, 2.999, -50.0]])
    assert {draw(logits, spec(SamplingParams(temperature=temperature, seed=s)))[0] for s in range(20)} == {1}


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.999999}, {"top_k": 5, "min_p": 1e-9}])
def test_forbidden_tokens_are_never_drawn_at_either_end(filters: dict[str, float]) -> None:
    logits = torch.full((200, 6), -torch.inf)
    logits[:, 2:4] = 0.0
    given = [spec(SamplingParams(seed=s, **filters)) for s in range(200)]  # type: ignore[arg-type]
    assert set(draw(logits, *given)) == {2, 3}


# -- filters and penalties against a naive reference ----------------------------------------------


def naive(line: list[float], given: SampleSpec) -> int:
    """The documented order, one token at a time."""
    p = given.params
    x = [np.float32(value) for value in line]
    if given.index < p.min_tokens:
        for token in given.eos_token_ids:
            x[token] = np.float32(-np.inf)
    if p.repetition_penalty != 1.0:
        for token in set(given.prompt) | set(given.output):
            r = np.float32(p.repetition_penalty)
            x[token] = x[token] / r if x[token] > 0 else x[token] * r
    for token in set(given.output):
        count = np.float32(list(given.output).count(token))
        penalty = np.float32(p.frequency_penalty) * count + np.float32(p.presence_penalty)
        x[token] = x[token] - penalty
    for token, bias in p.logit_bias.items():
        x[token] = x[token] + np.float32(bias)
    best = max(range(len(x)), key=lambda i: (x[i], -i))
    if p.temperature == 0:
        return best
    scaled = [(value - x[best]) / np.float32(p.temperature) for value in x]
    order = sorted((i for i in range(len(x)) if scaled[i] > -np.inf), key=lambda i: (-scaled[i], i))
    if 0 < p.top_k < len(x):
        edge = scaled[order[min(p.top_k, len(order)) - 1]]
        order = [i for i in order if scaled[i] >= edge]
    weights = {i: math.exp(float(scaled[i])) for i in order}
    if p.top_p < 1:
        total, mass, kept = sum(weights.values()), 0.0, []
        for i in order:
            kept.append(i)
            mass += weights[i]
            if mass >= p.top_p * total - 1e-9:
                break
        order = kept
    if p.min_p > 0:
        order = [i for i in order if weights[i] >= p.min_p * (1 - 1e-6)]
    order.sort()
    target, mass = uniform(p.seed, given.index) * sum(weights[i] for i in order), 0.0
    for i in order:
        mass += weights[i]
        if mass > target:
            return i
    return order[-1]


tokens = st.integers(0, VOCAB - 1)
# Steps of an odd size: sums of weights do not fall on the thresholds below but by design of the draw.
lines = st.lists(st.integers(-40, 40).map(lambda n: n * 0.3137), min_size=VOCAB, max_size=VOCAB)
params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.31, 0.7, 1.0, 1.9]),
    top_p=st.sampled_from([1.0, 1.0, 0.97, 0.83, 0.411, 0.05]),
    top_k=st.sampled_from([0, 0, 1, 2, 5, 23, 24, 1000]),
    min_p=st.sampled_from([0.0, 0.0, 0.0123, 0.217, 0.93]),
    seed=st.integers(0, 2**64 - 1),
    presence_penalty=st.sampled_from([0.0, 0.53, -1.07]),
    frequency_penalty=st.sampled_from([0.0, 0.29, -0.31]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.77]),
    logit_bias=st.dictionaries(tokens, st.sampled_from([-100.0, -1.3, 2.7, -math.inf]), max_size=3),
    min_tokens=st.sampled_from([0, 0, 3, 100]),
)
specs = st.builds(
    spec,
    params=params,
    prompt=st.lists(tokens, min_size=1, max_size=6),
    output=st.lists(tokens, max_size=6),
    ends=st.just((4, 9)),
)


@hypothesis.given(st.lists(st.tuples(lines, specs), min_size=1, max_size=12))
@settings(max_examples=150, deadline=None)
def test_every_row_is_what_the_documented_order_gives_alone_and_together(
    rows: list[tuple[list[float], SampleSpec]],
) -> None:
    logits = torch.tensor([line for line, _ in rows])
    together = draw(logits, *(given for _, given in rows))
    alone = [draw(logits[i : i + 1], given)[0] for i, (_, given) in enumerate(rows)]
    assert together == alone
    for (line, asked), token in zip(rows, together, strict=True):
        assert token is not None
        # Two tokens whose weights meet exactly at the draw may differ by rounding; nothing else may.
        expected = naive(line, asked)
        assert token == expected or _at_an_edge(line, asked, {token, expected})


def _at_an_edge(line: list[float], given: SampleSpec, pair: set[int]) -> bool:
    """Whether a nudge of the draw by float32's rounding swaps the two."""
    u = uniform(given.params.seed, given.index)
    seen = set()
    for nudge in (-1e-6, 0.0, 1e-6):
        with mock.patch(f"{__name__}.uniform", lambda *_, nudge=nudge: min(max(u + nudge, 0.0), 1.0)):
            seen.add(naive(line, given))
    return pair <= seen


@pytest.mark.parametrize("scale", [0.01, 0.5, 3.0])
def test_filters_hold_on_a_whole_vocabulary_flat_or_peaked(scale: float) -> None:
    """Where the few candidates above a floor do not do, more are looked at: all the same tokens."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(1, 20_000, generator=generator) * scale
    for params in (
        SamplingParams(top_p=0.95, seed=1),
        SamplingParams(top_p=0.5, top_k=3000, seed=2),
        SamplingParams(top_k=15_000, min_p=0.01, seed=3),
        SamplingParams(temperature=3.0, top_p=0.999, min_p=1e-4, seed=4),
    ):
        for index in range(6):
            given = spec(params, index=index)
            line = logits[0].tolist()
            token = draw(logits, given)[0]
            assert token is not None
            expected = naive(line, given)
            assert token == expected or _at_an_edge(line, given, {token, expected})


# -- log-probabilities ----------------------------------------------------------------------------


def test_logprobs_are_of_the_raw_distribution_whatever_is_done_to_it() -> None:
    logits = torch.tensor([[1.0, 4.0, 2.0, 3.0, 0.0], [0.0, 1.0, 2.0, 3.0, 4.0]])
    params = SamplingParams(temperature=0.0, logit_bias={1: -100.0}, logprobs=2)
    first, second = sample(logits.clone(), [spec(params), spec(SamplingParams(temperature=0.0, logprobs=0))])
    raw = logits.log_softmax(-1)
    assert first.token == 3 and first.logprobs is not None
    assert first.logprobs.rank == 2
    assert first.logprobs.logprob == pytest.approx(raw[0, 3].item())
    assert [token for token, _ in first.logprobs.top] == [1, 3]
    assert [value for _, value in first.logprobs.top] == pytest.approx(raw[0, [1, 3]].tolist())
    assert second.logprobs is not None and second.logprobs.top == () and second.logprobs.rank == 1


def test_more_alternatives_than_tokens_are_all_of_them() -> None:
    raw = torch.tensor([[0.0, 1.0, 2.0]]).log_softmax(-1)
    [scores] = token_logprobs(raw, [0], [20])
    assert [token for token, _ in scores.top] == [2, 1, 0] and scores.rank == 3


# -- rows that cannot be drawn from ---------------------------------------------------------------


class Broken:
    def apply(self, logits: torch.Tensor, prompt: Sequence[int], output: Sequence[int]) -> torch.Tensor:
        raise RuntimeError("torn grammar")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_a_token_fails_alone(temperature: float) -> None:
    logits = torch.zeros(7, 8)
    logits[:, 6] = 9.0
    logits[1, 0] = torch.nan
    logits[2, 0] = torch.inf
    plain = SamplingParams(temperature=temperature, top_k=1)
    everything = SamplingParams(temperature=temperature, logit_bias=dict.fromkeys(range(8), -math.inf))
    outside = SamplingParams(temperature=temperature, logit_bias={8: 1.0}, logprobs=1)
    drawn = sample(
        logits,
        [
            spec(plain),
            spec(plain),
            spec(plain),
            spec(everything),
            spec(outside),
            spec(plain, processor=Broken()),
            spec(plain, ends=(2, 99), index=0),
        ],
    )
    assert [one.token for one in drawn] == [6, None, None, None, None, None, 6]
    for one, words in zip(
        drawn[1:6], ["not finite", "not finite", "no token", "vocabulary", "torn grammar"], strict=True
    ):
        assert isinstance(one.error, SamplingError) and words in str(one.error)
        assert one.logprobs is None


def test_an_end_token_outside_of_the_vocabulary_is_no_error() -> None:
    logits = torch.tensor([[0.0, 5.0, 1.0]])
    params = SamplingParams(temperature=0.0, min_tokens=4)
    assert draw(logits, spec(params, ends=(1, 77))) == [2]


def test_a_processor_forbids_before_penalties_and_bias() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    processor = TokenChoices([[0, 1], [1]], end_token=3)
    params = SamplingParams(temperature=0.0, logit_bias={0: 5.0, 3: 100.0})
    assert draw(logits, spec(params, processor=processor)) == [0]


def test_no_rows_are_no_draws() -> None:
    assert sample(torch.zeros(0, 8), []) == []
