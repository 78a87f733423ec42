"""Figures, fairness, paired intervals, plots; policies of the scenario by name."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from controlplane.scheduling.admission import DropReason
from controlplane.scheduling.types import Role
from controlplane.twin import plots
from controlplane.twin.costs import ProfileError, roofline_profile
from controlplane.twin.heatmap import fill, read, save
from controlplane.twin.results import Slo, jain, paired_ratio, summarize
from controlplane.twin.scenario import POLICIES, UnknownPolicy, best_share, capacity, roles_for, simulate
from controlplane.twin.workload import build, poisson

PROFILE = roofline_profile()


def test_paired_ratios_carry_the_interval_of_their_pairs() -> None:
    paired = paired_ratio([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
    assert (paired.ratio, paired.low, paired.high) == pytest.approx((0.5, 0.5, 0.5))
    wide = paired_ratio([1.0, 2.0, 3.0], [1.0, 1.0, 1.0])
    assert wide.low < wide.ratio < wide.high
    assert math.isinf(paired_ratio([1.0], [2.0]).high)
    assert math.isnan(paired_ratio([0.0], [2.0]).ratio)
    with pytest.raises(ValueError, match="pairs"):
        paired_ratio([1.0], [])


def test_jain_tells_equal_from_one_sided() -> None:
    assert jain([3, 3, 3]) == pytest.approx(1.0)
    assert jain([1, 0, 0, 0]) == pytest.approx(0.25)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_serves_everything_below_capacity(policy: str) -> None:
    work = poisson(1000, 64, 8.0, 150, seed=1, spread=0.5)
    cluster = simulate(work, PROFILE, policy, 4)
    summary = summarize(cluster, Slo(5.0, 0.2))
    assert (summary.ended, summary.dropped) == (150, 0)
    assert summary.attained > 0.95
    assert 0 < summary.busy <= 1
    assert summary.ttft_p50 <= summary.ttft_p90 <= summary.ttft_p99


def test_equal_seeds_give_equal_runs() -> None:
    work = poisson(2000, 100, 12.0, 300, seed=1, spread=0.5)
    one, two = (simulate(work, PROFILE, "power-of-two", 4, seed=5) for _ in range(2))
    assert (one.ended_at == two.ended_at).all()


def test_what_can_never_fit_is_dropped_with_its_reason() -> None:
    work = build("x", [0.0, 0.1], [500, 10_000_000], [5, 5])
    cluster = simulate(work, PROFILE, "round-robin", 2)
    assert cluster.reasons == {1: DropReason.REJECTED_TOO_LARGE}
    assert summarize(cluster, Slo(1, 1)).reasons == {DropReason.REJECTED_TOO_LARGE: 1}


def test_overload_holds_and_rejects_but_loses_nothing() -> None:
    work = poisson(8000, 400, 400.0, 4000, seed=1)
    cluster = simulate(work, PROFILE, "least-requests", 2)
    ended = ~np.isnan(cluster.ended_at)
    assert ended.sum() + len(cluster.reasons) == len(work)
    assert cluster.reasons


def test_capacity_is_what_a_flood_completes() -> None:
    work = poisson(1000, 100, 1.0, 400, seed=1)
    whole = capacity(work, PROFILE, 2)
    calm = summarize(simulate(work.at_rate(0.5 * whole), PROFILE, "least-requests", 2), Slo(2, 0.1))
    flooded = summarize(simulate(work.at_rate(3 * whole), PROFILE, "least-requests", 2), Slo(2, 0.1))
    assert calm.ttft_mean * 3 < flooded.ttft_mean


def test_a_split_is_tried_at_several_ratios() -> None:
    work = poisson(4000, 32, 12.0, 200, seed=1)
    share, summary = best_share(work, PROFILE, "static-split", 4, Slo(2, 0.1))
    assert share >= 0.5  # long prompts, short answers
    assert summary.split == 1.0


def test_roles_leave_no_side_of_a_split_empty() -> None:
    assert roles_for("static-split", 2, 0.01) == [Role.PREFILL, Role.DECODE]
    assert roles_for("least-requests", 3, None) == [Role.COLOCATED] * 3
    with pytest.raises(UnknownPolicy, match="round-robin"):
        simulate(poisson(10, 10, 1.0, 2, 0), PROFILE, "chance", 2)


def test_the_heat_map_prefers_disaggregation_for_long_prompts_with_short_answers(tmp_path: Path) -> None:
    found = fill(PROFILE, prefills=(64, 4096), ratios=(1 / 64, 1.0), loads=(0.5,), requests=60)
    assert found.cells.shape == (1, 2, 2)
    assert found.summed[1, 0] > found.summed[1, 1]
    assert found.summed[0, 1] < 0
    assert 0 <= found.steady <= 1
    save(found, PROFILE, tmp_path / "heat.json")
    assert read(tmp_path / "heat.json").value(4096, 64) == pytest.approx(found.summed[1, 0], abs=1e-3)
    (tmp_path / "odd.json").write_text("{}")
    with pytest.raises(ProfileError, match="odd"):
        read(tmp_path / "odd.json")


def test_plots_are_well_formed() -> None:
    cluster = simulate(poisson(1000, 64, 8.0, 100, seed=1), PROFILE, "static-split", 4)
    texts = [
        plots.distribution("a & b", "seconds", {"<x>": cluster.ended_at, "none": np.array([np.nan])}),
        plots.roles("roles", cluster.timeline),
        plots.utilisation("use", cluster.timeline),
        plots.lines("one point", "x", "y", {"p": ([1.0], [0.0])}),
    ]
    for text in texts:
        assert ET.fromstring(text).tag.endswith("svg")
    with pytest.raises(ValueError, match="nothing to plot"):
        plots.lines("empty", "x", "y", {})
