"""Starts of a fleet in the twin."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.twin.starts import (
    LAYOUTS,
    Hardware,
    fork_seconds,
    load_seconds,
    parents_of,
    spread,
    waterfall,
)

QWEN_72B = 145e9
CHUNK = 64e6


def test_one_node_takes_what_the_papers_table_says() -> None:
    """DeepServe's TE-Load of Qwen-72B TP8: 24 s from SSD, 3.2 s from memory, 0.91 s by fork."""
    hardware = Hardware()
    assert load_seconds("ssd", QWEN_72B, hardware) == pytest.approx(24, rel=0.02)
    assert load_seconds("memory", QWEN_72B, hardware) == pytest.approx(3.2, rel=0.02)
    assert load_seconds("fork", QWEN_72B, hardware) == pytest.approx(0.91, rel=0.02)
    with pytest.raises(ValueError, match="tape"):
        load_seconds("tape", QWEN_72B, hardware)
    with pytest.raises(ValueError, match="tepid"):
        waterfall("tepid", QWEN_72B, hardware)


def test_a_store_is_shared_by_all_who_load_at_once() -> None:
    hardware = Hardware()
    one, many = (waterfall("cold", QWEN_72B, hardware, nodes) for nodes in (1, 64))
    assert many.te_load > 3 * one.te_load
    assert one.total == pytest.approx(one.te_pre_load + one.te_load + 0.45)
    assert waterfall("hot", QWEN_72B, hardware).te_pre_load == 0


@given(st.integers(1, 80), st.integers(1, 9), st.integers(1, 40), st.booleans())
def test_every_target_gets_everything_no_faster_than_a_port_sends(
    targets: int, fanout: int, chunks: int, pipelined: bool
) -> None:
    times = spread(parents_of(targets, fanout), chunks, 1.0, pipelined=pipelined)
    assert len(times) == targets
    assert min(times) >= chunks
    assert max(times) <= chunks * targets * fanout  # worse than one after the other would be no tree
    if not pipelined:
        assert max(times) >= max(spread(parents_of(targets, fanout), chunks, 1.0))


def test_a_chain_costs_a_chunk_a_node_and_a_star_the_image_a_node() -> None:
    assert max(spread(parents_of(10, 1), 100, 1.0)) == 109
    assert max(spread(parents_of(10, 10), 100, 1.0)) == 1000
    assert max(spread(parents_of(7, 2), 100, 1.0)) == pytest.approx(2 * 100, rel=0.1)
    with pytest.raises(ValueError, match="join first"):
        spread([0, 2], 1, 1.0)


def test_our_tree_is_ahead_of_what_is_fed_when_whole_and_of_a_star() -> None:
    last = {layout.name: max(fork_seconds(layout, 64, QWEN_72B, Hardware(), CHUNK)) for layout in LAYOUTS}
    ours = last.pop("tree of 2 (ours)")
    assert ours < min(value for name, value in last.items() if name != "chain")
    assert last["one to one, all from the source"] / ours > 20
