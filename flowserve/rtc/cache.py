"""RTC, the relational tensor cache: who holds which KV block, and what preserved KV can be reused.

The master side of DeepServe section 4.3, under the paper's API names. The engine's step loop is the
only caller and the only thread (`flowserve.engine`); properties that return one number may be read
from anywhere. Block contents are touched only through the pool (`BlockStore`) and only to move
pages between the device and the tiers behind it: host memory, then the disk.

A block is in exactly one state:

    free        on the allocator's list
    held        referenced by sequences, transfers or a population; maybe indexed too
    idle        indexed, referenced by nobody: reusable, and evicted when blocks run short (which of
                them: `flowserve.rtc.placement`)

Preserved KV is soft state: it may vanish whenever nobody refers to it, and is recomputed then.
"""

from __future__ import annotations

import enum
import functools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from flowserve.rtc import metrics
from flowserve.rtc.disk import FLUSH_SECONDS, DiskTier
from flowserve.rtc.events import CacheChanges, ChangeLog
from flowserve.rtc.index import ContextIndex, PrefixIndex
from flowserve.rtc.pagefile import Page
from flowserve.rtc.placement import RUN_PRICE, Placement
from flowserve.rtc.populate import Population, Populations, Written
from flowserve.rtc.staging import Stager
from flowserve.rtc.tiers import Stored, Tiers
from kvtransfer.blockhash import block_hashes, chain_seed
from kvtransfer.pool import BlockStore

MAX_CONTEXTS = 1024
"""Explicit context ids kept (ours): an entry is 16 bytes per block, so this bounds tens of MB."""

CONTEXT_TTL_SECONDS = 3600.0
"""Life of a context id without another `remember` (ours)."""


class PopulateState(enum.Enum):
    PENDING = "pending"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """Preserved KV of a prefix: for each full block its identity and either a device block or a page.

    Holds no references. Device blocks stay valid until the next allocation; pages of host memory stay
    readable, those on the disk may be gone when they are read.
    """

    identities: tuple[bytes, ...] = ()
    blocks: tuple[int | None, ...] = ()  # None: in a tier behind the device only
    pages: tuple[Stored | None, ...] = ()  # the page where the block is None

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def on_device(self) -> bool:
        """Whether nothing needs to be populated."""
        return None not in self.blocks

    def first(self, count: int) -> PrefixMatch:
        """The match cut to its first `count` blocks."""
        if count >= len(self.blocks):
            return self
        return PrefixMatch(self.identities[:count], self.blocks[:count], self.pages[:count])

    def device_prefix(self) -> PrefixMatch:
        """The match cut before the first block that is not on the device."""
        return self if self.on_device else self.first(self.blocks.index(None))


@dataclass(frozen=True, slots=True)
class AuditReport:
    """`leaked`: held by nobody who answers for them; `missing`: used by someone without a reference."""

    leaked: list[int]
    missing: list[int]


class RTC:
    """Block table, prefix and id index, device and host tier of one pool."""

    def __init__(
        self,
        store: BlockStore,
        *,
        host_bytes: int = 0,
        disk: DiskTier | None = None,
        max_contexts: int = MAX_CONTEXTS,
        run_price: float = RUN_PRICE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`host_bytes` bounds the host tier (0 = there is none); `disk` is closed with the cache. Without
        both, evicted blocks are dropped. `run_price`: see `placement`."""
        self.store = store
        self.block_tokens = store.layout.block_tokens
        self._revision = store.layout.model_revision
        self._placement = Placement(store.num_blocks, self._evicted, run_price=run_price)
        self._refs = [0] * store.num_blocks
        self._index = PrefixIndex()
        self._tiers = Tiers(store.layout.block_bytes, host_bytes, disk)
        self._populations = Populations(store, self._tiers.costs)
        self._stager = Stager(store, self._take, self.free)
        self._contexts = ContextIndex(max_contexts, clock)
        self._changes = ChangeLog()
        self._closed = False

    # -- numbers ---------------------------------------------------------------------------------

    @property
    def num_blocks(self) -> int:
        return self.store.num_blocks

    @property
    def free_blocks(self) -> int:
        """Blocks an allocation can get: free now, or idle."""
        return self._placement.available

    @property
    def idle_blocks(self) -> int:
        """Reusable and referenced by nobody."""
        return self._placement.idle

    @property
    def held_blocks(self) -> int:
        return self.num_blocks - self.free_blocks

    @property
    def host_bytes(self) -> int:
        return self._tiers.host.used_bytes

    @property
    def populating(self) -> int:
        """Populations under way."""
        return len(self._populations)

    def available(self, match: PrefixMatch) -> int:
        """Blocks an allocation could add to `match` (whose idle blocks are then no longer evictable)."""
        return self.free_blocks - sum(
            1 for block in match.blocks if block is not None and self._placement.is_idle(block)
        )

    # -- match -----------------------------------------------------------------------------------

    def identities(
        self, tokens: Sequence[int], *, adapter_id: str = "", salt: bytes = b"", parent: bytes | None = None
    ) -> list[bytes]:
        """Identities of the full blocks of `tokens`; `parent` continues the chain of the block before."""
        if parent is None:
            parent = chain_seed(self._revision, adapter_id, salt)
        return block_hashes(tokens, parent, self.block_tokens)

    def match_by_prefix_token(
        self, tokens: Sequence[int], *, adapter_id: str = "", salt: bytes = b""
    ) -> PrefixMatch:
        """The longest preserved prefix of `tokens`, in full blocks. Changes nothing but recency."""
        return self.match_identities(self.identities(tokens, adapter_id=adapter_id, salt=salt))

    def match_by_id(self, context_id: str, *, salt: bytes = b"") -> PrefixMatch:
        """What is still preserved of the context that `remember` stored under this id and salt."""
        return self.match_identities(self._contexts.get(salt, context_id))

    def match_identities(self, identities: Sequence[bytes]) -> PrefixMatch:
        """As `match_by_prefix_token`, for a caller that keeps the chain of its sequence."""
        blocks: list[int | None] = []
        pages: list[Stored | None] = []
        for identity in identities:
            block = self._index.block(identity)
            page = self._tiers.page(identity) if block is None else None
            if block is None and page is None:
                break
            blocks.append(block)
            pages.append(page)
        return PrefixMatch(tuple(identities[: len(blocks)]), tuple(blocks), tuple(pages))

    def remember(
        self,
        context_id: str,
        tokens: Sequence[int],
        *,
        adapter_id: str = "",
        salt: bytes = b"",
        ttl_seconds: float = CONTEXT_TTL_SECONDS,
    ) -> int:
        """Gives the full blocks of `tokens` an id (context caching). Returns their number; pins nothing."""
        identities = self.identities(tokens, adapter_id=adapter_id, salt=salt)[: self.num_blocks]
        self._contexts.put(salt, context_id, identities, ttl_seconds)
        return len(identities)

    def forget(self, context_id: str, *, salt: bytes = b"") -> bool:
        return self._contexts.remove(salt, context_id)

    # -- blocks ----------------------------------------------------------------------------------

    def alloc_blocks(self, count: int, match: PrefixMatch | None = None) -> list[int] | None:
        """A block table: the blocks of `match`, then `count` new ones, one reference on each.

        Where `match` has a page instead of a block, the table gets a new block for `populate`.
        Returns None, and changes nothing, where blocks do not suffice. Raises ValueError for a match
        that an earlier allocation made stale.
        """
        match = match or PrefixMatch()
        for identity, block in zip(match.identities, match.blocks, strict=True):
            if block is not None and self._index.block(identity) != block:
                raise ValueError(f"match is stale: block {block} was reused")
        count += sum(1 for block in match.blocks if block is None)
        if count > self.available(match):
            return None
        for block in match.blocks:
            if block is not None:
                self._refer(block)
        fresh = iter(self._take(count))
        return [next(fresh) if block is None else block for block in match.blocks] + list(fresh)

    def append_block(self, table: Sequence[int]) -> int | None:
        """A block to grow `table` by (next to its last one if that is free); None if there is none."""
        if self.free_blocks < 1:
            return None
        block = self._placement.take_after(table[-1] if table else -1)
        self._refs[block] = 1
        self.store.bump(block)
        return block

    def free(self, blocks: Sequence[int]) -> None:
        """Drops one reference on each block of a table (in the table's order).

        Indexed blocks become idle, the others free. Raises ValueError for a block nobody refers to.
        """
        for block in blocks:
            if self._refs[block] < 1:
                raise ValueError(f"block {block} is freed but not referenced")
        idle: list[int] = []
        free: list[int] = []
        for block in blocks:
            self._refs[block] -= 1
            if self._refs[block] == 0:
                if self._index.identity(block) is not None:
                    idle.append(block)
                else:
                    self.store.bump(block)
                    free.append(block)
        self._placement.rest(idle)
        self._placement.release(free)

    def stage(self, blocks: Sequence[int], call_seconds: float) -> tuple[list[int], list[int]]:
        """Compacts what a peer will read: (the blocks it should read, those of them that are copies).

        A transfer costs `call_seconds` for each run. Where that is more than a copy within the pool costs
        (as measured so far), scattered runs are copied into one. Blocks must hold final KV. The caller
        owns one reference on each copy, and keeps its own on `blocks`. Blocks the calling thread for the
        copy, which by the cost model is less than it saves.
        """
        return self._stager.stage(blocks, call_seconds, self.free_blocks)

    def commit(self, block: int, identity: bytes) -> bool:
        """`block` is full and computed: from now on it can be matched by `identity`.

        False where another block has this identity already (the caller's stays private) or where
        the block has one. The caller refers to the block.
        """
        if self._refs[block] < 1:
            raise ValueError(f"block {block} is committed but not referenced")
        if identity in self._index or self._index.identity(block) is not None:
            return False
        if identity not in self._tiers:
            self._changes.stored(identity)
        self._index.add(identity, block)
        return True

    # -- tiers -----------------------------------------------------------------------------------

    def copy(self, blocks: Iterable[int]) -> int:
        """Copies indexed blocks to the host tier ahead of eviction. Returns how many it holds now."""
        held = 0
        for block in blocks:
            identity = self._index.identity(block)
            if identity is not None and self._tiers.host.takes(self.store.layout.block_bytes):
                self._keep(identity, block)
                held += 1
        return held

    def populate(self, match: PrefixMatch, table: Sequence[int], notify: Callable[[], None]) -> int:
        """Starts to write the pages of `match` into the blocks `alloc_blocks` put in their place.

        Returns a ticket for `query_populate`. `notify` is called on the copying thread at the end. The
        caller may free its table at any time: the population holds references of its own.
        """
        missing = [
            (identity, table[index], page)
            for index, (identity, page) in enumerate(zip(match.identities, match.pages, strict=True))
            if page is not None
        ]
        blocks = [block for _, block, _ in missing]
        for block in blocks:
            self._refer(block)
        return self._populations.copy(
            [identity for identity, _, _ in missing], blocks, [page for _, _, page in missing], notify
        )

    def populate_from_peer(
        self,
        identities: Sequence[bytes],
        blocks: Sequence[int],
        start: Callable[[Callable[[int], None]], Callable[[], None]],
        notify: Callable[[], None],
    ) -> int:
        """As `populate`, where somebody else writes: `start` begins it and returns what stops it.

        What it is given is to be called once, from any thread, when nothing writes the blocks any more: with
        the number of blocks that are in place, from the first on. What `start` raises is passed on, and
        nothing is held then. `query_populate` commits what came.
        """
        future: Future[Written] = Future()

        def done(count: int) -> None:
            future.set_result(Written(count))
            metrics.POPULATED.labels("peer").inc(count)
            notify()

        stop = start(done)
        for block in blocks:
            self._refer(block)
        return self._populations.add(Population(list(blocks), list(identities), future, stop))

    def populate_seconds(self, match: PrefixMatch) -> float:
        """What populating the match is expected to take, from what it took before."""
        return self._tiers.seconds(match.pages)

    def decline_populate(self, match: PrefixMatch) -> None:
        """The match is computed instead, because `populate_seconds` was too much."""
        self._tiers.declined(match.pages)

    def query_populate(self, ticket: int) -> PopulateState:
        """DONE and FAILED are told once; then the ticket is forgotten. After FAILED the pages before the
        one that could not be had are in place, and matched from now on."""
        population = self._populations.pop(ticket)
        if population is None:
            return PopulateState.PENDING
        blocks, identities = population.blocks, population.identities
        written = population.outcome()
        for block, identity in zip(blocks[: written.count], identities, strict=False):
            self.commit(block, identity)
        failed = written.count < len(blocks)
        if failed and population.local and not population.abandoned:
            # A page that is lost is gone; where the pool refuses pages, none of them is worth anything.
            last = written.count + 1 if written.lost else len(identities)
            for identity in identities[written.count : last]:
                if self._tiers.forget(identity) and not self._matchable(identity):
                    self._changes.removed(identity)
        self.free(blocks)
        return PopulateState.FAILED if failed else PopulateState.DONE

    def abandon_populate(self, ticket: int) -> None:
        """Nobody will ask for this ticket again; `collect` ends it."""
        self._populations.abandon(ticket)

    def collect(self) -> None:
        """Ends abandoned populations, takes in what the disk's writer did. Call once per step."""
        for ticket in self._populations.abandoned():
            self.query_populate(ticket)
        came, went = self._tiers.collect()
        for identity in came:
            if identity not in self._index:
                self._changes.stored(identity)
        for identity in went:
            if identity not in self._index:
                self._changes.removed(identity)

    def clear(self) -> None:
        """Forgets all preserved KV that nobody refers to, on the device and in host memory."""
        for block in self._placement.idle_blocks():
            self._drop_index(block, keep=False)
            self.store.bump(block)
            self._placement.forget(block)
        for identity in self._tiers.clear_host():
            if identity not in self._index:
                self._changes.removed(identity)

    def close(self) -> None:
        """Ends the copying thread, and writes what is preserved to the disk tier for its next user.

        Blocks until a running copy is done, and at most FLUSH_SECONDS for the disk. No step follows.
        """
        if not self._closed:
            self._closed = True
            self._populations.close()
            self._tiers.close(self._indexed(), FLUSH_SECONDS)

    # -- events and audit ------------------------------------------------------------------------

    def take_changes(self) -> CacheChanges | None:
        """The changes since the last call, numbered without a gap."""
        return self._changes.flush()

    def snapshot(self) -> tuple[int, list[bytes]]:
        """(number of the next change, every identity that can be matched in any tier).

        Changes not yet taken are in the list already; applying them again changes nothing.
        """
        stored = list(self._index) + [identity for identity in self._tiers if identity not in self._index]
        return self._changes.next_sequence, stored

    def audit(self, expected_refs: Iterable[int]) -> AuditReport:
        """Compares references with `expected_refs`: every block as often as someone answers for it."""
        expected = Counter(expected_refs)
        expected.update(self._populations.held_blocks())
        leaked = [block for block, refs in enumerate(self._refs) if refs > expected[block]]
        missing = [block for block, refs in enumerate(self._refs) if refs < expected[block]]
        held = sum(1 for refs in self._refs if refs > 0)
        if held + self.free_blocks != self.num_blocks:  # a block in no state at all
            lost = [
                block
                for block, refs in enumerate(self._refs)
                if refs == 0 and not self._placement.is_free(block) and not self._placement.is_idle(block)
            ]
            leaked.extend(lost)
        return AuditReport(leaked, missing)

    # -- inside ----------------------------------------------------------------------------------

    def _matchable(self, identity: bytes) -> bool:
        return identity in self._index or identity in self._tiers

    def _indexed(self) -> Iterator[tuple[bytes, Callable[[], Page]]]:
        for identity in self._index:
            block = self._index.block(identity)
            if block is not None:
                yield identity, functools.partial(self.store.load, block, 1)

    def _refer(self, block: int) -> None:
        if self._refs[block] == 0:
            self._placement.revive(block)
        self._refs[block] += 1

    def _take(self, count: int) -> list[int]:
        blocks = self._placement.take(count)
        for block in blocks:
            self._refs[block] = 1
            self.store.bump(block)
        return blocks

    def _evicted(self, blocks: list[int]) -> None:
        for block in blocks:
            self._drop_index(block, keep=True)

    def _drop_index(self, block: int, keep: bool) -> None:
        """An idle block loses its identity; with `keep` its page goes to the next tier, if there is one."""
        identity = self._index.remove(block)
        if keep:
            self._keep(identity, block)
        if not self._matchable(identity):
            self._changes.removed(identity)

    def _keep(self, identity: bytes, block: int) -> None:
        """A block's page goes to the tiers; others may have to give way there."""
        for dropped in self._tiers.keep(identity, functools.partial(self.store.load, block, 1)):
            if dropped not in self._index:
                self._changes.removed(dropped)
