"""Plots of simulations as SVG text: distributions, roles over time, utilisation.

Written by hand so that the command needs no plotting library; an SVG opens in any browser and goes into
documents.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
import numpy.typing as npt

from controlplane.twin.cluster import Timeline

COLOURS = ("#0b6e99", "#d1495b", "#2e933c", "#b07c00", "#7b4fa3", "#5a5a5a", "#00897b", "#c2185b")
WIDTH, HEIGHT = 720, 360
LEFT, RIGHT, TOP, BOTTOM = 64, 176, 36, 48
POINTS = 240
"""Points of a curve: one for every two pixels."""


def lines(
    title: str,
    x_label: str,
    y_label: str,
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    log_x: bool = False,
    y_max: float | None = None,
) -> str:
    """An SVG with one polyline a series (x values, y values) and a legend. Raises ValueError without any
    point."""
    xs = [x for values, _ in series.values() for x in values if not log_x or x > 0]
    ys = [y for _, values in series.values() for y in values]
    if not xs:
        raise ValueError(f"{title}: nothing to plot")
    scale = math.log10 if log_x else float
    low, high = scale(min(xs)), scale(max(xs))
    high = high if high > low else low + 1
    top = y_max if y_max is not None else max(*ys, 1e-9)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"'
        ' font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="20" font-size="14">{escape(title)}</text>',
    ]

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (scale(x) - low) / (high - low) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - min(y / top, 1.0) * (HEIGHT - TOP - BOTTOM),
        )

    for x in _ticks(low, high, log_x):
        at, _ = place(x, 0)
        parts.append(
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="#e4e4e4"/>'
        )
        parts.append(
            f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{_number(x)}</text>'
        )
    for y in _ticks(0.0, top, False):
        _, at = place(10**low if log_x else low, y)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{_number(y)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 10}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(
        f'<text x="14" y="{HEIGHT / 2}" text-anchor="middle" transform="rotate(-90 14 {HEIGHT / 2})">'
        f"{escape(y_label)}</text>"
    )
    for number, (name, (x_values, y_values)) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        points = " ".join(
            f"{px:.1f},{py:.1f}"
            for px, py in (place(x, y) for x, y in zip(x_values, y_values, strict=True) if not log_x or x > 0)
        )
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        y = TOP + 10 + 18 * number
        parts.append(f'<rect x="{WIDTH - RIGHT + 12}" y="{y - 8}" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{WIDTH - RIGHT + 28}" y="{y + 1}">{escape(name)}</text>')
    parts.append("</svg>")
    return "\n".join(parts) + "\n"


def distribution(title: str, x_label: str, values: Mapping[str, npt.NDArray[np.float64]]) -> str:
    """Cumulative distributions on a logarithmic axis; NaN are left out."""
    shares = np.linspace(0, 1, POINTS)
    series = {}
    for name, column in values.items():
        seen = column[~np.isnan(column) & (column > 0)]
        if len(seen):
            series[name] = (np.quantile(seen, shares).tolist(), shares.tolist())
    return lines(title, x_label, "share of requests", series, log_x=True, y_max=1.0)


def roles(title: str, timeline: Timeline) -> str:
    """How many executors had which role over time."""
    columns = list(zip(*timeline.roles, strict=True)) if timeline.roles else [(), (), ()]
    names = ("colocated", "prefill", "decode")
    series = {
        name: (timeline.seconds, [float(v) for v in column])
        for name, column in zip(names, columns, strict=True)
        if any(column)
    }
    return lines(title, "simulated seconds", "executors", series)


def utilisation(title: str, timeline: Timeline) -> str:
    """Share of time in steps and share of KV blocks held, over time."""
    series = {"time in steps": (timeline.seconds, timeline.busy), "KV held": (timeline.seconds, timeline.kv)}
    return lines(title, "simulated seconds", "share", series, y_max=1.0)


def _ticks(low: float, high: float, log: bool) -> list[float]:
    if log:
        return [10.0**power for power in range(math.ceil(low), math.floor(high) + 1)] or [10**low, 10**high]
    raw = (high - low) / 5
    step = 10 ** math.floor(math.log10(raw))
    step *= next(factor for factor in (1, 2, 5, 10) if factor * step >= raw)
    first = math.ceil(low / step)
    return [step * k for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _number(value: float) -> str:
    return f"{value:g}" if abs(value) < 1e5 else f"{value:.0e}"
