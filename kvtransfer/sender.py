"""The sender's registry of transfers: what is on offer, to whom, and until when.

    OFFERED --complete--> COMPLETE --> ACKED | ABORTED | EXPIRED
       \\--------------------\\-------> ABORTED (once complete) | WITHDRAWN

The engine's thread offers, announces, completes and withdraws; the gRPC service (an asyncio loop)
claims, watches, reads, renews and finishes. All methods are thread-safe. Each offered transfer ends
exactly once, and `on_released` is called exactly once with how, so blocks can neither leak nor be
freed twice (the leaks of vLLM's and SGLang's connectors are the tests of this file).

A transfer has one receiver at a time: the first that accesses it, until one of a later attempt watches
it (the earlier executor died, or was given up). A receiver that gives up while the prefill still
computes leaves the transfer unclaimed for the next: its failure is not the prefill's.

The lease protects the sender against receivers that vanish: it starts when the transfer is
complete (before that the prefill itself keeps it alive) and is extended by Renew and by each piece
that a Read has sent. Time is passed in as `clock`.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from kvtransfer import metrics
from kvtransfer.errors import TransferError, TransferErrorCode
from kvtransfer.images import IMAGE_PREFIX, Images
from kvtransfer.pool import BlockStore
from kvtransfer.runs import Run, blocks_of, runs_of

logger = logging.getLogger(__name__)

DEFAULT_LEASE_SECONDS = 30.0
"""As vLLM's NIXL connector: long against a pull (below 1 s), short against a pool's turnover."""
DEFAULT_MAX_TRANSFERS = 1024
"""Four times the engine's default bound of tasks: each may have an older attempt whose lease still runs."""
ENDED_REMEMBERED = 4
"""Ended transfers that are remembered, as a multiple of `max_transfers`, to answer late calls rightly."""

Wake = Callable[[], None]


class TransferState(enum.Enum):
    OFFERED = "offered"
    COMPLETE = "complete"
    ACKED = "acked"
    ABORTED = "aborted"
    EXPIRED = "expired"
    WITHDRAWN = "withdrawn"


@dataclass(frozen=True, slots=True)
class Chunk:
    """Blocks from index `first_block` of a transfer on that hold final KV; `tokens` are readable in all."""

    first_block: int
    runs: tuple[Run, ...]
    generations: tuple[int, ...]  # one per block, in order
    tokens: int


@dataclass(frozen=True, slots=True)
class Progress:
    """What a watcher has not seen yet, and how many announcements it will have seen then. `tokens` set =
    complete, with `payload` for the receiver's engine; `failure` set = ended without it."""

    chunks: tuple[Chunk, ...] = ()
    seen: int = 0
    tokens: int | None = None
    blocks: int = 0
    payload: bytes = b""
    failure: TransferError | None = None


@dataclass(slots=True)
class _Transfer:
    state: TransferState = TransferState.OFFERED
    receiver: str = ""
    attempt: int = 0  # of the receiver
    chunks: list[Chunk] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    generations: dict[int, int] = field(default_factory=dict)  # of the announced blocks
    tokens: int = 0
    payload: bytes = b""
    expires: float | None = None  # on the sender's clock; None until complete


class Sender:
    """Transfers out of one pool. `on_released(transfer_id, outcome)` is called without a lock held, on
    the thread that ended the transfer; outcome is "acked", "aborted", "expired" or "withdrawn"."""

    def __init__(
        self,
        store: BlockStore | None,
        te_id: str,
        incarnation: str,
        *,
        lease_seconds: float = DEFAULT_LEASE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
        on_released: Callable[[str, str], None],
        max_transfers: int = DEFAULT_MAX_TRANSFERS,
    ) -> None:
        self.te_id = te_id
        self.incarnation = incarnation
        self.lease_seconds = lease_seconds
        self._clock = clock
        self._on_released = on_released
        self._max_transfers = max_transfers
        self._lock = threading.Lock()
        self._transfers: dict[str, _Transfer] = {}
        self._ended: OrderedDict[str, tuple[TransferState, str]] = OrderedDict()
        self._wakes: dict[str, set[Wake]] = {}
        self._idle_wakes: set[Wake] = set()
        self.images: Images | None = None  # of weights, which are read as transfers are
        self._store: BlockStore | None = None
        self._pool_id = ""
        if store is not None:
            self.attach_store(store)

    # -- the pool -----------------------------------------------------------------------------

    def attach_store(self, store: BlockStore) -> None:
        """A model was loaded: transfers can be offered out of `store`."""
        with self._lock:
            if self._store is not None:
                raise ValueError("a store is attached already")
            self._store = store
            self._pool_id = secrets.token_hex(8)

    def detach_store(self, reason: str = "the model was unloaded") -> None:
        """Withdraws every transfer and forgets the store. Idempotent."""
        with self._lock:
            self._store = None
            self._pool_id = ""
            left = list(self._transfers)
        for transfer_id in left:
            self.withdraw(transfer_id, reason)

    @property
    def store(self) -> BlockStore | None:
        return self._store

    @property
    def pool_id(self) -> str:
        """Names the attached store: another one after each attach, "" without."""
        return self._pool_id

    # -- the engine's thread ------------------------------------------------------------------

    def offer(self, transfer_id: str) -> float:
        """Opens a transfer. Returns the lease in seconds.

        Raises TransferError(BUSY) at the bound of transfers, TransferError(INTERNAL) without a store,
        ValueError for an id that was offered before. Nothing is held after an error.
        """
        with self._lock:
            if self._store is None:
                raise TransferError(TransferErrorCode.INTERNAL, "no model is loaded: nothing to offer")
            if transfer_id in self._transfers or transfer_id in self._ended:
                raise ValueError(f"transfer {transfer_id} was offered before")
            if len(self._transfers) >= self._max_transfers:
                metrics.REFUSED.labels("offer").inc()
                raise TransferError(
                    TransferErrorCode.BUSY, f"{self._max_transfers} transfers are on offer already"
                )
            self._transfers[transfer_id] = _Transfer()
            wakes = self._wakes_of(transfer_id)
        metrics.ACTIVE_LEASES.inc()
        _call(wakes)
        return self.lease_seconds

    def announce(self, transfer_id: str, first_block: int, blocks: Sequence[int], tokens: int) -> None:
        """The blocks from index `first_block` of the transfer on are `blocks` and hold KV; `tokens` are
        readable from the transfer's start. A block announced again (it was partly filled) is read again.

        Does nothing for a transfer that has ended. Raises ValueError for a gap, for a call after
        `complete`, or for more tokens than blocks hold.
        """
        with self._lock:
            transfer, store = self._transfers.get(transfer_id), self._store
            if transfer is None or store is None:
                return
            if transfer.state is not TransferState.OFFERED:
                raise ValueError(f"transfer {transfer_id} is complete: nothing can be announced")
            if first_block > len(transfer.blocks):
                raise ValueError(f"announced from block {first_block}, {len(transfer.blocks)} are known")
            for block in transfer.blocks[first_block : first_block + len(blocks)]:
                transfer.generations.pop(block, None)
            transfer.blocks[first_block : first_block + len(blocks)] = blocks
            if store.layout.blocks_for(tokens) > len(transfer.blocks):
                raise ValueError(f"{tokens} tokens are more than {len(transfer.blocks)} blocks hold")
            generations = tuple(store.generation(block) for block in blocks)
            transfer.generations.update(zip(blocks, generations, strict=True))
            transfer.tokens = tokens
            transfer.chunks.append(Chunk(first_block, tuple(runs_of(blocks)), generations, tokens))
            wakes = self._wakes_of(transfer_id)
        _call(wakes)

    def complete(self, transfer_id: str, tokens: int, payload: bytes = b"") -> None:
        """All is announced, `tokens` in all; the lease starts. `payload` goes to the receiver with it.

        Does nothing for a transfer that has ended.
        """
        with self._lock:
            transfer, store = self._transfers.get(transfer_id), self._store
            if transfer is None or store is None:
                return
            if transfer.state is not TransferState.OFFERED:
                raise ValueError(f"transfer {transfer_id} is complete already")
            if store.layout.blocks_for(tokens) > len(transfer.blocks):
                raise ValueError(
                    f"complete with {tokens} tokens, {len(transfer.blocks)} blocks are announced"
                )
            transfer.state = TransferState.COMPLETE
            transfer.tokens = tokens
            transfer.payload = payload
            transfer.expires = self._clock() + self.lease_seconds
            wakes = self._wakes_of(transfer_id)
        _call(wakes)

    def withdraw(self, transfer_id: str, reason: str) -> None:
        """Ends the transfer if it has not ended; its receiver gets ABORTED with `reason`."""
        self._end(transfer_id, TransferState.WITHDRAWN, reason)

    # -- the service --------------------------------------------------------------------------

    @property
    def active(self) -> int:
        """Transfers that have not ended."""
        return len(self._transfers)

    def known(self, transfer_id: str) -> bool:
        """Whether the transfer is or was on offer (ended ones are remembered for a bounded while)."""
        with self._lock:
            return transfer_id in self._transfers or transfer_id in self._ended

    def claim(self, transfer_id: str, receiver: str, attempt: int = 0) -> None:
        """Makes `receiver` the transfer's only one; repeatable. One of a later `attempt` takes it over.

        Raises TransferError otherwise.
        """
        try:
            self._access(transfer_id, receiver)
        except TransferError as error:
            if error.code is not TransferErrorCode.BUSY or not self._take_over(
                transfer_id, receiver, attempt
            ):
                raise
            return
        with self._lock:
            transfer = self._transfers.get(transfer_id)
            if transfer is not None:
                transfer.attempt = max(transfer.attempt, attempt)

    def progress(self, transfer_id: str, receiver: str, seen: int, attempt: int = 0) -> Progress:
        """What follows the first `seen` announcements, joined where one follows the other, for the
        transfer's receiver (see `claim`). Never raises TransferError."""
        try:
            self.claim(transfer_id, receiver, attempt)
            with self._lock:
                transfer = self._transfers.get(transfer_id)
                if transfer is None:
                    raise self._failure(transfer_id)
                complete = transfer.state is TransferState.COMPLETE
                return Progress(
                    tuple(_joined(transfer.chunks[seen:])),
                    len(transfer.chunks),
                    transfer.tokens if complete else None,
                    len(transfer.blocks),
                    transfer.payload if complete else b"",
                )
        except TransferError as error:
            return Progress(failure=error)

    def subscribe(self, transfer_id: str, wake: Wake) -> None:
        """`wake` is called, on any thread, whenever the transfer changes; it may not exist yet."""
        with self._lock:
            self._wakes.setdefault(transfer_id, set()).add(wake)

    def unsubscribe(self, transfer_id: str, wake: Wake) -> None:
        with self._lock:
            wakes = self._wakes.get(transfer_id, set())
            wakes.discard(wake)
            if not wakes:
                self._wakes.pop(transfer_id, None)

    def check_read(
        self, transfer_id: str, receiver: str, runs: Sequence[Run], generations: Sequence[int]
    ) -> BlockStore:
        """The store to read `runs` from. Only announced blocks may be read, in the announced generation;
        of an image of weights, only what was granted.

        Raises TransferError otherwise.
        """
        if self.images is not None and transfer_id.startswith(IMAGE_PREFIX):
            return self.images.check_read(transfer_id, receiver, runs, generations)
        transfer = self._access(transfer_id, receiver)
        sized = sum(run.count for run in runs) == len(generations)  # before runs are spelled out
        blocks = blocks_of(runs) if sized else []
        with self._lock:
            announced = [transfer.generations.get(block) for block in blocks]
            store = self._store
        if store is None or not sized or None in announced:
            raise TransferError(
                TransferErrorCode.ABORTED,
                f"transfer {transfer_id}: blocks were asked for that it does not have",
            )
        if announced != list(generations):
            raise TransferError(
                TransferErrorCode.GENERATION_MOVED, f"transfer {transfer_id}: blocks were announced anew"
            )
        return store

    def renew(self, transfer_id: str, receiver: str) -> float:
        """Extends the lease; returns its length in seconds. Raises TransferError for an ended transfer."""
        if transfer_id.startswith(IMAGE_PREFIX):
            return self.lease_seconds  # a feed's stream is its lease
        transfer = self._access(transfer_id, receiver)
        with self._lock:
            if transfer.state is TransferState.COMPLETE:
                transfer.expires = self._clock() + self.lease_seconds
        return self.lease_seconds

    def finish(self, transfer_id: str, receiver: str, ok: bool, reason: str = "") -> bool:
        """The receiver's terminal event. False: the transfer had ended before, or never was.

        A receiver that fails while the prefill computes gives up its claim; the transfer goes on. Raises
        TransferError(BUSY) if it is another receiver's, TransferError(ABORTED) for `ok` on a transfer
        that is not complete: its receiver cannot have it all.
        """
        try:
            transfer = self._access(transfer_id, receiver)
        except TransferError as error:
            if error.code is TransferErrorCode.BUSY:
                raise
            return False
        if ok and transfer.state is TransferState.OFFERED:
            raise TransferError(
                TransferErrorCode.ABORTED,
                f"transfer {transfer_id} is not complete: it cannot be acknowledged",
            )
        if not ok and self._unclaim(transfer_id, receiver):
            logger.info(
                "transfer %s given up by %s before it was complete: %s", transfer_id, receiver, reason
            )
            return True
        state = TransferState.ACKED if ok else TransferState.ABORTED
        return self._end(transfer_id, state, reason or ("" if ok else "aborted by the receiver"))

    def reap(self) -> int:
        """Ends the transfers whose lease ran out. Returns how many."""
        now = self._clock()
        with self._lock:
            due = [
                key
                for key, value in self._transfers.items()
                if value.expires is not None and now >= value.expires
            ]
        return sum(self._expire(transfer_id) for transfer_id in due)

    async def drain(self, deadline: float | None) -> int:
        """Waits until no transfer is left, or until `deadline` on the clock. Returns how many are left."""
        idle = asyncio.Event()
        loop = asyncio.get_running_loop()

        def wake() -> None:
            loop.call_soon_threadsafe(idle.set)

        with self._lock:
            self._idle_wakes.add(wake)
            if not self._transfers:
                idle.set()
        try:
            async with asyncio.timeout(None if deadline is None else max(0.0, deadline - self._clock())):
                await idle.wait()
        except TimeoutError:
            logger.warning("drain: %d transfers are left at the deadline", self.active)
        finally:
            with self._lock:
                self._idle_wakes.discard(wake)
        return self.active

    # -- inside -------------------------------------------------------------------------------

    def _access(self, transfer_id: str, receiver: str) -> _Transfer:
        """The living transfer, claimed for `receiver`. Raises TransferError."""
        if not receiver:
            raise TransferError(TransferErrorCode.ABORTED, "the receiver does not name itself")
        with self._lock:
            transfer = self._transfers.get(transfer_id)
            expired = (
                transfer is not None and transfer.expires is not None and self._clock() >= transfer.expires
            )
        if expired:
            self._expire(transfer_id)
        with self._lock:
            transfer = self._transfers.get(transfer_id)
            if transfer is None:
                raise self._failure(transfer_id)
            if transfer.receiver not in ("", receiver):
                raise TransferError(
                    TransferErrorCode.BUSY, f"transfer {transfer_id} belongs to receiver {transfer.receiver}"
                )
            transfer.receiver = receiver
            return transfer

    def _take_over(self, transfer_id: str, receiver: str, attempt: int) -> bool:
        """Whether `receiver` has the transfer now, as the one of the latest attempt."""
        with self._lock:
            transfer = self._transfers.get(transfer_id)
            if transfer is None or attempt <= transfer.attempt:
                return False
            logger.info("transfer %s goes from %s to %s", transfer_id, transfer.receiver, receiver)
            transfer.receiver, transfer.attempt = receiver, attempt
            wakes = self._wakes_of(transfer_id)  # the earlier watch ends
        metrics.TAKEOVERS.inc()
        _call(wakes)
        return True

    def _unclaim(self, transfer_id: str, receiver: str) -> bool:
        """Whether the transfer is without a receiver now, because its prefill goes on."""
        with self._lock:
            transfer = self._transfers.get(transfer_id)
            if transfer is None or transfer.state is not TransferState.OFFERED:
                return False
            if transfer.receiver == receiver:
                transfer.receiver = ""
            return True

    def _failure(self, transfer_id: str) -> TransferError:
        """Why a transfer cannot be used; under the lock."""
        state, reason = self._ended.get(transfer_id, (None, ""))
        match state:
            case TransferState.EXPIRED:
                return TransferError(TransferErrorCode.LEASE_EXPIRED, f"transfer {transfer_id}: {reason}")
            case TransferState.ABORTED | TransferState.WITHDRAWN:
                return TransferError(TransferErrorCode.ABORTED, f"transfer {transfer_id}: {reason}")
            case TransferState.ACKED:
                return TransferError(
                    TransferErrorCode.UNKNOWN_TRANSFER, f"transfer {transfer_id} was acknowledged before"
                )
            case _:
                return TransferError(
                    TransferErrorCode.UNKNOWN_TRANSFER, f"transfer {transfer_id} is not on offer"
                )

    def _expire(self, transfer_id: str) -> bool:
        """Ends the transfer if its lease is still found to have run out."""
        reason = f"the lease of {self.lease_seconds:g} s ran out"
        return self._end(transfer_id, TransferState.EXPIRED, reason)

    def _end(self, transfer_id: str, state: TransferState, reason: str) -> bool:
        """The only way out of the registry. True for the one call that ended the transfer."""
        with self._lock:
            transfer = self._transfers.get(transfer_id)
            if transfer is None:
                return False
            if state is TransferState.EXPIRED and (
                transfer.expires is None or self._clock() < transfer.expires
            ):
                return False  # renewed between the look and the end
            del self._transfers[transfer_id]
            transfer.state = state
            self._ended[transfer_id] = (state, reason)
            while len(self._ended) > ENDED_REMEMBERED * self._max_transfers:
                self._ended.popitem(last=False)
            wakes = self._wakes_of(transfer_id)
            if not self._transfers:
                wakes += tuple(self._idle_wakes)
        metrics.ACTIVE_LEASES.dec()
        metrics.RELEASED.labels(state.value).inc()
        if state is not TransferState.ACKED:
            logger.info("transfer %s %s: %s", transfer_id, state.value, reason)
        try:
            self._on_released(transfer_id, state.value)
        except Exception:
            # The callback is the shell's; its failure must not take down the reaper or an RPC.
            logger.exception("on_released(%s, %s) failed", transfer_id, state.value)
        _call(wakes)
        return True

    def _wakes_of(self, transfer_id: str) -> tuple[Wake, ...]:
        return tuple(self._wakes.get(transfer_id, ()))


def _joined(chunks: Sequence[Chunk]) -> list[Chunk]:
    """Chunks that continue each other as one: a receiver that comes late copies whole runs."""
    joined: list[Chunk] = []
    for chunk in chunks:
        last = joined[-1] if joined else None
        if last is not None and chunk.first_block == last.first_block + len(last.generations):
            blocks = [*blocks_of(last.runs), *blocks_of(chunk.runs)]
            generations = last.generations + chunk.generations
            joined[-1] = Chunk(last.first_block, tuple(runs_of(blocks)), generations, chunk.tokens)
        else:
            joined.append(chunk)
    return joined


def _call(wakes: Iterable[Wake]) -> None:
    for wake in wakes:
        wake()
