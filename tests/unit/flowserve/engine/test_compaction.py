"""Prefills that compact scattered blocks before they announce them. Needs nothing."""

from __future__ import annotations

import pytest

from flowserve.engine.config import EngineConfig
from kvtransfer.runs import runs_of
from tests.support.engine import Rig, expected_output, tokens_of
from tests.unit.flowserve.engine.test_handover import Pair


def pair_with(call_seconds: float) -> Pair:
    pair = Pair(blocks_d=256)
    config = EngineConfig(max_running=8, max_batch_tokens=64, compact_call_seconds=call_seconds)
    pair.p = Rig(256, wire=pair.wire, config=config, clock=pair.d.clock)
    return pair


def pull(pair: Pair, prompt: list[int], task_id: str) -> list[int]:
    first = pair.handed_over(prompt, task_id=task_id)
    second = pair.decode(prompt, first.tokens, task_id=task_id)
    pair.d.step()
    pair.wire.pump()
    pair.d.run()
    pair.p.step()
    return second.tokens


@pytest.mark.parametrize(("call_seconds", "runs"), [(1.0, 1), (0.0, 2)])
def test_a_table_behind_a_cached_prefix_is_read_from_one_run(call_seconds: float, runs: int) -> None:
    pair = pair_with(call_seconds)
    prefix, other = tokens_of(1, 40), tokens_of(2, 20)
    pull(pair, prefix, "a")
    pull(pair, other, "b")  # lies behind the prefix, which so cannot go on in place
    prompt = prefix + tokens_of(3, 20)
    assert pull(pair, prompt, "c") == expected_output(prompt, 10)[0]
    assert len(runs_of(pair.wire.transfers["c.0"].announced)) == runs
    pair.assert_clean()


def test_copies_live_as_long_as_the_offer_and_no_longer() -> None:
    pair = pair_with(1.0)
    prefix = tokens_of(1, 40)
    pull(pair, prefix, "a")
    pull(pair, tokens_of(2, 20), "b")
    pair.wire.hold_releases = True
    pair.handed_over(prefix + tokens_of(3, 20), task_id="c")
    assert pair.p.cache.held_blocks == 2 * 15, "its blocks and their copies"
    assert pair.p.engine.audit().leaked_blocks == 0
    pair.wire.expire()
    pair.p.step()
    pair.assert_clean()
    assert pair.p.cache.held_blocks == 0
