"""Which executor has which prefix cached: block identity -> the executors that hold it.

Identities are hash chains (kvtransfer.blockhash), so equal identity means equal prefix: a prompt's match
is how far its chain goes. Fed by the executors' exact, numbered KV events; after a gap an executor counts
as empty until its next snapshot, so a hint may be missing but is never made up. A wrong hint (evicted
meanwhile) costs a local miss, nothing else.

Bounded: beyond `max_blocks` the least recently matched identities are forgotten, tails of prompts before
their heads, because a chain without its head matches nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class _Follower:
    bit: int
    next_sequence: int | None = None  # None: waits for a snapshot
    held: set[bytes] = field(default_factory=set)


class PrefixIndex:
    """Not thread-safe; one per process."""

    def __init__(self, max_blocks: int = 1 << 20) -> None:
        self._max_blocks = max_blocks
        self._masks: dict[bytes, int] = {}  # in order of use, least recent first
        self._followers: dict[str, _Follower] = {}
        self._by_bit: dict[int, str] = {}
        self.gaps = 0
        self.evicted = 0

    def __len__(self) -> int:
        """Identities known."""
        return len(self._masks)

    def blocks(self, te_id: str) -> int:
        follower = self._followers.get(te_id)
        return 0 if follower is None else len(follower.held)

    def following(self, te_id: str) -> bool:
        follower = self._followers.get(te_id)
        return follower is not None and follower.next_sequence is not None

    def apply(
        self,
        te_id: str,
        sequence: int,
        stored: Sequence[bytes] = (),
        removed: Sequence[bytes] = (),
        cleared: bool = False,
    ) -> bool:
        """One event: (held | stored) - removed. False: a gap, or still waiting for a snapshot.

        `sequence` numbers the event's first change; with `cleared` it is the number of the first change
        after the snapshot that the event holds.
        """
        follower = self._followers.get(te_id)
        if follower is None:
            follower = self._followers[te_id] = _Follower(self._free_bit())
            self._by_bit[follower.bit] = te_id
        if cleared:
            self._forget_all(follower)
            follower.next_sequence = sequence
        elif follower.next_sequence is None:
            return False
        elif follower.next_sequence != sequence:
            self.gaps += 1
            self._forget_all(follower)
            follower.next_sequence = None
            return False
        else:
            follower.next_sequence = sequence + len(stored) + len(removed)
        flag = 1 << follower.bit
        # Heads come first in an event; kept last in the order of use, they go last.
        for identity in reversed(stored):
            self._masks[identity] = self._masks.pop(identity, 0) | flag
            follower.held.add(identity)
        for identity in removed:
            self._forget(identity, follower)
        self._evict()
        return True

    def drop(self, te_id: str) -> None:
        """The executor is gone, or another incarnation took its place."""
        follower = self._followers.pop(te_id, None)
        if follower is not None:
            self._forget_all(follower)
            del self._by_bit[follower.bit]

    def match(self, identities: Sequence[bytes]) -> dict[str, int]:
        """Leading blocks of the prompt that each executor has cached; those with none are left out."""
        found: dict[str, int] = {}
        mask = -1
        depth = 0
        for identity in identities:
            here = mask & self._masks.get(identity, 0)
            self._note(mask & ~here, depth, found)
            mask = here
            if not mask:
                break
            depth += 1
        self._note(mask, depth, found)
        for identity in reversed(identities[:depth]):  # used now; heads last, so that they outlive tails
            self._masks[identity] = self._masks.pop(identity)
        return found

    def _note(self, ended: int, depth: int, found: dict[str, int]) -> None:
        if depth == 0:
            return
        for bit in _bits(ended):
            found[self._by_bit[bit]] = depth

    def _free_bit(self) -> int:
        bit = 0
        while bit in self._by_bit:
            bit += 1
        return bit

    def _forget(self, identity: bytes, follower: _Follower) -> None:
        if identity not in follower.held:
            return
        follower.held.discard(identity)
        left = self._masks[identity] & ~(1 << follower.bit)
        if left:
            self._masks[identity] = left
        else:
            del self._masks[identity]

    def _forget_all(self, follower: _Follower) -> None:
        for identity in list(follower.held):
            self._forget(identity, follower)

    def _evict(self) -> None:
        while len(self._masks) > self._max_blocks:
            identity = next(iter(self._masks))
            for bit in _bits(self._masks.pop(identity)):
                self._followers[self._by_bit[bit]].held.discard(identity)
            self.evicted += 1


def _bits(mask: int) -> Iterable[int]:
    while mask > 0:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low
