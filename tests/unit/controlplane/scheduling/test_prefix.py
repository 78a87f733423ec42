"""The prefix index follows exact events: against a naive reference, over gaps, within its bound."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from controlplane.scheduling.prefix import PrefixIndex
from kvtransfer.blockhash import block_hashes, chain_seed

SEED = chain_seed("model@1")
IDS = ["te-0", "te-1", "te-2"]
BLOCKS = [bytes([i]) * 16 for i in range(24)]


def chain(tokens: int, first: int = 0) -> list[bytes]:
    return block_hashes(range(first, first + tokens), SEED)


def test_the_longest_run_of_leading_blocks_counts() -> None:
    index = PrefixIndex()
    prompt = chain(160)
    index.apply("te-0", 1, prompt[:3])
    index.apply("te-1", 1, prompt[:7])
    index.apply("te-2", 1, prompt[2:])  # without the head the rest is of no use
    assert index.match(prompt) == {"te-0": 3, "te-1": 7}
    assert index.match(prompt[:2]) == {"te-0": 2, "te-1": 2}
    assert index.match(chain(160, first=1)) == {}
    assert index.match([]) == {}


def test_another_tenants_salt_matches_nothing() -> None:
    index = PrefixIndex()
    index.apply("te-0", 1, chain(64))
    other = block_hashes(range(64), chain_seed("model@1", salt=b"tenant"))
    assert index.match(other) == {}


def test_a_gap_drops_the_executor_until_its_snapshot() -> None:
    index = PrefixIndex()
    prompt = chain(64)
    assert index.apply("te-0", 1, prompt[:2])
    assert not index.apply("te-0", 7, prompt[2:])
    assert index.match(prompt) == {}
    assert not index.follows("te-0")
    assert index.gaps == 1
    assert not index.apply("te-0", 9, prompt)  # still waiting
    assert index.apply("te-0", 20, prompt[:3], cleared=True)
    assert index.match(prompt) == {"te-0": 3}
    assert index.apply("te-0", 20, prompt[3:])
    assert index.match(prompt) == {"te-0": 4}


def test_a_snapshot_replaces_everything() -> None:
    index = PrefixIndex()
    old, new = chain(64), chain(64, first=1000)
    index.apply("te-0", 1, old)
    index.apply("te-0", 5, new, cleared=True)
    assert index.match(old) == {}
    assert index.match(new) == {"te-0": 4}
    assert len(index) == 4


def test_stored_and_removed_in_one_event_is_removed() -> None:
    index = PrefixIndex()
    prompt = chain(32)
    index.apply("te-0", 1, prompt, removed=prompt[1:])
    assert index.match(prompt) == {"te-0": 1}


def test_a_dropped_executor_leaves_nothing_and_its_place_is_used_again() -> None:
    index = PrefixIndex()
    prompt = chain(64)
    for round_ in range(100):
        te_id = f"te-{round_}"
        index.apply(te_id, 1, prompt)
        assert index.match(prompt) == {te_id: 4}
        index.drop(te_id)
        assert index.match(prompt) == {}
        assert len(index) == 0


@given(st.lists(st.tuples(st.sampled_from(IDS), st.integers(0, 40), st.integers(1, 12)), max_size=40))
def test_it_never_holds_more_than_its_bound_and_never_matches_what_was_not_stored(
    events: list[tuple[str, int, int]],
) -> None:
    index = PrefixIndex(max_blocks=16)
    told: dict[str, set[bytes]] = {te_id: set() for te_id in IDS}
    sequence = dict.fromkeys(IDS, 1)
    for te_id, first, count in events:
        stored = chain(16 * count, first)
        assert index.apply(te_id, sequence[te_id], stored)
        sequence[te_id] += len(stored)
        told[te_id].update(stored)
        assert len(index) <= 16
        for who, blocks in index.match(stored).items():
            assert set(stored[:blocks]) <= told[who]


class FollowsEvents(RuleBasedStateMachine):
    """Any mix of events, drops, gaps and snapshots, against sets."""

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex()
        self.held: dict[str, set[bytes]] = {}
        self.next: dict[str, int | None] = {}

    @rule(
        te_id=st.sampled_from(IDS),
        stored=st.lists(st.sampled_from(BLOCKS), unique=True, max_size=6),
        removed=st.lists(st.sampled_from(BLOCKS), unique=True, max_size=6),
        skip=st.sampled_from([0, 0, 0, 0, 3]),
    )
    def event(self, te_id: str, stored: list[bytes], removed: list[bytes], skip: int) -> None:
        expected = self.next.get(te_id, 1)
        followed = self.index.apply(te_id, (expected or 1) + skip, stored, removed)
        if expected is None or skip:
            assert not followed
            self.held[te_id] = set()
            self.next[te_id] = None
            return
        assert followed
        self.held[te_id] = (self.held.get(te_id, set()) | set(stored)) - set(removed)
        self.next[te_id] = expected + len(stored) + len(removed)

    @rule(te_id=st.sampled_from(IDS), stored=st.sets(st.sampled_from(BLOCKS)), at=st.integers(1, 1000))
    def snapshot(self, te_id: str, stored: set[bytes], at: int) -> None:
        assert self.index.apply(te_id, at, sorted(stored), cleared=True)
        self.held[te_id], self.next[te_id] = set(stored), at

    @rule(te_id=st.sampled_from(IDS))
    def gone(self, te_id: str) -> None:
        self.index.drop(te_id)
        self.held.pop(te_id, None)
        self.next.pop(te_id, None)

    @rule(prompt=st.permutations(BLOCKS))
    def match(self, prompt: list[bytes]) -> None:
        expected = {}
        for te_id, held in self.held.items():
            depth = next((i for i, block in enumerate(prompt) if block not in held), len(prompt))
            if depth:
                expected[te_id] = depth
        assert self.index.match(prompt) == expected

    @invariant()
    def holds_exactly_what_is_held(self) -> None:
        assert len(self.index) == len(set().union(*self.held.values()))


TestFollowsEvents = FollowsEvents.TestCase
