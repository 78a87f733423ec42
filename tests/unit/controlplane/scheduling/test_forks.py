"""Whom starting executors ask for weights."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from controlplane.scheduling.forks import FANOUT, MAX_SOURCES, fork_sources


@given(st.integers(0, 5), st.integers(0, 300))
def test_members_stand_in_a_tree_that_nobody_waits_in_a_circle_in(ready: int, starting: int) -> None:
    tree = [f"r{number}" for number in range(ready)]
    children: dict[str, int] = {}
    depth = dict.fromkeys(tree, 0)
    for number in range(starting):
        earlier = [f"s{other}" for other in range(number)]
        sources = fork_sources(tree[:ready], earlier)
        me = f"s{number}"
        assert len(sources) == len(set(sources)) == min(MAX_SOURCES, ready + number)
        assert set(sources) <= {*tree[:ready], *earlier}  # nobody younger: no circle
        if sources:
            children[sources[0]] = children.get(sources[0], 0) + 1
            depth[me] = depth.get(sources[0], 0) + 1
    assert all(count <= FANOUT for count in children.values())


def test_with_one_that_serves_sixty_four_are_six_levels_below_it() -> None:
    depth = {"r": 0}
    for number in range(64):
        depth[f"s{number}"] = 1 + depth[fork_sources(["r"], [f"s{other}" for other in range(number)])[0]]
    assert max(depth.values()) == 6
