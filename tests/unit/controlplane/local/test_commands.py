"""Command lines of children, and what is tidied before they start."""

from __future__ import annotations

import os
from pathlib import Path

from controlplane.local.commands import base_env, executor_spec, forget_dead_gauges, gateway_spec
from controlplane.local.settings import StackSettings, StatePaths
from controlplane.local.topology import RoleName

DEAD = 2**22 + 17  # above any pid of a Linux machine


def test_gauges_of_ended_gateways_are_forgotten_and_counters_stay(tmp_path: Path) -> None:
    kept = [f"gauge_livesum_{os.getpid()}.db", f"counter_{DEAD}.db", "gauge_livesum_x.db"]
    for name in [*kept, f"gauge_livesum_{DEAD}.db", f"gauge_liveall_{DEAD}.db"]:
        (tmp_path / name).touch()
    forget_dead_gauges(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


def test_a_folder_that_is_not_there_is_fine(tmp_path: Path) -> None:
    forget_dead_gauges(tmp_path / "absent")


def test_no_secret_stands_on_a_command_line(tmp_path: Path) -> None:
    paths, settings = StatePaths(tmp_path), StackSettings(tmp_path, ())
    env = base_env(paths, "redis://:hunter2@example/0", "c1uster-t0ken")
    specs = [
        executor_spec(settings, paths, "te-0", RoleName.PREFILL, env),
        gateway_spec(settings, paths, 0, 9, env),
    ]
    for spec in specs:
        assert spec.env["REDIS_URL"] == "redis://:hunter2@example/0"
        assert not any("hunter2" in part or "c1uster-t0ken" in part for part in spec.command)
