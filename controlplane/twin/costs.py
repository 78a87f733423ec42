"""How long a simulated executor takes: step, transfer and load times, as data.

`deepflow calibrate` measures a real engine and fits a `CostProfile`; the twin's executors run on it. A step
costs

    curve(tokens)                      its tokens through the model, piecewise linear over measured batch
    sizes + sample * sampled rows            the vocabulary's head and the draw
    + pair * (query, key) pairs        attention of prefill chunks
    + context * tokens attended to     attention of decodes, bound by reading KV

all coefficients at least zero. The engine's own model (`flowserve.engine.budget`) has three of these terms
because it learns while it runs; this one is measured at leisure and has to be right far from where a
running engine stays.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt


class ProfileError(ValueError):
    """A cost profile that cannot be read or makes no sense; says why."""


@dataclass(frozen=True, slots=True)
class Shape:
    """One measured step: `tokens` of which `decodes` are decode steps over `context` tokens of KV in all."""

    tokens: int
    sampled: int
    pairs: int  # of prefill chunks
    context: int  # of decodes
    seconds: float


@dataclass(frozen=True, slots=True)
class CostProfile:
    """Times of one kind of executor. Seconds, tokens, bytes."""

    name: str
    source: str  # how the figures came about
    knots: tuple[int, ...]  # tokens of a step, ascending
    seconds: tuple[float, ...]  # at the knots
    sample_seconds: float
    pair_seconds: float
    context_seconds: float
    kv_bytes_per_token: int
    transfer_bytes_per_second: float
    transfer_seconds: float  # fixed, per hand-over: placement, handshake, first byte
    load_seconds: float  # weights into a warm executor
    request_seconds: float = 0.0  # gateway and stream, before the first step and after it
    kv_tokens: int = 65_536  # capacity of the pool
    block_tokens: int = 16
    max_batch_tokens: int = 512  # as EngineConfig
    max_running: int = 64
    chunk_seconds: float = 0.25
    max_model_len: int = 8192

    def __post_init__(self) -> None:
        if len(self.knots) != len(self.seconds) or len(self.knots) < 2:
            raise ProfileError(f"{self.name}: the curve needs two or more knots with a time each")
        if any(b <= a for a, b in zip(self.knots, self.knots[1:], strict=False)) or self.knots[0] < 1:
            raise ProfileError(f"{self.name}: the curve's knots must ascend from 1")
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and value < 0:
                raise ProfileError(f"{self.name}: {field.name} is negative")
        if self.transfer_bytes_per_second <= 0 or min(self.seconds) <= 0:
            raise ProfileError(f"{self.name}: times and rates must be positive")

    @property
    def slope(self) -> float:
        """Seconds per token of a large chunk, attention apart."""
        return (self.seconds[-1] - self.seconds[0]) / (self.knots[-1] - self.knots[0])

    def curve(self, tokens: int) -> float:
        """Seconds of a step of so many tokens, attention and sampling apart."""
        at = bisect_right(self.knots, tokens)
        at = min(max(at, 1), len(self.knots) - 1)
        low, high = self.knots[at - 1], self.knots[at]
        share = (tokens - low) / (high - low)
        return max(0.0, self.seconds[at - 1] + share * (self.seconds[at] - self.seconds[at - 1]))

    def step(self, tokens: int, sampled: int, pairs: int, context: int) -> float:
        return (
            self.curve(tokens)
            + sampled * self.sample_seconds
            + pairs * self.pair_seconds
            + context * self.context_seconds
        )

    def table(self) -> list[float]:
        """`curve` of every batch up to `max_batch_tokens`, an empty one as one token, for loops."""
        return [self.curve(max(tokens, 1)) for tokens in range(self.max_batch_tokens + 1)]

    def prefill_seconds(self, tokens: int, start: int = 0) -> float:
        """A prompt's uncached part alone on an executor, in full chunks."""
        seconds = self.sample_seconds
        while tokens > 0:
            count = min(tokens, self.max_batch_tokens)
            seconds += self.step(count, 0, count * start + count * (count + 1) // 2, 0)
            start += count
            tokens -= count
        return seconds

    def transfer(self, tokens: int) -> float:
        return self.transfer_seconds + tokens * self.kv_bytes_per_token / self.transfer_bytes_per_second

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n")


def load_profile(path: str | Path) -> CostProfile:
    """A profile that `deepflow calibrate` wrote. Raises ProfileError."""
    try:
        data = json.loads(Path(path).read_text())
        data["knots"], data["seconds"] = tuple(data["knots"]), tuple(data["seconds"])
        return CostProfile(**data)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ProfileError(f"{path} is no cost profile: {error}") from None


def fit(
    shapes: Sequence[Shape], knots: Sequence[int]
) -> tuple[tuple[float, ...], float, float, float, float]:
    """(seconds at the knots, sample, pair, context, mean relative error) from measured steps.

    Least squares of *relative* errors with coefficients of at least zero; the curve is made of its first
    value and rises from knot to knot, so that it never falls. Raises ProfileError if there is too little to
    fit.
    """
    if len(shapes) < len(knots) + 3:
        raise ProfileError(f"{len(shapes)} steps cannot fit {len(knots) + 3} coefficients")
    rows = np.zeros((len(shapes), len(knots) + 3))
    target = np.array([shape.seconds for shape in shapes])
    for row, shape in zip(rows, shapes, strict=True):
        row[0] = 1.0
        for at in range(1, len(knots)):
            low, high = knots[at - 1], knots[at]
            top = np.inf if at == len(knots) - 1 else 1.0
            row[at] = min(top, max(0.0, (shape.tokens - low) / (high - low)))
        row[len(knots) :] = shape.sampled, shape.pairs, shape.context
    weighted = rows / target[:, None]
    found = _least_squares(weighted, np.ones(len(shapes)))
    error = float(np.mean(np.abs(weighted @ found - 1.0)))
    curve = tuple(float(v) for v in np.cumsum(found[: len(knots)]))
    sample, pair, context = (float(v) for v in found[len(knots) :])
    return curve, sample, pair, context, error


def _least_squares(rows: npt.NDArray[np.float64], target: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Least squares with non-negative coefficients: the most negative term is left out and the rest
    refitted."""
    scale = np.maximum(np.abs(rows).max(axis=0), 1e-30)
    active = list(range(rows.shape[1]))
    found = np.zeros(rows.shape[1])
    while active:
        part, *_ = np.linalg.lstsq(rows[:, active] / scale[active], target, rcond=None)
        if (part >= -1e-12).all():
            found[active] = np.maximum(part, 0.0) / scale[active]
            return found
        active.pop(int(np.argmin(part)))
    raise ProfileError("no step time depends on any term")


def roofline_profile() -> CostProfile:
    """An 8B model on one 64 GB accelerator, derived from data sheets: for shapes the small model cannot have.

    NOT measured. 400 TFLOPS FP16 and 64 GB (DeepServe section 2, Ascend 910B) at half of the peak, 1.6 TB/s
    of memory at 70 % (public data sheet), 8.0e9 parameters in 2 bytes, 128 KiB of KV a token (FlowKV,
    Llama-3.1-8B), 25 GB/s between nodes (200 Gbps RoCE, DeepServe section 2), load by fork over RoCE 0.71 s
    (DeepServe section 6).
    """
    flops, reads = 400e12 * 0.5, 1.6e12 * 0.7
    parameters, kv_bytes = 8.0e9, 128 * 1024
    weights = 2 * parameters / reads
    knots = (1, 64, 128, 256, 512, 1024, 2048)
    fixed = 1e-3  # launch and bookkeeping of one step (ours)
    return CostProfile(
        name="8b-roofline",
        source="derived from data sheets, not measured",
        knots=knots,
        seconds=tuple(fixed + max(weights, 2 * parameters * n / flops) + 1e-7 * n for n in knots),
        sample_seconds=2e-5,
        pair_seconds=4 * 32 * 4096 / flops,
        context_seconds=kv_bytes / reads,
        kv_bytes_per_token=kv_bytes,
        transfer_bytes_per_second=25e9,
        transfer_seconds=0.005,
        load_seconds=0.71,
        request_seconds=0.003,
        kv_tokens=int((64e9 * 0.9 - 2 * parameters) // kv_bytes),
        max_batch_tokens=2048,
        max_running=256,
        chunk_seconds=0.1,
        max_model_len=131_072,
    )
