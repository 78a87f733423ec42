"""The heat map answers between its cells, clamps beyond them, and has no opinion on what was not measured."""

from __future__ import annotations

import math

import pytest

from controlplane.scheduling.heatmap import HeatMap

MAP = HeatMap((100, 1000), (0.1, 1.0), ((-1.0, -0.5), (1.0, math.nan)))


def test_a_cell_is_found_and_the_edges_are_clamped() -> None:
    assert MAP.value(100, 10) == -1.0
    assert MAP.value(100, 100) == -0.5
    assert MAP.value(10, 100) == -0.5
    assert MAP.value(100_000, 1) == 1.0


def test_between_cells_the_logarithms_are_interpolated() -> None:
    middle = MAP.value(316, 32)
    assert middle is not None and abs(middle) < 0.01


def test_what_was_not_measured_gives_no_opinion() -> None:
    assert MAP.value(1000, 1000) is None


def test_a_map_whose_axes_do_not_ascend_is_refused() -> None:
    with pytest.raises(ValueError, match="ascend"):
        HeatMap((2, 1), (1.0,), ((0.0,), (0.0,)))
    with pytest.raises(ValueError, match="cell"):
        HeatMap((1, 2), (1.0,), ((0.0,),))
