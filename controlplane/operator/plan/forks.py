"""Whom a starting executor asks for weights: the tree of a fork (DeepServe, section 6.3), one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

FANOUT = 4
"""Executors that one feeds at a time: `kvtransfer.images.MAX_FEEDS`, which refuses more."""
MAX_SOURCES = 8
"""That are named to one (ours): where the first is lost or feeds others, the next is asked."""

T = TypeVar("T")


def fork_sources(ready: Sequence[T], earlier: Sequence[T]) -> list[T]:
    """Whom the next one asks, best first: `ready` have the weights, `earlier` began to load before it.

    The members of the tree in the order they joined feed FANOUT each, so the next one's place tells its
    parent. It asks those after its parent before those above it, who have children already. Ours.
    """
    tree = [*ready, *earlier]
    if not tree:
        return []
    first = len(earlier) // FANOUT if ready else max(0, len(earlier) - 1) // FANOUT
    return [*tree[first:], *tree[:first]][:MAX_SOURCES]
