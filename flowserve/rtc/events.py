"""The exact, numbered change log of what the cache could reuse.

Gateways keep prompt trees from it (`controlplane`): an identity is *stored* when it first becomes
matchable in any tier and *removed* when the last tier drops it. Changes between two flushes are
netted, so within one flush order does not matter and an identity appears at most once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CacheChanges:
    """`sequence` numbers the first change; the flush after this one starts at `next_sequence`."""

    sequence: int
    stored: list[bytes]
    removed: list[bytes]

    @property
    def next_sequence(self) -> int:
        return self.sequence + len(self.stored) + len(self.removed)


class ChangeLog:
    """Pending is bounded by the number of blocks in all tiers: opposite changes cancel."""

    def __init__(self) -> None:
        self._pending: dict[bytes, bool] = {}  # identity -> stored (True) or removed (False)
        self._next = 1

    @property
    def next_sequence(self) -> int:
        return self._next

    def stored(self, identity: bytes) -> None:
        self._change(identity, True)

    def removed(self, identity: bytes) -> None:
        self._change(identity, False)

    def _change(self, identity: bytes, stored: bool) -> None:
        if self._pending.get(identity) is (not stored):
            del self._pending[identity]
        else:
            self._pending[identity] = stored

    def flush(self) -> CacheChanges | None:
        """All changes since the last flush; None if there were none."""
        if not self._pending:
            return None
        changes = CacheChanges(
            self._next,
            [identity for identity, stored in self._pending.items() if stored],
            [identity for identity, stored in self._pending.items() if not stored],
        )
        self._pending.clear()
        self._next = changes.next_sequence
        return changes


def replay(held: set[bytes], changes: Iterable[CacheChanges]) -> set[bytes]:
    """What a follower holds after applying `changes` to `held` (the rule for every consumer)."""
    for change in changes:
        held = (held | set(change.stored)) - set(change.removed)
    return held
