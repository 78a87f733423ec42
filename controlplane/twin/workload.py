"""What arrives: requests as columns, read from recorded traces or drawn from a seed.

A `Workload` is plain numpy, so that a million requests are cheap to superpose, speed up and cut. Traces are
read as published (Azure LLM inference 2023: CSV; Mooncake: JSON lines with ids of 512-token prefix blocks),
plain or xz-compressed. Whatever is drawn takes a seed; nothing here reads a clock.
"""

from __future__ import annotations

import csv
import datetime
import json
import lzma
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

MOONCAKE_UNIT = 512
"""Tokens of one prefix block in the Mooncake traces (their README)."""
MAX_REQUESTS = 4_000_000
"""Bound of one workload (ours): some 100 bytes each while it is simulated."""


class WorkloadError(ValueError):
    """A trace that cannot be read, or an impossible shape; says which."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests in order of arrival. Columns have one entry per request.

    `units` holds ids of leading prefix blocks of `unit_tokens` tokens each, request after request; request
    i owns `units[first[i]:first[i + 1]]`. Equal ids stand for equal tokens from the prompt's start up to
    there.
    """

    name: str
    arrival: Floats  # seconds from the start
    prompt: Ints  # tokens
    output: Ints  # tokens, at least 1
    tenant: Ints  # small numbers
    priority: Ints  # larger goes first
    unit_tokens: int
    units: Ints
    first: Ints  # n + 1 offsets

    def __len__(self) -> int:
        return len(self.arrival)

    @property
    def rate(self) -> float:
        """Requests per second over the whole."""
        return (len(self) - 1) / self.span if len(self) > 1 and self.span > 0 else 0.0

    @property
    def span(self) -> float:
        return float(self.arrival[-1] - self.arrival[0]) if len(self) else 0.0

    def at_rate(self, rate: float) -> Workload:
        """The same requests, their arrivals stretched or pressed to `rate` requests per second."""
        if rate <= 0:
            raise WorkloadError(f"a rate must be positive, is {rate}")
        return replace(self, arrival=(self.arrival - self.arrival[0]) * (self.rate / rate))

    def capped(self, max_tokens: int) -> Workload:
        """Prompts and outputs cut so that both fit a context of `max_tokens`; cut prompts keep their
        prefixes."""
        prompt = np.minimum(self.prompt, max_tokens - np.minimum(self.output, max_tokens // 2) - 1)
        output = np.minimum(self.output, max_tokens - prompt - 1)
        return replace(self, prompt=prompt, output=output)

    def take(self, index: Ints) -> Workload:
        """The requests at `index`, in that order."""
        counts = (self.first[1:] - self.first[:-1])[index]
        first = np.zeros(len(index) + 1, dtype=np.int64)
        np.cumsum(counts, out=first[1:])
        where = np.repeat(self.first[:-1][index] - first[:-1], counts) + np.arange(first[-1])
        return replace(
            self,
            arrival=self.arrival[index],
            prompt=self.prompt[index],
            output=self.output[index],
            tenant=self.tenant[index],
            priority=self.priority[index],
            units=self.units[where],
            first=first,
        )


def build(
    name: str,
    arrival: Sequence[float] | Floats,
    prompt: Sequence[int] | Ints,
    output: Sequence[int] | Ints,
    *,
    tenant: Sequence[int] | Ints | None = None,
    priority: Sequence[int] | Ints | None = None,
    units: Sequence[Sequence[int]] = (),
    unit_tokens: int = MOONCAKE_UNIT,
) -> Workload:
    """From plain sequences, sorted by arrival. Raises WorkloadError for lengths that do not fit."""
    count = len(arrival)
    if not 0 < count <= MAX_REQUESTS:
        raise WorkloadError(f"{name}: {count} requests; 1 to {MAX_REQUESTS} can be simulated")
    zeros = np.zeros(count, dtype=np.int64)
    first = np.zeros(count + 1, dtype=np.int64)
    if len(units):
        np.cumsum([len(row) for row in units], out=first[1:])
    columns = [np.asarray(prompt, dtype=np.int64), np.asarray(output, dtype=np.int64)]
    columns += [zeros if c is None else np.asarray(c, dtype=np.int64) for c in (tenant, priority)]
    if any(len(column) != count for column in columns) or (len(units) and len(units) != count):
        raise WorkloadError(f"{name}: columns differ in length")
    if columns[0].min() < 1:
        raise WorkloadError(f"{name}: a prompt has no token")
    flat = np.fromiter((unit for row in units for unit in row), dtype=np.int64, count=int(first[-1]))
    made = Workload(
        name,
        np.asarray(arrival, dtype=np.float64),
        columns[0],
        np.maximum(columns[1], 1),
        columns[2],
        columns[3],
        unit_tokens,
        flat,
        first,
    )
    order = np.argsort(made.arrival, kind="stable")
    return made.take(order)


def read_trace(path: str | Path) -> Workload:
    """An Azure (CSV) or Mooncake (JSON lines) trace, `.xz` or plain. Raises WorkloadError."""
    path = Path(path)
    try:
        text = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    except (OSError, lzma.LZMAError) as error:
        raise WorkloadError(f"{path} cannot be read: {error}") from None
    name = path.name.split(".")[0]
    lines = text.decode(errors="replace").splitlines()
    try:
        return _mooncake(name, lines) if lines and lines[0].startswith("{") else _azure(name, lines)
    except (KeyError, ValueError, TypeError) as error:
        if isinstance(error, WorkloadError):
            raise
        raise WorkloadError(
            f"{path} is neither an Azure CSV (TIMESTAMP, ContextTokens, GeneratedTokens) "
            f"nor Mooncake JSON lines: {error}"
        ) from None


def _azure(name: str, lines: Iterable[str]) -> Workload:
    rows = list(csv.DictReader(lines))
    times = [datetime.datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp() for row in rows]
    start = min(times, default=0.0)
    return build(
        name,
        [at - start for at in times],
        [int(row["ContextTokens"]) for row in rows],
        [int(row["GeneratedTokens"]) for row in rows],
    )


def _mooncake(name: str, lines: Iterable[str]) -> Workload:
    rows = [json.loads(line) for line in lines if line]
    return build(
        name,
        [row["timestamp"] / 1000 for row in rows],
        [row["input_length"] for row in rows],
        [row["output_length"] for row in rows],
        units=[row.get("hash_ids", ()) for row in rows],
    )


def superpose(trace: Workload, requests: int, rate: float, seed: int) -> Workload:
    """About the trace's traffic for a larger (or smaller) cluster: `requests` of them at `rate` per second.

    Whole copies of the trace run beside each other, each turned to its own starting point and with its own
    prefixes, and a window of them is cut out; so bursts and the distance between two turns of a
    conversation stay those of the trace up to the change of speed.
    """
    if not 0 < requests <= MAX_REQUESTS:
        raise WorkloadError(f"{requests} requests; 1 to {MAX_REQUESTS} can be simulated")
    rng = np.random.default_rng(seed)
    size = len(trace)
    copies = -(-requests // size)
    period = trace.span + (trace.span / size)
    arrivals, sources, copy_of = [], [], []
    for copy in range(copies):
        turned = (trace.arrival - rng.uniform(0, period)) % period
        arrivals.append(turned)
        sources.append(np.arange(size))
        copy_of.append(np.full(size, copy))
    arrival = np.concatenate(arrivals)
    order = np.argsort(arrival, kind="stable")[:requests]
    made = replace(trace.take(np.concatenate(sources)[order]), arrival=arrival[order])
    # A copy's prefixes are its own: ids of copy c start beyond those of the copies before it.
    stride = int(trace.units.max()) + 1 if len(trace.units) else 0
    counts = made.first[1:] - made.first[:-1]
    units = made.units + stride * np.repeat(np.concatenate(copy_of)[order], counts)
    return replace(made, units=units).at_rate(rate)


def poisson(
    prompt: int, output: int, rate: float, requests: int, seed: int, *, spread: float = 0.0, name: str = ""
) -> Workload:
    """Poisson arrivals of like requests (FlowKV's inputs of 1K, 5K and 10K tokens with 256 out).

    `spread` draws lengths from a lognormal distribution of that sigma around the given medians.
    """
    rng = np.random.default_rng(seed)
    arrival = np.cumsum(rng.exponential(1 / rate, requests))
    lengths = [
        np.maximum(1, median * np.exp(rng.normal(0, spread, requests))).astype(np.int64)
        for median in (prompt, output)
    ]
    return build(name or f"poisson {prompt}/{output}", arrival, lengths[0], lengths[1])


@dataclass(frozen=True, slots=True)
class Phase:
    """Traffic of one kind for a while."""

    seconds: float
    rate: float
    prompt: int
    output: int


def phases(parts: Sequence[Phase], seed: int, *, spread: float = 0.3, name: str = "phases") -> Workload:
    """One phase after the other, Poisson within each (the load that a static split cannot follow)."""
    rng = np.random.default_rng(seed)
    arrival: list[Floats] = []
    prompt: list[Ints] = []
    output: list[Ints] = []
    start = 0.0
    for part in parts:
        count = int(rng.poisson(part.rate * part.seconds))
        arrival.append(start + np.sort(rng.uniform(0, part.seconds, count)))
        for column, median in ((prompt, part.prompt), (output, part.output)):
            drawn = median * np.exp(rng.normal(0, spread, count))
            column.append(np.maximum(1, drawn).astype(np.int64))
        start += part.seconds
    return build(name, np.concatenate(arrival), np.concatenate(prompt), np.concatenate(output))


def merge(parts: Sequence[Workload], name: str) -> Workload:
    """Several workloads at once, e.g. of tenants with different priorities; prefixes stay apart."""
    sizes = {part.unit_tokens for part in parts}
    if len(sizes) != 1:
        raise WorkloadError(f"prefix blocks of different sizes cannot be merged: {sorted(sizes)}")
    offset = 0
    units: list[Ints] = []
    for part in parts:
        units.append(part.units + offset)
        offset += int(part.units.max()) + 1 if len(part.units) else 0
    counts = np.concatenate([part.first[1:] - part.first[:-1] for part in parts])
    first = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=first[1:])
    whole = Workload(
        name,
        np.concatenate([part.arrival for part in parts]),
        np.concatenate([part.prompt for part in parts]),
        np.concatenate([part.output for part in parts]),
        np.concatenate([part.tenant for part in parts]),
        np.concatenate([part.priority for part in parts]),
        sizes.pop(),
        np.concatenate(units),
        first,
    )
    return whole.take(np.argsort(whole.arrival, kind="stable"))
