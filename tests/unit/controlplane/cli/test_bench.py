"""`deepflow bench scale`: real executors without a stack, and the picture of their starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from controlplane.cli.bench import bar
from controlplane.local import starts, template

real = pytest.mark.skipif(not template.supported(), reason="executors are forked on Linux only")


def test_a_bar_fills_its_share_and_no_step_moves_the_others() -> None:
    steps = {"te_pre_load": 1.0, "te_load": 0.5, "rest": 0.5}
    assert bar(steps, 2.0, 8) == "iiiillrr"
    assert bar(steps, 4.0, 8) == "iilr"
    assert bar({"te_load": 0.001}, 2.0, 8) == ""


@real
@pytest.mark.model
async def test_starts_end_with_a_token_and_tell_their_steps(small_model_path: Path) -> None:
    async with starts.node(small_model_path, "bfloat16") as node:
        taken = []
        for path in ("warm", "hot"):
            executor = node.add(forked=True)
            await node.waits(executor)
            await node.first_token(executor, 16 << 20)
            assert executor.status is not None
            assert executor.status.record.start_path == path
            taken.append(starts.steps(executor))
            await node.remove(executor)
        assert all(list(steps) == list(starts.PHASES) for steps in taken)
        weights = node.paths.weights
        assert weights.exists()
    assert not weights.exists()


@real
@pytest.mark.model
async def test_what_cannot_be_loaded_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    garbage = tmp_path / "garbage.gguf"
    garbage.write_bytes(b"GGUF no model")
    with pytest.raises(starts.StartFailed, match="cannot load"):
        async with starts.node(garbage) as node:
            await node.first_token(node.add(forked=True), 16 << 20)
