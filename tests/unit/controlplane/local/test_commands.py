"""Command lines of children, and what is tidied before they start."""

from __future__ import annotations

import os
from pathlib import Path

from controlplane.local.commands import forget_dead_gauges

DEAD = 2**22 + 17  # above any pid of a Linux machine


def test_gauges_of_ended_gateways_are_forgotten_and_counters_stay(tmp_path: Path) -> None:
    kept = [f"gauge_livesum_{os.getpid()}.db", f"counter_{DEAD}.db", "gauge_livesum_x.db"]
    for name in [*kept, f"gauge_livesum_{DEAD}.db", f"gauge_liveall_{DEAD}.db"]:
        (tmp_path / name).touch()
    forget_dead_gauges(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


def test_a_folder_that_is_not_there_is_fine(tmp_path: Path) -> None:
    forget_dead_gauges(tmp_path / "absent")
