"""The global prompt tree: which executor holds which prefix blocks (DeepServe section 5.2).

Fed by the executors' exact, numbered cache events; asked by the job executor before `decide`. Block
identities chain over model, tenant salt and all tokens before them, so a flat table is one tree per model
and tenant: the longest cached prefix is the longest run of leading identities that one executor holds.
Holders are bit sets over slots; which of them count now (role, load, health) is the decision's question.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from controlplane.scheduling.columns import Floats, Slots

DEFAULT_MAX_BLOCKS = 262_144
"""Identities remembered over all executors (ours: 4 M tokens at 16 a block; about 300 bytes each)."""
FEW = 16
"""Bits that are read one by one; more are unpacked at once (ours, where both take the same time)."""


class Matches(Mapping[str, int]):
    """Length of the cached prefix per executor that has one; as a mapping, or by slot."""

    __slots__ = ("_runs", "slots")

    def __init__(self, slots: Slots, runs: Sequence[tuple[int, int]]) -> None:
        self.slots = slots
        self._runs = runs  # (bit set of slots, length), disjoint

    def tokens(self, block_tokens: int, most: int) -> Matches:
        """Blocks to tokens, at most `most`."""
        return Matches(self.slots, [(mask, min(count * block_tokens, most)) for mask, count in self._runs])

    def by_slot(self) -> Floats:
        size = self.slots.size
        found = np.zeros(size)
        for holders, length in self._runs:
            mask = holders
            if mask.bit_count() <= FEW:
                while mask:
                    low = mask & -mask
                    found[low.bit_length() - 1] = length
                    mask ^= low
            else:
                raw = np.frombuffer(mask.to_bytes(-(-size // 8), "little"), dtype=np.uint8)
                found[np.unpackbits(raw, count=size, bitorder="little").view(bool)] = length
        return found

    def __getitem__(self, te_id: str) -> int:
        slot = self.slots.get(te_id)
        if slot is not None:
            for mask, length in self._runs:
                if mask >> slot & 1:
                    return length
        raise KeyError(te_id)

    def __iter__(self) -> Iterator[str]:
        return (te_id for te_id, slot in self.slots if any(mask >> slot & 1 for mask, _ in self._runs))

    def __len__(self) -> int:
        return sum(mask.bit_count() for mask, _ in self._runs)

    def beyond(self, length: int) -> Iterator[tuple[str, int]]:
        """Executors with more than `length`, the longest first: none of the others is looked at."""
        for mask, found in sorted(self._runs, key=lambda run: -run[1]):
            if found <= length:
                return
            yield from ((te_id, found) for te_id, slot in self.slots if mask >> slot & 1)


class PrefixIndex:
    """Bounded: beyond `max_blocks` the identities announced longest ago are forgotten (never wrong, only
    less affine). An executor that is not followed, or whose numbering shows a gap, matches nothing until
    its next snapshot."""

    def __init__(self, max_blocks: int = DEFAULT_MAX_BLOCKS, slots: Slots | None = None) -> None:
        """`slots` shared with a `Columns` are released by their owner, after `drop`."""
        if max_blocks < 1:
            raise ValueError("max_blocks must be positive")
        self._max_blocks = max_blocks
        # Identity -> bit set of slots. Ordered: a plain dict's first key is found past all that was dropped.
        self._holders: OrderedDict[bytes, int] = OrderedDict()
        self._own_slots = slots is None
        self._slots = slots or Slots()
        self._blocks: dict[str, set[bytes]] = {}  # what each holds, so that one that leaves costs its own
        self._names: dict[int, str] = {}  # slot -> executor, as in _blocks
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
        if self._own_slots:
            self._slots.release(te_id)

    def match(self, hashes: Sequence[bytes]) -> Matches:
        """Leading blocks of `hashes` that each executor holds; executors that hold none are left out."""
        runs: list[tuple[int, int]] = []
        get = self._holders.get
        alive, count = -1, 0
        for identity in hashes:
            holders = get(identity, 0)
            if holders is not alive:
                both = holders & alive
                if both != alive and count:
                    runs.append((alive & ~both, count))
                # The stored object itself, so that the next block of the same run is one comparison.
                alive = holders if both == holders else both
                if not alive:
                    break
            count += 1
        if alive > 0:
            runs.append((alive, count))
        return Matches(self._slots, runs)

    def _store(self, te_id: str, stored: Iterable[bytes]) -> None:
        slot = self._slots.take(te_id)
        bit = 1 << slot
        self._names[slot] = te_id
        mine = self._blocks.setdefault(te_id, set())
        holders = self._holders
        before, after = 0, bit
        for identity in stored:
            old = holders.get(identity, 0)
            if old != before:
                before, after = old, old | bit
            holders[identity] = after  # one object for a run: bit sets of large fleets take a kilobyte
            mine.add(identity)
        while len(holders) > self._max_blocks:
            identity, mask = holders.popitem(last=False)
            while mask:
                low = mask & -mask
                self._blocks[self._names[low.bit_length() - 1]].discard(identity)
                mask ^= low
            self.evicted += 1

    def _remove(self, te_id: str, removed: Iterable[bytes]) -> None:
        mine = self._blocks.get(te_id)
        slot = self._slots.get(te_id)
        if mine is None or slot is None:
            return
        bit = 1 << slot
        for identity in removed:
            if identity not in mine:
                continue
            mine.discard(identity)
            holders = self._holders[identity] & ~bit
            if holders:
                self._holders[identity] = holders
            else:
                del self._holders[identity]

    def _forget_blocks(self, te_id: str) -> None:
        blocks = self._blocks.get(te_id)
        if blocks:
            self._remove(te_id, list(blocks))
        if blocks is not None:
            del self._blocks[te_id]
