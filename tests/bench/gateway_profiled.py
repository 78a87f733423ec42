"""`python -m controlplane.gateway` under a profiler: SIGUSR1 begins, SIGUSR2 ends and writes the figures.

Called by `tests.bench.gateway --profile`; `DEEPFLOW_BENCH_PROFILE` names the file.
"""

from __future__ import annotations

import cProfile
import os
import signal
from types import FrameType

from controlplane.gateway.__main__ import main

_profiler = cProfile.Profile()


def _begin(number: int, frame: FrameType | None) -> None:
    _profiler.enable()


def _end(number: int, frame: FrameType | None) -> None:
    _profiler.disable()
    target = os.environ["DEEPFLOW_BENCH_PROFILE"]
    _profiler.dump_stats(target + ".new")
    os.replace(target + ".new", target)


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, _begin)
    signal.signal(signal.SIGUSR2, _end)
    main()
