"""How a model came to serve: the steps of a start, measured (DeepServe, section 6: five steps).

| phase          | from                                       | until                                     |
|----------------|--------------------------------------------|-------------------------------------------|
| `scaler_pre`   | whoever scales decided                      | LoadModel came; cold: the process existed |
| `te_pre_load`  | the process existed                         | its libraries and device were ready       |
| `te_load`      | LoadModel could begin                       | the model could compute                   |
| `te_post_load` | from there                                  | pool, engine and a dummy request were done |
| `scaler_post`  | ready                                       | a gateway can send tasks: gateways tell   |

Paths: `cold`, the process came with the load · `warm`, it waited, weights came from storage · `hot`, it
waited, weights lay in the node's memory · `fork`, it waited, weights came from another executor ·
`wake`, the model slept here: its weights waited in host memory, what was missing was memory for its KV.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flowserve.shell import metrics

SCALER_PRE, PRE_LOAD, LOAD, POST_LOAD = "scaler_pre", "te_pre_load", "te_load", "te_post_load"

_PATHS = {"hit": "hot", "forked": "fork", "asleep": "wake"}


@dataclass(frozen=True, slots=True)
class Start:
    """One start of a model."""

    path: str  # "cold" | "warm" | "hot" | "fork" | "wake"
    seconds: Mapping[str, float]  # by phase, in order; without `scaler_pre` where nobody told
    ready_unix: float  # seconds; when it could take tasks

    def observe(self) -> None:
        for phase, seconds in self.seconds.items():
            metrics.ACTUATION.labels(phase, self.path).observe(seconds)

    def __str__(self) -> str:
        return f"{self.path}: " + ", ".join(f"{name} {value:.3f} s" for name, value in self.seconds.items())


def start_of(
    *, cold: bool, weights: str, decided_unix: float, asked_unix: float, ready_age: float,
    load: float, post_load: float,
) -> Start:  # fmt: skip
    """The record of a start that is now done.

    `weights` as `flowserve.executor.local.Opening` says it, or "asleep"; `cold` where the process was asked
    (at `asked_unix`) before it was `ready_age` seconds old, which is when its libraries were ready.
    `decided_unix` is 0 where nobody told. Clocks of two hosts may differ: a decision that lies ahead of us
    counts as now.
    """
    seconds = {PRE_LOAD: ready_age if cold else 0.0, LOAD: load, POST_LOAD: post_load}
    if decided_unix > 0:
        until = time.time() - process_age() if cold else asked_unix
        seconds = {SCALER_PRE: max(0.0, until - decided_unix), **seconds}
    path = "cold" if cold else _PATHS.get(weights, "warm")
    return Start(path, seconds, time.time())


def process_age() -> float:
    """Seconds since the operating system started this process; 0.0 where it does not tell."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        up = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 0.0
    return up - int(fields[19]) / os.sysconf("SC_CLK_TCK")  # field 22 of proc(5): starttime
