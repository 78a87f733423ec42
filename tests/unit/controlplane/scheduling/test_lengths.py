"""Predicted answer lengths follow the traffic, keep the share they promise, and stay silent without any."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.scheduling import lengths
from controlplane.scheduling.lengths import (
    BUCKET_TOKENS,
    MIN_SEEN,
    QUANTILE,
    Asked,
    LengthPredictor,
    Predicted,
)

CHAT = Asked("a", "chat", 400, 8192)


def taught(
    draw: Callable[[random.Random], tuple[Asked, int]], count: int = 600, seed: int = 1
) -> tuple[LengthPredictor, list[tuple[int, Predicted | None]]]:
    rng, predictor = random.Random(seed), LengthPredictor()
    said = []
    for _ in range(count):
        asked, tokens = draw(rng)
        predicted = predictor.predict(asked)
        said.append((tokens, predicted))
        predictor.learn(asked, tokens, predicted)
    return predictor, said


def test_nothing_is_predicted_before_enough_was_seen() -> None:
    predictor = LengthPredictor()
    assert predictor.predict(CHAT) is None
    for _ in range(MIN_SEEN):
        assert predictor.predict(CHAT) is None
        predictor.learn(CHAT, 100, None)
    found = predictor.predict(CHAT)
    assert found is not None and found.tokens == BUCKET_TOKENS


def test_each_tenant_and_endpoint_has_answers_of_its_own() -> None:
    short, long = replace(CHAT, tenant="short"), replace(CHAT, tenant="long", endpoint="completion")

    def draw(rng: random.Random) -> tuple[Asked, int]:
        return (short, rng.randrange(60, 120)) if rng.random() < 0.5 else (long, rng.randrange(1100, 1200))

    predictor, _ = taught(draw)
    one, other = predictor.predict(short), predictor.predict(long)
    assert one is not None and other is not None
    assert one.likely == 128
    assert other.likely in (1152, 1280)
    assert predictor.accuracy.hits > 0.5


def test_the_classifier_speaks_where_the_prompt_tells_the_length() -> None:
    """One tenant, two templates: the beginning says which."""

    def draw(rng: random.Random) -> tuple[Asked, int]:
        beginning = rng.randrange(2)
        return replace(CHAT, beginning=beginning), 50 if beginning else 700

    predictor, said = taught(draw)
    assert predictor.accuracy.classifier_speaks
    late = [(tokens, found) for tokens, found in said[-200:] if found is not None]
    assert sum(found.close(tokens) for tokens, found in late) > 190
    assert {found.source for _, found in late} == {"classifier"}


def test_the_histogram_speaks_where_the_prompt_tells_nothing() -> None:
    def draw(rng: random.Random) -> tuple[Asked, int]:
        return replace(CHAT, prompt=rng.randrange(1, 5000)), int(rng.expovariate(1 / 600))

    predictor, said = taught(draw, 1500)
    covered = [tokens <= found.tokens for tokens, found in said[500:] if found is not None]
    assert sum(covered) / len(covered) == pytest.approx(QUANTILE, abs=0.06)
    assert predictor.accuracy.covered == pytest.approx(QUANTILE, abs=0.15)


def test_what_was_promised_holds_again_after_the_traffic_changed() -> None:
    turn = [0]

    def draw(rng: random.Random) -> tuple[Asked, int]:
        turn[0] += 1
        return CHAT, rng.randrange(100, 300) if turn[0] < 500 else rng.randrange(1000, 3000)

    _, said = taught(draw, 1500)
    covered = [tokens <= found.tokens for tokens, found in said[800:] if found is not None]
    assert sum(covered) / len(covered) == pytest.approx(QUANTILE, abs=0.08)


def test_what_it_remembers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lengths, "MAX_KEYS", 5)
    predictor = LengthPredictor()
    for number in range(50):
        predictor.learn(replace(CHAT, tenant=f"t{number}"), 10, None)
    assert len(predictor._keys) == 5


@given(
    st.lists(
        st.tuples(
            st.sampled_from("ab"), st.integers(0, 20_000), st.integers(0, 20_000), st.integers(0, 9000)
        ),
        max_size=120,
    )
)
def test_a_prediction_is_within_the_requests_bound_and_never_fails(
    seen: list[tuple[str, int, int, int]],
) -> None:
    predictor = LengthPredictor()
    for tenant, prompt, bound, tokens in seen:
        asked = Asked(tenant, "chat", prompt, bound)
        found = predictor.predict(asked)
        if found is not None:
            assert 1 <= found.likely <= max(bound, 1)
            assert 1 <= found.tokens <= max(bound, 1)
        predictor.learn(asked, min(tokens, bound), found)
