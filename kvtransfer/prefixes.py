"""Prefixes out of other executors' caches: whether it is worth it, and the fetch.

The TE-shell makes one `PrefixFetcher` beside its receiver. A fetch is an ordinary pull of a transfer that the
peer opens for it (OpenPrefix): same transports, generations, lease and quarantine. What it must not do is
cost more than it saves, so it has a deadline of its own and peers that failed are left alone for a while.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvtransfer import metrics
from kvtransfer.errors import TransferError, TransferErrorCode
from kvtransfer.receiver import Receiver

HANDSHAKE_SECONDS = 0.1
"""Expected time of a first contact (ours): mapping a peer's pool takes about 0.1 s per GB."""
AVOID_SECONDS = 5.0
"""A peer that was lost, or too slow, is not asked for so long (ours)."""
MAX_AVOIDED = 64

Address = tuple[str, str, str]
"""Where a cache is: (address, te_id, incarnation)."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """`blocks` are in place, from the first on."""

    blocks: int
    bytes: int
    seconds: float
    transport: str


class PrefixFetcher:
    """One receiver's. `expected_seconds` from any thread, `fetch` on the receiver's loop."""

    def __init__(self, receiver: Receiver, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` is the receiver's."""
        self._receiver = receiver
        self._clock = clock
        self._avoided: OrderedDict[Address, float] = OrderedDict()  # until when

    def expected_seconds(self, peer: Address, blocks: int) -> float:
        """What fetching so many blocks takes; infinite for a peer that has just failed, or without a pool."""
        until = self._avoided.get(peer)
        if until is not None and self._clock() < until:
            return math.inf
        try:
            size = blocks * self._receiver.layout.block_bytes
        except TransferError:
            return math.inf
        name = self._receiver.transport_to(*peer)
        rates = self._receiver.rates
        return HANDSHAKE_SECONDS + rates.seconds("grpc", size) if name is None else rates.seconds(name, size)

    def declined(self, peer: Address) -> None:
        """The caller computes instead, because of `expected_seconds`."""
        self._receiver.rates.declined(self._receiver.transport_to(*peer) or "grpc")

    async def fetch(
        self, peer: Address, identities: Sequence[bytes], blocks: Sequence[int], deadline: float
    ) -> Fetched:
        """Brings the peer's cached blocks of `identities`, which follow each other, into `blocks`.

        As many as it has of them, from the first on. Raises TransferError: nothing is in place, and nothing
        writes any more, as after `Receiver.pull`. `deadline` is on the clock.
        """
        started = self._clock()
        address, te_id, incarnation = peer
        outcome = "cancelled"
        try:
            transfer_id, count = await self._receiver.open_prefix(
                address, te_id, incarnation, identities, deadline
            )
            result = await self._receiver.pull(
                address,
                te_id,
                incarnation,
                transfer_id,
                blocks[:count],
                count * self._receiver.layout.block_tokens,
                deadline=deadline,
            )
            outcome = "ok"
        except TransferError as error:
            outcome = error.code.name.lower()
            if error.code in (TransferErrorCode.PEER_LOST, TransferErrorCode.DEADLINE):
                self._avoid(peer)
            raise
        finally:
            metrics.PREFIX_FETCHES.labels(outcome).inc()
        seconds = self._clock() - started
        self._receiver.rates.fetched(result.transport, seconds - result.copy_seconds)
        return Fetched(count, result.bytes, seconds, result.transport)

    def _avoid(self, peer: Address) -> None:
        self._avoided[peer] = self._clock() + AVOID_SECONDS
        self._avoided.move_to_end(peer)
        while len(self._avoided) > MAX_AVOIDED:
            self._avoided.popitem(last=False)
