"""Fills DeepServe's heat map (section 5.3): where disaggregating a request beats running it whole.

A cell is `JCT colocated / JCT disaggregated - 1` for like requests of one prefill length and one ratio of
decode to prefill: two colocated executors against a prefill and a decode one, on the same profile and the
same Poisson arrivals. The paper makes one map per request rate and adds them up; so do we, over shares of
what the colocated pair completes, because a rate in requests per second means nothing across lengths.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from controlplane.scheduling.heatmap import HeatMap
from controlplane.twin.costs import CostProfile, ProfileError
from controlplane.twin.scenario import capacity, simulate
from controlplane.twin.workload import poisson

PREFILLS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
RATIOS = (1 / 64, 1 / 16, 1 / 4, 1 / 2, 1.0, 2.0, 4.0)
LOADS = (0.3, 0.5, 0.7, 0.9)
"""Shares of capacity; above 0.7 the paper's disaggregated executors overload first, which the map must
know."""
REQUESTS = 160
"""Requests of one cell and load (ours): the sign of a cell does not change beyond that."""


@dataclass(frozen=True, slots=True)
class Filled:
    """`cells[load, prefill, ratio]`; NaN where prompt and output exceed the model's context or the pool."""

    prefills: tuple[int, ...]
    ratios: tuple[float, ...]
    loads: tuple[float, ...]
    cells: npt.NDArray[np.float64]

    @property
    def summed(self) -> npt.NDArray[np.float64]:
        """Element-wise over the loads: above 0 disaggregate, below 0 do not."""
        return self.cells.sum(axis=0)  # type: ignore[no-any-return]  # numpy's sum of float64

    @property
    def steady(self) -> float:
        """Share of cells whose sign is the same at every load (the paper: above 0.8)."""
        signs = np.sign(self.cells)
        known = ~np.isnan(self.cells).any(axis=0)
        return float((np.abs(signs.sum(axis=0)) == len(self.loads))[known].mean())


def save(filled: Filled, profile: CostProfile, path: str | Path) -> None:
    """As JSON: axes, the summed map (null where nothing fits), the map of each load."""
    layers = [_plain(layer) for layer in filled.cells]
    data = {
        "profile": profile.name,
        "source": profile.source,
        "prefills": filled.prefills,
        "ratios": filled.ratios,
        "loads": filled.loads,
        "steady": filled.steady,
        "summed": _plain(filled.summed),
        "layers": layers,
    }
    Path(path).write_text(json.dumps(data, indent=1) + "\n")


def read(path: str | Path) -> HeatMap:
    """A map that `save` wrote, as policies take it. Raises ProfileError."""
    try:
        return HeatMap.parse(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ProfileError(f"{path} is no heat map: {error}") from None


def _plain(cells: npt.NDArray[np.float64]) -> list[list[float | None]]:
    return [[None if math.isnan(cell) else round(float(cell), 4) for cell in row] for row in cells]


def fill(
    profile: CostProfile,
    *,
    prefills: Sequence[int] = PREFILLS,
    ratios: Sequence[float] = RATIOS,
    loads: Sequence[float] = LOADS,
    requests: int = REQUESTS,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Filled:
    """Simulates every cell."""
    cells = np.full((len(loads), len(prefills), len(ratios)), np.nan)
    longest = min(profile.max_model_len, profile.kv_tokens)
    done = 0
    for row, prefill in enumerate(prefills):
        for column, ratio in enumerate(ratios):
            output = max(2, round(prefill * ratio))
            done += 1
            if prefill + output >= longest:
                continue
            base = poisson(prefill, output, 1.0, requests, seed)
            most = capacity(base, profile, 2, seed=seed)
            for layer, load in enumerate(loads):
                work = base.at_rate(load * most)
                whole, split = (
                    simulate(work, profile, policy, 2, seed=seed, prefill_share=0.5)
                    for policy in ("least-requests", "static-split")
                )
                times = [float((c.ended_at - work.arrival).mean()) for c in (whole, split)]
                cells[layer, row, column] = times[0] / times[1] - 1
            if progress is not None:
                progress(done, len(prefills) * len(ratios))
    return Filled(tuple(prefills), tuple(ratios), tuple(loads), cells)
