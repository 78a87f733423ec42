"""What every bench shares: the machine's description, statistics, the table, the JSON file.

JSON: `{"machine": {...}, "rows": [...], "checks": [{name, value, unit, target, holds}]}`; one check per
aim, `holds` is null where this run cannot tell.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import platform
import socket
import statistics
import sys
import time
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import orjson
import psutil
import uvloop

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Precision:
    """How weights are kept: the dtype (of KV pages too) and the blocks, as executors and `up` name them."""

    dtype: str
    quantization: str = ""
    weight_bytes: float = 2.0  # of a layer's weight, scales included
    head_bytes: float = 2.0  # of one of the head's

    @property
    def options(self) -> tuple[str, ...]:
        """Of `deepflow up`."""
        blocks = ("--quantization", self.quantization) if self.quantization else ()
        return ("--dtype", self.dtype, *blocks)


PRECISIONS = {
    "f32": Precision("float32", "", 4.0, 4.0),
    "bf16": Precision("bfloat16"),
    "int8": Precision("bfloat16", "int8", 1.0625, 1.0625),  # 32 values, a float16 scale
    "int4": Precision(
        "bfloat16", "int4", 0.625, 1.0625
    ),  # 32 values, a float16 scale and minimum; the head is int8
}


def machine() -> dict[str, object]:
    cpu = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load_1m": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "system": platform.platform(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


@dataclass
class Check:
    """One aim: what was measured, what was wanted, whether it holds (None = this run cannot tell)."""

    name: str
    value: float | None
    unit: str
    target: str
    holds: bool | None


@dataclass
class Report:
    name: str
    rows: list[dict[str, object]] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    machine: dict[str, object] = field(default_factory=machine)

    def add(self, **row: object) -> None:
        self.rows.append(row)

    def check(self, name: str, value: float | None, unit: str, target: str, holds: bool | None) -> None:
        self.checks.append(Check(name, value, unit, target, holds))

    def finish(self, json_path: str | None) -> int:
        """Prints the tables, writes the JSON; returns 1 if an aim was missed."""
        print(f"\n{self.name} on {self.machine['cpu']}, {self.machine['cores']} cores, "
              f"load before {self.machine['load_1m']}")  # fmt: skip
        for _, rows in itertools.groupby(self.rows, key=tuple):  # rows of like columns are a table
            print()
            print_table(list(rows))
        if self.checks:
            print()
            print_table([_check_row(check) for check in self.checks])
        if json_path:
            data = {"machine": self.machine, "rows": self.rows, "checks": [asdict(c) for c in self.checks]}
            Path(json_path).write_bytes(orjson.dumps(data, option=orjson.OPT_INDENT_2))
        return int(any(check.holds is False for check in self.checks))


def _check_row(check: Check) -> dict[str, object]:
    holds = {True: "yes", False: "NO", None: "not told"}[check.holds]
    return {
        "aim": check.name,
        "value": check.value,
        "unit": check.unit,
        "target": check.target,
        "holds": holds,
    }


def print_table(rows: Sequence[dict[str, object]]) -> None:
    """Prints rows as a Markdown table, so that it can go into docs/ as it is."""
    if not rows:
        return
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_format(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(column), *(len(row[i]) for row in cells)) for i, column in enumerate(columns)]
    for line in [columns, ["-" * width for width in widths], *cells]:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")
    sys.stdout.flush()


def _format(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)


MOST_OTHER_WORK = 0.1  # of the machine, above which a run tells nothing (ours)


class OtherWork:
    """What processes that are not part of the measurement take of this machine meanwhile.

    On a shared machine a run that was disturbed tells nothing; this is how it is known.
    """

    def __init__(self, pids: Iterable[int]) -> None:
        """`pids`: the measured processes; their present descendants and this process are added."""
        self._known = {psutil.Process()}
        for pid in pids:
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                self._known |= {process, *process.children(recursive=True)}
        self._since = self._seconds()

    def _seconds(self) -> tuple[float, float, float]:
        times = psutil.cpu_times()
        busy = sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)
        known = 0.0
        for process in self._known:
            with contextlib.suppress(psutil.NoSuchProcess):
                own = process.cpu_times()
                known += own.user + own.system
        return time.perf_counter(), busy, known

    def share(self) -> float:
        """The share of all cores since the start, 0 to 1. Time the hypervisor kept counts too."""
        begun, now = self._since, self._seconds()
        wall, busy, known = (b - a for a, b in zip(begun, now, strict=True))
        return max(0.0, busy - known) / (wall * (os.cpu_count() or 1))


def percentile(values: Sequence[float], q: float) -> float:
    """Nearest-rank percentile; NaN of nothing."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, round(q / 100 * len(ordered) + 0.5) - 1))]


def median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else float("nan")


def mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else float("nan")


R = TypeVar("R")


class Samples(Generic[R]):
    """Runs (flat dataclasses), kept in a file of JSON lines as they come where one is named.

    What the file holds from earlier calls counts too: so a long table can be measured in short windows.
    """

    def __init__(self, path: str | None, kind: type[R]) -> None:
        self._path = Path(path) if path else None
        lines = self._path.read_bytes().splitlines() if self._path and self._path.exists() else []
        self.all = [kind(**orjson.loads(line)) for line in lines]

    def add(self, run: R) -> None:
        self.all.append(run)
        if self._path:
            with self._path.open("ab") as file:
                file.write(orjson.dumps(run) + b"\n")


def gaps(times: Sequence[float]) -> list[float]:
    return [later - earlier for earlier, later in itertools.pairwise(times)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def parser(description: str) -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--quick", action="store_true", help="under 50 s; aims it cannot reach are not told")
    result.add_argument("--json", metavar="PATH", help="write machine, rows and checks here")
    return result


def run(main: Coroutine[Any, Any, int]) -> None:
    """Runs an async bench main and exits with its code."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        sys.exit(runner.run(main))
