"""Whom a starting executor asks for weights: the tree of a fork (DeepServe, section 6.3), grown one by one.

The operator asks for each executor that it tells to load; the twin (`controlplane.twin.starts`) lays out
fleets with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

FANOUT = 2
"""Children of one in the tree. A source shares its bandwidth among them while what arrives is fed on at once,
so few are fast, and one alone is a chain that is as deep as the fleet; two were chosen by the twin
(docs/twin.md). A source feeds more (`kvtransfer.images.MAX_FEEDS`) where others were lost."""
MAX_SOURCES = 8
"""That are named to one (ours): where the first is lost or feeds others, the next is asked."""

T = TypeVar("T")


def fork_sources(ready: Sequence[T], earlier: Sequence[T], fanout: int = FANOUT) -> list[T]:
    """Whom the next one asks, best first: `ready` have the weights, `earlier` began to load before it.

    The members of the tree in the order they joined feed `fanout` each, so the next one's place tells its
    parent. It asks those after its parent before those above it, who have children already. Ours.
    """
    tree = [*ready, *earlier]
    if not tree:
        return []
    first = len(earlier) // fanout if ready else max(0, len(earlier) - 1) // fanout
    return [*tree[first:], *tree[:first]][:MAX_SOURCES]
