"""Which steps `deepflow calibrate` measures, and what becomes of the times. Pure: the command runs the
engine.

Shapes cover what an engine's steps look like (pure decode over batch and context, prefill chunks over
length and position, both together), in an order that mixes them, so that a machine that slows down slows
all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from controlplane.twin.costs import CostProfile, Shape, fit

KNOTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
"""Where the token curve bends: the vector and matrix widths kernels change at (ours)."""
DECODE_BATCHES = (1, 2, 4, 8, 16, 32, 64)
DECODE_CONTEXTS = (32, 512, 2048)
CHUNKS = (16, 32, 64, 128, 256, 512)
STARTS = (0, 1024, 4096)
MIXED = (
    (8, 512, 64, 0),
    (16, 256, 128, 512),
    (32, 128, 256, 0),
)  # decodes, context of each, chunk, its start


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step to measure: `decodes` sequences over `context` tokens each, and a chunk of `chunk` tokens at
    `start`."""

    decodes: int
    context: int
    chunk: int
    start: int

    @property
    def tokens(self) -> int:
        return self.decodes + self.chunk

    @property
    def kv_tokens(self) -> int:
        """What must be in the pool."""
        return self.decodes * (self.context + 1) + self.start + self.chunk

    def shape(self, seconds: float) -> Shape:
        """As the cost model counts it; every decode and the chunk's end are sampled."""
        pairs = self.chunk * self.start + self.chunk * (self.chunk + 1) // 2
        return Shape(
            self.tokens, self.decodes + (self.chunk > 0), pairs, self.decodes * (self.context + 1), seconds
        )


def plan_steps(kv_tokens: int, max_batch_tokens: int, max_running: int, max_model_len: int) -> list[StepPlan]:
    """The steps that an engine of these bounds can have."""
    plans = [StepPlan(batch, context, 0, 0) for context in DECODE_CONTEXTS for batch in DECODE_BATCHES]
    plans += [StepPlan(0, 0, chunk, start) for start in STARTS for chunk in CHUNKS]
    plans += [StepPlan(*mixed) for mixed in MIXED]
    return [
        plan
        for plan in plans
        if plan.kv_tokens <= kv_tokens
        and plan.tokens <= max_batch_tokens
        and plan.decodes <= max_running
        and max(plan.start + plan.chunk, plan.context + 1) <= max_model_len
    ]


@dataclass(frozen=True, slots=True)
class Measured:
    """What the command found out about one executor."""

    name: str
    source: str
    times: Mapping[StepPlan, Sequence[float]]  # seconds of each repetition
    step_overhead: float  # seconds that the engine adds around the executor's step
    kv_bytes_per_token: int
    copy_bytes_per_second: float
    load_seconds: float
    kv_tokens: int
    block_tokens: int
    max_batch_tokens: int
    max_running: int
    chunk_seconds: float
    max_model_len: int


def profile_of(
    measured: Measured, transfer_seconds: float, request_seconds: float
) -> tuple[CostProfile, float]:
    """(profile, mean relative error of the fit). Raises ProfileError where too little was measured."""
    shapes = [plan.shape(median(times)) for plan, times in measured.times.items()]
    largest = max(shape.tokens for shape in shapes)
    knots = tuple(knot for knot in KNOTS if knot <= largest)
    curve, sample, pair, context, error = fit(shapes, knots)
    profile = CostProfile(
        name=measured.name,
        source=measured.source,
        knots=knots,
        seconds=tuple(seconds + measured.step_overhead for seconds in curve),
        sample_seconds=sample,
        pair_seconds=pair,
        context_seconds=context,
        kv_bytes_per_token=measured.kv_bytes_per_token,
        transfer_bytes_per_second=measured.copy_bytes_per_second,
        transfer_seconds=transfer_seconds,
        load_seconds=measured.load_seconds,
        request_seconds=request_seconds,
        kv_tokens=measured.kv_tokens,
        block_tokens=measured.block_tokens,
        max_batch_tokens=measured.max_batch_tokens,
        max_running=measured.max_running,
        chunk_seconds=measured.chunk_seconds,
        max_model_len=measured.max_model_len,
    )
    return profile, error
