"""RTC under random use against a naive reference. Needs nothing."""

from __future__ import annotations

from collections import Counter

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from flowserve.rtc import RTC
from flowserve.rtc.events import replay
from tests.support.engine import BLOCK_TOKENS, FakeClock, PageStore

BLOCKS = 9
PROMPTS = [[a] * BLOCK_TOKENS + [b] * BLOCK_TOKENS + [c] * BLOCK_TOKENS + [9] for a in (1, 2) for b in (1, 2)
           for c in (1, 2)]  # fmt: skip


class CacheMachine(RuleBasedStateMachine):
    """Tables are lists of blocks with the identities whose content their owner wrote into them."""

    tables = Bundle("tables")
    host_blocks = 0

    def __init__(self) -> None:
        super().__init__()
        self.store = PageStore(BLOCKS)
        self.cache = RTC(
            self.store, host_bytes=self.host_blocks * self.store.layout.block_bytes, clock=FakeClock()
        )
        self.held: Counter[int] = Counter()
        self.follower: set[bytes] = set()

    def fill(self, block: int, identity: bytes) -> None:
        self.store.store(block, identity * (self.store.layout.block_bytes // len(identity)))

    def content(self, block: int) -> bytes:
        return bytes(self.store.view(block, 1))[:16]

    @rule(target=tables, prompt=st.sampled_from(PROMPTS), upto=st.integers(0, 3), commit=st.booleans())
    def admit(self, prompt: list[int], upto: int, commit: bool) -> list[int]:
        """A sequence: matches, allocates the rest, computes, maybe commits."""
        identities = self.cache.identities(prompt)[:upto]
        match = self.cache.match_identities(identities).device_prefix()
        for block, identity in zip(match.blocks, match.identities, strict=True):
            assert block is not None and self.content(block) == identity, "a match holds what it says"
        before = list(self.store.generations)
        free = self.cache.free_blocks
        table = self.cache.alloc_blocks(upto - len(match), match)
        if table is None:
            assert upto - len(match) > self.cache.available(match)
            assert self.cache.free_blocks == free and self.store.generations == before
            return []
        fresh = table[len(match) :]
        assert table[: len(match)] == list(match.blocks)
        assert not any(self.held[block] for block in fresh), "a held block was handed out"
        assert all(self.store.generations[block] > before[block] for block in fresh)
        assert all(self.store.generations[block] == before[block] for block in table[: len(match)])
        self.held.update(table)
        for block, identity in zip(fresh, identities[len(match) :], strict=True):
            self.fill(block, identity)
            if commit:
                self.cache.commit(block, identity)
        return table

    @rule(table=tables)
    def grow(self, table: list[int]) -> None:
        if not table or not all(self.held[block] for block in table):
            return
        free = self.cache.free_blocks
        block = self.cache.append_block(table)
        assert (block is None) == (free == 0)
        if block is not None:
            assert not self.held[block]
            self.held[block] += 1
            table.append(block)

    @rule(table=consumes(tables))
    def leave(self, table: list[int]) -> None:
        self.cache.free(table)
        self.held.subtract(table)
        table.clear()

    @rule()
    def flush(self) -> None:
        expected = self.cache.snapshot()[0]
        changes = self.cache.take_changes()
        if changes is not None:
            assert changes.sequence == expected
            assert not set(changes.stored) & self.follower and set(changes.removed) <= self.follower
            self.follower = replay(self.follower, [changes])
        assert self.follower == set(self.cache.snapshot()[1])

    @rule()
    def clear(self) -> None:
        self.cache.clear()
        assert self.cache.idle_blocks == 0

    @invariant()
    def every_block_is_accounted_for(self) -> None:
        report = self.cache.audit(self.held.elements())
        assert report.leaked == [] and report.missing == []
        held = sum(1 for count in self.held.values() if count)
        assert self.cache.held_blocks == held and self.cache.free_blocks == BLOCKS - held
        assert self.cache.host_bytes <= self.host_blocks * self.store.layout.block_bytes


class HostTierMachine(CacheMachine):
    host_blocks = 3


TestDeviceTier = CacheMachine.TestCase
TestDeviceTier.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestHostTier = HostTierMachine.TestCase
TestHostTier.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
