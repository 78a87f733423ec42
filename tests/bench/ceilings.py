"""What this machine can do at best: memory reads, and multiplication at a model's shapes.

Called by `tests.bench.engine`. A ceiling is what a library that does nothing else reaches: torch's own
kernels, in the loop that suits each best. Values alternate with what is measured against them, so that
both see the same machine.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional

from flowserve.models.config import ModelConfig
from tests.bench import common

READ_BYTES = 512 << 20
"""Far beyond the last level of cache."""
PREFILL_ROWS = 512
DECODE_ROWS = (8, 32)
KINDS = ("bfloat16", "float32", "int8")


def timed(work: Callable[[], object], runs: int) -> list[float]:
    """Seconds of each of `runs` calls."""
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return times


def shapes(config: ModelConfig) -> list[tuple[int, int]]:
    """A layer's four matrices, [out, in]."""
    width = config.heads * config.head_dim
    return [
        (width + 2 * config.kv_heads * config.head_dim, config.hidden),
        (config.hidden, width),
        (2 * config.intermediate, config.hidden),
        (config.hidden, config.intermediate),
    ]


def _multiply(config: ModelConfig, rows: int, kind: str) -> tuple[Callable[[], object], float]:
    """A layer's matrices applied to `rows` rows by torch, and their operations."""
    calls: list[Callable[[], object]] = []
    for out, width in shapes(config):
        if kind == "int8":
            calls.append(_int8(out, width, rows))
        else:
            dtype = getattr(torch, kind)
            matrix, data = torch.randn(out, width, dtype=dtype), torch.randn(rows, width, dtype=dtype)
            calls.append(lambda d=data, m=matrix: functional.linear(d, m))  # type: ignore[misc]

    def work() -> None:
        for call in calls:
            call()

    return work, sum(2.0 * rows * out * width for out, width in shapes(config))


def _int8(out: int, width: int, rows: int) -> Callable[[], object]:
    """Weights per row and activations in 8 bits, as torch's fbgemm multiplies them."""
    torch.backends.quantized.engine = "fbgemm"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces another home for these functions
        matrix = torch.quantize_per_channel(
            torch.randn(out, width),
            torch.full((out,), 0.01),
            torch.zeros(out, dtype=torch.long),
            0,
            torch.qint8,
        )
        packed = torch.ops.quantized.linear_prepack(matrix, None)
        data = torch.quantize_per_tensor(torch.rand(rows, width), 0.01, 64, torch.quint8)
    return lambda: torch.ops.quantized.linear(data, packed, 0.1, 64)


@dataclass
class Ceilings:
    """Samples of every ceiling, collected round by round."""

    config: ModelConfig
    threads: int
    reads: dict[int, list[float]] = field(default_factory=dict)  # threads -> bytes/s
    rates: dict[tuple[str, int], list[float]] = field(default_factory=dict)  # (kind, rows) -> operations/s

    def __post_init__(self) -> None:
        self._block = torch.ones(READ_BYTES // 4)
        rows = (*DECODE_ROWS, PREFILL_ROWS)
        self._work = {(kind, n): _multiply(self.config, n, kind) for kind in KINDS for n in rows}

    def measure(self, runs: int) -> None:
        """One round. Leaves torch's number of threads as it was."""
        before = torch.get_num_threads()
        half = self._block[: len(self._block) // 2]
        other = self._block[len(self._block) // 2 :]
        try:
            for threads in sorted({1, self.threads}):
                torch.set_num_threads(threads)
                loops: Sequence[Callable[[], object]] = (self._block.sum, lambda: torch.dot(half, other))
                best = min(min(timed(loop, runs)) for loop in loops)
                self.reads.setdefault(threads, []).append(READ_BYTES / best)
            for key, (work, operations) in self._work.items():
                best = min(timed(work, runs))
                self.rates.setdefault(key, []).append(operations / best)
        finally:
            torch.set_num_threads(before)

    @property
    def bandwidth(self) -> float:
        """Bytes a second with all threads."""
        return common.median(self.reads[self.threads])

    def rate(self, kind: str, rows: int = PREFILL_ROWS) -> float:
        """Operations a second at so many rows."""
        return common.median(self.rates[kind, rows])

    def multiply(self, kind: str) -> tuple[str, float]:
        """The best way to multiply values of `kind` in prefill, and its rate.

        bf16 values can be widened to float32: where the processor has no bf16 instructions, torch does
        that faster than it multiplies bf16.
        """
        ways = ("bfloat16", "float32") if kind == "bfloat16" else (kind,)
        best = max(ways, key=self.rate)
        return best, self.rate(best)

    def report(self, report: common.Report) -> None:
        for threads, samples in self.reads.items():
            report.add(
                ceiling=f"memory reads, {threads} thread{'s' * (threads > 1)}",
                gb_per_s=common.median(samples) / 1e9,
            )
        for (kind, rows), samples in self.rates.items():
            report.add(ceiling=f"{kind} matmul, {rows} rows", gflop_per_s=common.median(samples) / 1e9)
