"""Random faults against real processes, two a lane. A seed that failed is run again by its number:

DEEPFLOW_FAULT_SEED=17 pytest tests/integration/kvtransfer/test_faults.py
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from tests.support.kv_faults import Outcome, run_all, schedule

ONE = os.environ.get("DEEPFLOW_FAULT_SEED")


def check(found: dict[int, Outcome]) -> Counter[str]:
    bad = {seed: outcome.problems for seed, outcome in found.items() if outcome.problems}
    assert not bad, "\n".join(f"seed {seed}: {problems}: {schedule(seed)}" for seed, problems in bad.items())
    return sum((outcome.pulls for outcome in found.values()), Counter())


async def test_faults_end_in_the_same_bytes_or_a_typed_error_and_leave_nothing(tmp_path: Path) -> None:
    pulls = check(await run_all(tmp_path, [int(ONE)] if ONE else range(24), 2))
    assert ONE or pulls["ok"] > 10


@pytest.mark.slow
@pytest.mark.timeout(1800)
async def test_two_thousand_schedules_of_faults(tmp_path: Path) -> None:
    pulls = check(await run_all(tmp_path, range(2000), 4))
    assert pulls["ok"] > 1000
