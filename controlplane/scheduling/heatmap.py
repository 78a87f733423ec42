"""DeepServe's heat map (section 5.3): where splitting prefill from decode pays, as data and a look-up.

A cell is `JCT colocated / JCT disaggregated - 1` of like requests with one prefill length and one ratio of
decode to prefill, summed over request rates: above 0 split, below 0 do not. `deepflow calibrate` fills it.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class HeatMap:
    """`cells[prefill][ratio]`; NaN where nothing was measured (no opinion)."""

    prefills: tuple[int, ...]  # uncached prompt tokens, ascending
    ratios: tuple[float, ...]  # output / uncached prompt, ascending
    cells: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        for axis in (self.prefills, self.ratios):
            if not axis or axis[0] <= 0 or any(b <= a for a, b in pairwise(axis)):
                raise ValueError("a heat map's axes are positive and ascend")
        if len(self.cells) != len(self.prefills) or any(len(row) != len(self.ratios) for row in self.cells):
            raise ValueError("a heat map has one cell per prefill length and ratio")

    @classmethod
    def parse(cls, text: str) -> HeatMap:
        """The summed map of a file that `deepflow calibrate --heat-map` wrote. Raises ValueError."""
        try:
            data = json.loads(text)
            cells = tuple(
                tuple(math.nan if cell is None else float(cell) for cell in row) for row in data["summed"]
            )
            return cls(tuple(data["prefills"]), tuple(data["ratios"]), cells)
        except (KeyError, TypeError) as error:
            raise ValueError(f"a part is missing or of another kind: {error}") from None

    def value(self, prefill: int, output: int) -> float | None:
        """Interpolated over the logarithms of both axes and clamped to them; None: not measured there."""
        prefill = max(prefill, 1)
        row, down = _place(self.prefills, prefill)
        column, right = _place(self.ratios, max(output, 1) / prefill)
        total = weight = 0.0
        for at, share in ((row, 1 - down), (row + 1, down)):
            for across, part in ((column, 1 - right), (column + 1, right)):
                if share * part > 0 and not math.isnan(cell := self.cells[at][across]):
                    total += share * part * cell
                    weight += share * part
        return total / weight if weight > 0 else None


def _place(axis: Sequence[float], value: float) -> tuple[int, float]:
    """The cell below `value`, and how far it is on the way to the next."""
    at = bisect_right(axis, value) - 1
    if at < 0:
        return 0, 0.0
    if at >= len(axis) - 1:
        return len(axis) - 1, 0.0
    low, high = math.log(axis[at]), math.log(axis[at + 1])
    return at, (math.log(value) - low) / (high - low)
