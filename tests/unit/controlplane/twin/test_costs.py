"""Cost profiles: the fit recovers what made the times, files come back as they were, nonsense is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.twin.costs import CostProfile, ProfileError, fit, load_profile, roofline_profile
from controlplane.twin.measure import KNOTS, Measured, plan_steps, profile_of

TRUE = replace(
    roofline_profile(), knots=(1, 16, 512), seconds=(0.01, 0.012, 0.4), sample_seconds=1e-3, pair_seconds=2e-7
)


def measured(noise: float = 0.0) -> Measured:
    plans = plan_steps(36_000, 512, 64, 8192)
    times = {}
    for number, plan in enumerate(plans):
        shape = plan.shape(0.0)
        exact = TRUE.step(shape.tokens, shape.sampled, shape.pairs, shape.context)
        times[plan] = [exact * (1 + noise * (-1) ** number)]
    return Measured("m", "test", times, 0.001, 100, 1e9, 2.0, 4096, 16, 512, 64, 0.25, 8192)


def test_the_fit_finds_the_terms_that_made_the_times() -> None:
    profile, error = profile_of(measured(), 0.01, 0.005)
    assert error < 0.01
    for tokens in (1, 16, 64, 512):
        assert profile.curve(tokens) == pytest.approx(TRUE.curve(tokens) + 0.001, rel=0.05)
    assert profile.sample_seconds == pytest.approx(TRUE.sample_seconds, rel=0.1)
    assert profile.pair_seconds == pytest.approx(TRUE.pair_seconds, rel=0.1)


def test_noise_of_ten_percent_leaves_the_fit_within_it() -> None:
    _, error = profile_of(measured(0.1), 0.01, 0.005)
    assert error < 0.11


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(ProfileError, match="cannot fit"):
        fit([], KNOTS)


def test_a_profile_comes_back_from_its_file(tmp_path: Path) -> None:
    TRUE.save(tmp_path / "p.json")
    assert load_profile(tmp_path / "p.json") == TRUE


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"name": 1}'])
def test_what_is_no_profile_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(ProfileError, match=r"p\.json"):
        load_profile(tmp_path / "p.json")


@pytest.mark.parametrize(
    "changes",
    [{"knots": (2, 1, 3)}, {"seconds": (0.1,)}, {"sample_seconds": -1.0}, {"seconds": (0.0, 0.1, 0.2)}],
)
def test_impossible_profiles_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ProfileError):
        replace(TRUE, **changes)  # type: ignore[arg-type]  # wrong on purpose


@settings(max_examples=50)
@given(st.integers(1, 4000), st.integers(0, 64))
def test_more_tokens_never_cost_less(tokens: int, sampled: int) -> None:
    for profile in (TRUE, roofline_profile()):
        assert profile.step(tokens + 1, sampled, 0, 0) >= profile.step(tokens, sampled, 0, 0)


def test_the_measured_steps_respect_the_engine_bounds() -> None:
    plans = plan_steps(20_000, 256, 32, 2048)
    assert plans
    assert all(p.tokens <= 256 and p.decodes <= 32 and p.kv_tokens <= 20_000 for p in plans)
    assert all(p.start + p.chunk <= 2048 for p in plans)


def test_a_prompt_in_chunks_costs_its_chunks() -> None:
    assert isinstance(TRUE, CostProfile)
    whole = replace(TRUE, max_batch_tokens=512).prefill_seconds(1024)
    first = TRUE.step(512, 0, 512 * 513 // 2, 0)
    second = TRUE.step(512, 0, 512 * 512 + 512 * 513 // 2, 0)
    assert whole == pytest.approx(TRUE.sample_seconds + first + second)
