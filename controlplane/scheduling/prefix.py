"""Which executor holds which prefix blocks: block identity -> set of executors.

Fed by the executors' exact, numbered cache events; asked by the job executor before `decide`. Block
identities chain over all tokens before them, so a flat table is the prompt tree: the longest cached
prefix is the longest run of leading identities that one executor holds.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

DEFAULT_MAX_BLOCKS = 262_144
"""Identities remembered over all executors (ours: 4 M tokens at 16 a block, some tens of MiB)."""


class PrefixIndex:
    """Bounded: beyond `max_blocks` the identities announced longest ago are forgotten (never wrong, only
    less affine). An executor that is not followed, or whose numbering shows a gap, matches nothing until
    its next snapshot."""

    def __init__(self, max_blocks: int = DEFAULT_MAX_BLOCKS) -> None:
        if max_blocks < 1:
            raise ValueError("max_blocks must be positive")
        self._max_blocks = max_blocks
        # Identity -> bit set of slots. Ordered: a plain dict's first key is found past all that was dropped.
        self._holders: OrderedDict[bytes, int] = OrderedDict()
        self._slots: dict[str, int] = {}
        self._free: list[int] = []
        self._next: dict[str, int | None] = {}  # number of the next change; None = waiting for a snapshot
        self.evicted = 0
        self.gaps = 0

    def __len__(self) -> int:
        return len(self._holders)

    def follows(self, te_id: str) -> bool:
        """The executor's blocks are known."""
        return self._next.get(te_id) is not None

    def apply(
        self,
        te_id: str,
        sequence: int,
        stored: Iterable[bytes] = (),
        removed: Iterable[bytes] = (),
        cleared: bool = False,
    ) -> bool:
        """Takes in one event; False if it showed a gap (the executor's blocks are dropped then).

        `sequence` numbers the event's first change. A `cleared` event is a snapshot: `stored` is everything,
        `sequence` the number of the change after it. An unknown executor may start at change 1.
        """
        if cleared:
            self._forget_blocks(te_id)
            self._store(te_id, stored)
            self._next[te_id] = sequence
            return True
        stored, removed = list(stored), list(removed)
        expected = self._next.get(te_id) if te_id in self._next else 1
        end = sequence + len(stored) + len(removed)
        if expected is None:
            return False
        if sequence != expected:
            if end <= expected:
                return True  # part of the snapshot already
            self.gaps += 1
            self._forget_blocks(te_id)
            self._next[te_id] = None
            return False
        self._store(te_id, stored)
        self._remove(te_id, removed)
        self._next[te_id] = end
        return True

    def drop(self, te_id: str) -> None:
        """The executor is gone, or its stream: nothing is known of it until the next snapshot."""
        self._forget_blocks(te_id)
        self._next.pop(te_id, None)
        slot = self._slots.pop(te_id, None)
        if slot is not None:
            self._free.append(slot)

    def match(self, hashes: Sequence[bytes]) -> dict[str, int]:
        """Leading blocks of `hashes` that each executor holds; executors that hold none are left out."""
        found: dict[str, int] = {}
        alive = -1
        for count, identity in enumerate(hashes):
            holders = self._holders.get(identity, 0) & alive
            if count and holders != alive:
                self._note(found, alive & ~holders, count)
            alive = holders
            if not alive:
                return found
        if hashes:
            self._note(found, alive, len(hashes))
        return found

    def _note(self, found: dict[str, int], slots: int, count: int) -> None:
        for te_id, slot in self._slots.items():
            if slots >> slot & 1:
                found[te_id] = count

    def _slot(self, te_id: str) -> int:
        slot = self._slots.get(te_id)
        if slot is None:
            slot = self._free.pop() if self._free else len(self._slots)
            self._slots[te_id] = slot
        return slot

    def _store(self, te_id: str, stored: Iterable[bytes]) -> None:
        bit = 1 << self._slot(te_id)
        for identity in stored:
            self._holders[identity] = self._holders.get(identity, 0) | bit
        while len(self._holders) > self._max_blocks:
            self._holders.popitem(last=False)
            self.evicted += 1

    def _remove(self, te_id: str, removed: Iterable[bytes]) -> None:
        bit = 1 << self._slot(te_id)
        for identity in removed:
            holders = self._holders.get(identity, 0) & ~bit
            if holders:
                self._holders[identity] = holders
            else:
                self._holders.pop(identity, None)

    def _forget_blocks(self, te_id: str) -> None:
        if te_id in self._slots:
            bit = 1 << self._slots[te_id]
            self._remove(te_id, [identity for identity, holders in self._holders.items() if holders & bit])
