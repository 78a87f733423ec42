"""Prefixes between executors' caches: what this one lends, and what it fetches rather than computes.

A global KV cache over the TE group (DeepServe section 4.3, Populate). The gateway names an executor that
holds more of a prompt than this one; the engine fetches it where the transfer, at the rates measured so far,
takes less time than its own model of computing it. A source that is gone, or evicted what was asked for,
costs a bounded wait: the task goes on from what it has. Engine's thread, or under its state lock.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from flowserve.engine.budget import CostModel
from flowserve.engine.config import EngineConfig
from flowserve.engine.sequence import Sequence, State
from flowserve.engine.types import PrefixExchange
from flowserve.rtc import RTC, metrics

log = logging.getLogger(__name__)

LEND_SHARE = 0.25
"""Part of the pool that may be lent at once (ours): lent blocks cannot be evicted while they are read."""
MAX_LENDS = 64
FIRST_RATE = 2000.0
"""Prompt tokens per second until a step was measured (ours; as the gateways assume)."""
PATIENCE = 2.0
"""A fetch may take so many times what computing would, then it is given up (ours)."""
LEAST_PATIENCE_SECONDS = 1.0


class NotCached(Exception):
    """Nothing of the prefix is here."""


class LendingBusy(Exception):
    """A bound of lending is reached."""


@dataclass(slots=True)
class _Fetch:
    """Blocks `first` to `first + asked` of a sequence are on their way; `came` is set at the end."""

    first: int
    asked: int
    came: int = 0


class Prefixes:
    """Lends and fetches of one engine."""

    def __init__(
        self,
        cache: RTC,
        costs: CostModel,
        config: EngineConfig,
        exchange: PrefixExchange | None,
        wake: Callable[[], None],
    ) -> None:
        self._cache = cache
        self._costs = costs
        self._config = config
        self._exchange = exchange
        self._wake = wake
        self._lent: dict[str, list[int]] = {}
        self._fetches: dict[int, _Fetch] = {}  # by ticket

    @property
    def lends(self) -> int:
        return len(self._lent)

    def held_blocks(self) -> Iterator[int]:
        for blocks in self._lent.values():
            yield from blocks

    # -- out -------------------------------------------------------------------------------------

    def lend(self, identities: Seq[bytes]) -> tuple[str, int]:
        """Opens a transfer of the first of `identities` that are on the device, as many as may be lent:
        (its id, how many).

        Raises NotCached, LendingBusy, or what the exchange raises; nothing is held then.
        """
        match = self._cache.match_identities(identities).device_prefix()
        if self._exchange is None or not len(match):
            raise NotCached("no block of the prefix is cached here")
        lent = sum(map(len, self._lent.values()))
        room = int(LEND_SHARE * self._cache.num_blocks) - lent
        if len(self._lent) >= MAX_LENDS or room < 1:
            raise LendingBusy(f"{lent} blocks are lent already")
        blocks = self._cache.alloc_blocks(0, match.first(room))
        assert blocks is not None, "nothing is allocated for a match on the device"
        transfer_id = f"prefix.{secrets.token_hex(8)}"
        self._lent[transfer_id] = blocks
        try:
            self._exchange.lend(transfer_id, blocks, len(blocks) * self._cache.block_tokens)
        except BaseException:
            self._cache.free(self._lent.pop(transfer_id))
            raise
        return transfer_id, len(blocks)

    def release(self, transfer_id: str) -> bool:
        """The transfer's terminal event. False if it is no lend."""
        blocks = self._lent.pop(transfer_id, None)
        if blocks is None:
            return False
        self._cache.free(blocks)
        return True

    def withdraw_all(self, reason: str) -> None:
        for transfer_id in list(self._lent):
            if self._exchange is not None:
                self._exchange.withdraw(transfer_id, reason)

    # -- in --------------------------------------------------------------------------------------

    def fetch(self, sequence: Sequence) -> bool:
        """Starts to fetch what follows the KV that the sequence has, if that is worth it; once a task."""
        source = sequence.task.prefix_source
        exchange = self._exchange
        if source is None or exchange is None or sequence.fetched or sequence.pulls:
            return False
        sequence.fetched = True
        if not self._config.enable_prefix_cache or sequence.logprobs_pending():
            return False
        step = self._cache.block_tokens
        first = sequence.computed // step
        stop = min(source.tokens, len(sequence.tokens) - 1) // step  # the last token is computed in any case
        if stop <= first or sequence.computed % step:
            return False
        computing = self._costs.prefill_seconds(
            first * step, (stop - first) * step, self._config.chunk_seconds
        )
        if computing is None:
            computing = (stop - first) * step / FIRST_RATE
        if exchange.fetch_seconds(source, stop - first) >= computing:
            exchange.fetch_declined(source)
            metrics.DECLINED.labels("peer").inc()
            return False
        fetch = _Fetch(first, stop - first)
        identities, blocks = sequence.identities[first:stop], sequence.blocks[first:stop]
        seconds = max(LEAST_PATIENCE_SECONDS, PATIENCE * computing)

        def start(done: Callable[[int], None]) -> Callable[[], None]:
            def ended(count: int) -> None:
                fetch.came = count
                done(count)

            return exchange.start_fetch(source, identities, blocks, seconds, ended)

        try:
            sequence.ticket = self._cache.populate_from_peer(identities, blocks, start, self._wake)
        except Exception:  # a task boundary: one fetch fails, its task computes instead
            log.exception("fetching a prefix for %s failed", sequence.key)
            return False
        self._fetches[sequence.ticket] = fetch
        sequence.state = State.POPULATING
        return True

    def fetches(self, ticket: int) -> bool:
        return ticket in self._fetches

    def forget(self, ticket: int) -> None:
        """Nobody asks for this ticket again."""
        self._fetches.pop(ticket, None)

    def take_in(self, sequence: Sequence, ticket: int) -> int:
        """The fetch has ended, its blocks are committed: the sequence goes on after them. How many."""
        fetch = self._fetches.pop(ticket)
        reached = fetch.first + fetch.came
        sequence.computed = reached * self._cache.block_tokens
        sequence.committed = reached
        if not sequence.reported:
            sequence.cached_tokens = min(sequence.computed, len(sequence.prompt))
        if fetch.came < fetch.asked:
            log.info("%d of %d blocks came for %s", fetch.came, fetch.asked, sequence.key)
        return fetch.came
