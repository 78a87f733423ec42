"""RTC's behaviour, call by call. Needs nothing."""

from __future__ import annotations

import threading

import pytest

from flowserve.rtc import RTC, PopulateState, PrefixMatch
from tests.support.engine import FakeClock, PageStore, tokens_of


def make(num_blocks: int = 8, host_blocks: int = 0) -> tuple[RTC, PageStore]:
    store = PageStore(num_blocks)
    return RTC(store, host_bytes=host_blocks * store.layout.block_bytes, clock=FakeClock()), store


def preserve(cache: RTC, tokens: list[int], fill: bytes | None = None) -> list[int]:
    """Computes and commits the full blocks of `tokens`, and lets them go."""
    identities = cache.identities(tokens)
    table = cache.alloc_blocks(len(identities))
    assert table is not None
    for block, identity in zip(table, identities, strict=True):
        if fill is not None:
            cache.store.store(block, fill * cache.store.layout.block_bytes)
        cache.commit(block, identity)
    cache.free(table)
    return table


def wait(cache: RTC, ticket: int, done: threading.Event) -> PopulateState:
    assert done.wait(5)
    while (state := cache.query_populate(ticket)) is PopulateState.PENDING:
        pass
    return state


def test_a_preserved_prefix_is_matched_and_shared() -> None:
    cache, _ = make()
    tokens = tokens_of(1, 14)
    table = preserve(cache, tokens)
    match = cache.match_by_prefix_token([*tokens[:9], 1, 2, 3])
    assert match.blocks == tuple(table[:2])
    shared = cache.alloc_blocks(1, match)
    again = cache.alloc_blocks(1, match)
    assert shared is not None and again is not None
    assert shared[:2] == again[:2] == table[:2] and shared[2] != again[2]
    assert cache.audit([*shared, *again]).leaked == []
    cache.free(shared)
    cache.free(again)
    assert cache.free_blocks == cache.num_blocks


def test_tenants_and_adapters_share_nothing() -> None:
    cache, _ = make()
    tokens = tokens_of(1, 8)
    preserve(cache, tokens)
    assert len(cache.match_by_prefix_token(tokens)) == 2
    assert len(cache.match_by_prefix_token(tokens, salt=b"tenant")) == 0
    assert len(cache.match_by_prefix_token(tokens, adapter_id="a")) == 0


def test_eviction_spares_held_blocks_and_takes_tails_first() -> None:
    cache, _ = make(6)
    tokens = tokens_of(1, 16)
    preserve(cache, tokens)
    held = cache.alloc_blocks(0, cache.match_by_prefix_token(tokens[:4]))
    assert held is not None
    taken = cache.alloc_blocks(3)
    assert taken is not None
    assert len(cache.match_by_prefix_token(tokens)) == 3, "the last block of the prefix went first"
    assert cache.alloc_blocks(3) is None
    rest = cache.alloc_blocks(2)
    assert rest is not None and not set(rest) & set(held)
    assert len(cache.match_by_prefix_token(tokens)) == 1
    assert cache.append_block(held) is None


def test_matched_idle_blocks_do_not_count_as_available() -> None:
    cache, _ = make(4)
    tokens = tokens_of(1, 8)
    preserve(cache, tokens)
    match = cache.match_by_prefix_token(tokens)
    assert cache.free_blocks == 4 and cache.available(match) == 2
    assert cache.alloc_blocks(3, match) is None
    assert cache.idle_blocks == 2


def test_a_stale_match_is_refused() -> None:
    cache, _ = make(2)
    tokens = tokens_of(1, 8)
    preserve(cache, tokens)
    match = cache.match_by_prefix_token(tokens)
    assert cache.alloc_blocks(2) is not None
    with pytest.raises(ValueError, match="stale"):
        cache.alloc_blocks(0, match)


def test_generations_move_whenever_a_block_gets_a_new_owner_and_only_then() -> None:
    cache, store = make(2)
    tokens = tokens_of(1, 4)
    (block,) = preserve(cache, tokens)
    before = store.generation(block)
    again = cache.alloc_blocks(0, cache.match_by_prefix_token(tokens))
    assert again == [block] and store.generation(block) == before
    cache.free(again)
    assert store.generation(block) == before, "kept as prefix: content is what was announced"
    assert cache.alloc_blocks(2) is not None
    assert store.generation(block) > before


def test_double_free_is_refused() -> None:
    cache, _ = make()
    table = cache.alloc_blocks(1)
    assert table is not None
    cache.free(table)
    with pytest.raises(ValueError, match="not referenced"):
        cache.free(table)


def test_a_second_copy_of_a_block_stays_private() -> None:
    cache, _ = make()
    identity = cache.identities(tokens_of(1, 4))[0]
    first, second = cache.alloc_blocks(1), cache.alloc_blocks(1)
    assert first is not None and second is not None
    assert cache.commit(first[0], identity)
    assert not cache.commit(second[0], identity)
    cache.free(first)
    cache.free(second)
    assert cache.idle_blocks == 1 and cache.free_blocks == cache.num_blocks


def test_contexts_are_found_by_id_and_salt_until_their_time_is_over() -> None:
    store = PageStore(8)
    clock = FakeClock()
    cache = RTC(store, max_contexts=2, clock=clock)
    tokens = tokens_of(1, 9)
    preserve(cache, tokens)
    assert cache.remember("doc", tokens, ttl_seconds=10) == 2
    assert len(cache.match_by_id("doc")) == 2
    assert len(cache.match_by_id("doc", salt=b"other")) == 0
    clock.now += 11
    assert len(cache.match_by_id("doc")) == 0
    for name in ("a", "b", "c"):
        cache.remember(name, tokens)
    assert [len(cache.match_by_id(name)) for name in ("a", "b", "c")] == [0, 2, 2]
    assert cache.forget("b") and not cache.forget("b")


def test_evicted_blocks_come_back_from_the_host_tier() -> None:
    cache, store = make(4, host_blocks=8)
    tokens = tokens_of(1, 16)
    preserve(cache, tokens, fill=b"\x07")
    cache.take_changes()
    full = cache.alloc_blocks(4)
    assert full is not None
    assert cache.take_changes() is None, "still reusable, from another tier"
    cache.free(full)
    match = cache.match_by_prefix_token(tokens)
    assert len(match) == 4 and not match.on_device and match.device_prefix() == PrefixMatch()
    table = cache.alloc_blocks(0, match)
    assert table is not None
    done = threading.Event()
    ticket = cache.populate(match, table, done.set)
    assert cache.audit(table).leaked == []
    assert wait(cache, ticket, done) is PopulateState.DONE
    assert bytes(store.view(table[3], 1)) == b"\x07" * store.layout.block_bytes
    assert cache.match_by_prefix_token(tokens).blocks == tuple(table)
    cache.free(table)
    assert cache.free_blocks == 4
    cache.close()


def test_a_population_keeps_its_blocks_when_its_owner_goes() -> None:
    cache, store = make(2, host_blocks=2)
    gate = threading.Event()
    tokens = tokens_of(1, 8)
    preserve(cache, tokens, fill=b"\x07")
    cache.free(cache.alloc_blocks(2) or [])
    match = cache.match_by_prefix_token(tokens)
    table = cache.alloc_blocks(0, match)
    assert table is not None
    write = store.store
    store.store = lambda start, data: (gate.wait(5), write(start, data))[1]  # type: ignore[method-assign]
    done = threading.Event()
    ticket = cache.populate(match, table, done.set)
    while not cache._populations[ticket].future.running():
        pass
    cache.free(table)
    cache.abandon_populate(ticket)
    cache.collect()
    assert cache.alloc_blocks(1) is None, "nothing may get a block that is still written"
    gate.set()
    assert done.wait(5)
    cache.collect()
    assert cache.free_blocks == 2 and cache.populating == 0
    cache.close()


def test_pages_that_cannot_be_brought_back_are_dropped() -> None:
    cache, store = make(2, host_blocks=2)
    tokens = tokens_of(1, 8)
    preserve(cache, tokens, fill=b"\x07")
    cache.take_changes()
    cache.free(cache.alloc_blocks(2) or [])
    match = cache.match_by_prefix_token(tokens)
    table = cache.alloc_blocks(0, match)
    assert table is not None
    store.fail_stores = 1
    done = threading.Event()
    assert wait(cache, cache.populate(match, table, done.set), done) is PopulateState.FAILED
    cache.free(table)
    changes = cache.take_changes()
    assert changes is not None and sorted(changes.removed) == sorted(match.identities)
    assert len(cache.match_by_prefix_token(tokens)) == 0 and cache.free_blocks == 2
    cache.close()


def test_the_host_tier_is_bounded_and_tells_what_it_drops() -> None:
    cache, _ = make(2, host_blocks=1)
    tokens = tokens_of(1, 8)
    preserve(cache, tokens)
    cache.take_changes()
    assert cache.alloc_blocks(2) is not None
    changes = cache.take_changes()
    assert changes is not None and len(changes.removed) == 1
    assert cache.host_bytes == cache.store.layout.block_bytes


def test_copy_saves_blocks_ahead_of_eviction() -> None:
    cache, _ = make(2, host_blocks=2)
    table = preserve(cache, tokens_of(1, 8))
    assert cache.copy(table) == 2
    assert cache.host_bytes == 2 * cache.store.layout.block_bytes
    cache.clear()
    assert cache.host_bytes == 0 and cache.idle_blocks == 0
    assert cache.take_changes() is None, "stored and removed since the last flush cancel"


def test_audit_finds_blocks_nobody_answers_for() -> None:
    cache, _ = make()
    table = cache.alloc_blocks(3)
    assert table is not None
    assert cache.audit(table).leaked == []
    assert cache.audit(table[:2]).leaked == [table[2]]
    assert cache.audit([*table, table[0]]).missing == [table[0]]


def test_a_table_grows_next_to_its_last_block() -> None:
    cache, _ = make()
    table = cache.alloc_blocks(2)
    assert table is not None
    for _ in range(3):
        block = cache.append_block(table)
        assert block == table[-1] + 1
        table.append(block)


def scattered(cache: RTC, count: int) -> list[int]:
    """A table whose every run has one block, in a pool that is otherwise free, with content of its own."""
    whole = cache.alloc_blocks(2 * count)
    assert whole is not None
    cache.free(whole[1::2])
    table = whole[::2]
    for block in table:
        cache.store.store(block, bytes([block]) * cache.store.layout.block_bytes)
    return table


def test_scattered_blocks_are_staged_in_one_run_where_calls_are_dear() -> None:
    cache, store = make(64)
    table = scattered(cache, 6)
    announced, staged = cache.stage(table, call_seconds=1.0)
    assert announced == staged and staged == list(range(staged[0], staged[0] + 6))
    assert [store.load(block, 1) for block in announced] == [store.load(block, 1) for block in table]
    assert cache.audit([*table, *staged]).leaked == []
    cache.free(staged)
    cache.free(table)
    assert cache.free_blocks == 64


def test_nothing_is_staged_where_copies_cost_more_than_calls() -> None:
    cache, _ = make(64)
    table = scattered(cache, 6)
    assert cache.stage(table, call_seconds=0.0) == (table, [])
    assert cache.stage([], call_seconds=1.0) == ([], [])


def test_staging_leaves_most_of_a_short_pool_alone() -> None:
    cache, _ = make(64)
    table = scattered(cache, 6)
    rest = cache.alloc_blocks(cache.free_blocks - 11)
    assert rest is not None
    assert cache.stage(table, call_seconds=1.0) == (table, []), "six of eleven are too many"
    assert cache.audit([*table, *rest]).leaked == []


def test_a_staging_run_that_does_not_fit_in_one_piece_is_given_back() -> None:
    cache, _ = make(128)
    table = cache.alloc_blocks(128)
    assert table is not None
    cache.free(table[1::2])
    assert cache.stage(table[:12:2], call_seconds=1.0) == (table[:12:2], [])
    assert cache.audit(table[::2]).leaked == [] and cache.free_blocks == 64
