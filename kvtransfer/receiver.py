"""The receiver: pulls the KV of a transfer into blocks of its own pool.

The TE-shell calls `Receiver.pull` once per decode task, with every destination block reserved. A
pull follows the sender's announcements, copies each chunk while the next is computed, renews the
lease, and tells the sender how it ended: exactly one Finish per pull, whatever happened.

After `pull` returned or raised, nothing writes to the destination blocks any more (quarantine), so
they may be freed at once. Failures are typed (`TransferError`) and come within the deadline, and
within `peer_timeout` of a peer's death or hang.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import grpc.aio
import numpy as np
from deepflow.v1 import kvtransfer_pb2 as pb

from kvtransfer import metrics
from kvtransfer.auth import call_metadata
from kvtransfer.budget import ByteBudget
from kvtransfer.checks import UNCHECKED, compare
from kvtransfer.errors import TransferError, TransferErrorCode, code_of, error_of
from kvtransfer.layout import KVLayout
from kvtransfer.peers import MAX_PEERS, LocalEnd, Peer, PeerCache
from kvtransfer.pool import BlockStore
from kvtransfer.rates import TransportRates
from kvtransfer.reshape import Reshaper, Targets
from kvtransfer.runs import align, spelled
from kvtransfer.sender import DEFAULT_LEASE_SECONDS
from kvtransfer.shm import host_identity
from kvtransfer.tls import Tls
from kvtransfer.transports.base import Job, Transport, run_quarantined
from kvtransfer.transports.choice import Mode

logger = logging.getLogger(__name__)

DEFAULT_PULL_SECONDS = 120.0
"""Bound of a pull that was given no deadline (ours): a long prompt's prefill and its transfer."""
DEFAULT_PEER_TIMEOUT = 10.0
"""A peer that answers no heartbeat for so long is lost (ours; gRPC's keepalive notices as soon)."""
FINISH_SECONDS = 5.0
"""Bound of the best-effort Finish; a lost one is made up for by the lease."""
MAX_PULLS = 64
"""Pulls at once, the engine's default of running tasks; most of them wait for a prefill."""
MAX_WAITING = 256
"""Pulls that wait for a slot, the engine's default bound of tasks."""
MAX_INFLIGHT_BYTES = 256 << 20
"""Bytes that are copied at once: two prompts of 1,024 tokens of an 8B model. More in flight end no sooner
(ours); a single chunk above it is copied alone."""
COPY_THREADS = 2
"""One core copies about 10 GB/s, a socket's worth of memory bandwidth is reached with few (ours)."""
STREAM_THREADS = 8
"""Sockets read at once, as many as a sender answers: they wait for bytes more than they copy."""

Payload = bytes  # `PullResult.bytes` is a number


@dataclass(frozen=True, slots=True)
class PullResult:
    """`bytes` copied in `moves` contiguous copies; `seconds` from the call until all KV was in place.

    `payload` is what the sender's engine gave along with the end.
    """

    bytes: int
    moves: int
    transport: str  # name of kvtransfer.transports.choice
    seconds: float
    payload: Payload = b""
    copy_seconds: float = 0.0  # of `seconds`


@dataclass(slots=True)
class _Pull:
    """State of one pull while it runs."""

    transfer_id: str
    dst_blocks: Sequence[int]
    length: int
    first: int  # blocks before it are in place already
    needed: int  # blocks that hold `length` tokens
    deadline: float  # on the receiver's clock
    attempt: int
    payload: bytes = b""
    moves: int = 0
    bytes: int = 0
    copy_seconds: float = 0.0
    wanted: range = range(0)  # the transfer's blocks that are to be copied, in the sender's count
    reshaper: Reshaper | None = None  # None: the sender's pages are as this pool's
    in_place: set[int] = field(default_factory=set)  # of `wanted`
    transport: str = "none"


class Receiver:
    """Pulls into one pool. All methods on one asyncio loop."""

    def __init__(
        self,
        store: BlockStore | None,
        te_id: str,
        incarnation: str,
        *,
        token: str,
        transports: Mode = "auto",
        host: str = "127.0.0.1",
        shm_dir: Path | None = None,
        peer_timeout: float = DEFAULT_PEER_TIMEOUT,
        lease_seconds: float = DEFAULT_LEASE_SECONDS,
        checksum: bool = False,
        max_pulls: int = MAX_PULLS,
        max_waiting: int = MAX_WAITING,
        max_inflight_bytes: int = MAX_INFLIGHT_BYTES,
        max_peers: int = MAX_PEERS,
        clock: Callable[[], float] = time.monotonic,
        tls: Tls | None = None,
    ) -> None:
        """`clock` is the one that deadlines of `pull` are on, in seconds. `checksum` guards what
        arrives: each frame, or each block where the transport has no frames and pages are as the sender's."""
        self.te_id = te_id
        self.incarnation = incarnation
        self._store = store
        self._token = token
        self.metadata = call_metadata(token)
        self._transports = transports
        self._host = host
        self._shm_dir = shm_dir
        self.peer_timeout = peer_timeout
        self._heartbeat = min(lease_seconds / 3, peer_timeout / 2)
        self.checksum = checksum
        self._clock = clock
        self._budget = ByteBudget(max_inflight_bytes)
        self._slots = asyncio.Semaphore(max_pulls)
        self._max_waiting = max_waiting
        self._waiting = 0
        self.peers = PeerCache(max_peers, tls)
        self._pulls: set[asyncio.Task[PullResult]] = set()
        self._host_identity = ""
        self._finishes: set[asyncio.Task[None]] = set()
        self._workers = ThreadPoolExecutor(COPY_THREADS, thread_name_prefix="kv-copy")
        self._streams = ThreadPoolExecutor(STREAM_THREADS, thread_name_prefix="kv-stream-in")
        self._closed = False
        self.rates = TransportRates()

    @property
    def active(self) -> int:
        """Pulls in progress, waiting ones included."""
        return len(self._pulls)

    @property
    def layout(self) -> KVLayout:
        """Of the attached pool. Raises TransferError without one. Any thread."""
        store = self._store
        if store is None:
            raise TransferError(TransferErrorCode.INTERNAL, "this receiver has no pool")
        return store.layout

    def attach_store(self, store: BlockStore) -> None:
        if self._store is not None:
            raise ValueError("a store is attached already")
        self._store = store

    async def detach_store(self) -> None:
        """Cancels every pull, waits until nothing writes, and forgets the store. Idempotent."""
        self._store = None
        await self._cancel_pulls()

    async def close(self) -> None:
        """Cancels every pull, sends what Finishes are due, closes channels and mappings. Idempotent."""
        self._closed = True
        await self._cancel_pulls()
        if self._finishes:
            await asyncio.wait(self._finishes, timeout=FINISH_SECONDS)
        await self.peers.close()
        self._workers.shutdown(wait=False)
        self._streams.shutdown(wait=False)

    async def pull(  # noqa: PLR0917  where from, what, where to, until when: each is named at the call
        self,
        source_address: str,
        source_te_id: str,
        source_incarnation: str,
        transfer_id: str,
        dst_blocks: Sequence[int],
        length: int,
        skip_blocks: int = 0,
        deadline: float | None = None,
        attempt: int = 0,
    ) -> PullResult:
        """Fills `dst_blocks` (this pool's blocks for tokens `[0, length)`, in order) from the source.

        The first `skip_blocks` of them are not touched. The pull of a higher `attempt` takes the transfer
        over from one of a lower. `deadline` is absolute on the clock; None is
        `DEFAULT_PULL_SECONDS` from now. Raises TransferError, after which the blocks' content is
        undefined; ValueError for arguments that make no sense. Cancelling stops the writing before
        the cancellation is seen by the caller.
        """
        store = self._store
        if store is None or self._closed:
            raise TransferError(TransferErrorCode.INTERNAL, "this receiver has no pool")
        needed = store.layout.blocks_for(length)
        if length < 1 or skip_blocks < 0 or needed > len(dst_blocks):
            raise ValueError(
                f"{length} tokens, {skip_blocks} blocks to skip, {len(dst_blocks)} blocks to fill"
            )
        pull = _Pull(
            transfer_id,
            dst_blocks,
            length,
            min(skip_blocks, needed),
            needed,
            self._clock() + DEFAULT_PULL_SECONDS if deadline is None else deadline,
            attempt,
            wanted=range(min(skip_blocks, needed), needed),
        )
        work = self._pull(source_address, source_te_id, source_incarnation, store, pull)
        task = asyncio.get_running_loop().create_task(work, name=f"kv-pull-{transfer_id}")
        self._pulls.add(task)
        cancelled: asyncio.CancelledError | None = None
        while not task.done():  # quarantine: a cancelled pull is left only when nothing writes any more
            try:
                await asyncio.wait((task,))
            except asyncio.CancelledError as error:
                cancelled = error
                task.cancel()
        self._pulls.discard(task)
        if cancelled is not None:
            if not task.cancelled():
                task.exception()  # seen: the cancellation wins
            raise cancelled
        if task.cancelled():
            raise TransferError(TransferErrorCode.ABORTED, "this receiver's pool was detached")
        return task.result()

    async def open_prefix(
        self, address: str, te_id: str, incarnation: str, identities: Sequence[bytes], deadline: float
    ) -> tuple[str, int]:
        """Has the peer put its cached blocks of `identities` on offer: (transfer id, how many of them).

        Raises TransferError. A transfer that is not pulled then ends with its lease.
        """
        store = self._store
        if store is None or self._closed:
            raise TransferError(TransferErrorCode.INTERNAL, "this receiver has no pool")
        request = pb.OpenPrefixRequest(identities=identities, layout=store.layout.digest())
        async with self.peers.borrow(address, te_id, incarnation) as peer:
            try:
                left = min(self.peer_timeout, max(0.0, deadline - self._clock()))
                await peer.connect(self.local_end(store, 0), left)
                left = min(self.peer_timeout, max(0.0, deadline - self._clock()))
                answer = await peer.stub.OpenPrefix(request, metadata=self.metadata, timeout=left)
            except grpc.aio.AioRpcError as rpc:
                error = error_of(rpc, f"prefix at {peer}")
                if error.code is TransferErrorCode.PEER_LOST:
                    await self.peers.drop(peer)
                raise error from rpc
        if not 0 < answer.blocks <= len(identities):
            raise TransferError(TransferErrorCode.INTERNAL, f"{answer.blocks} blocks of {len(identities)}")
        return answer.transfer_id, answer.blocks

    def transport_to(self, address: str, te_id: str, incarnation: str) -> str | None:
        """The transport of the last handshake with that peer; None before one. Any thread."""
        return self.peers.transport_of((te_id, incarnation, address))

    async def _pull(
        self, address: str, te_id: str, incarnation: str, store: BlockStore, pull: _Pull
    ) -> PullResult:
        started = self._clock()
        outcome, failure = "ok", ""
        try:
            async with self.peers.borrow(address, te_id, incarnation) as peer:
                try:
                    await self._bounded(peer, store, pull)
                except TransferError as error:
                    outcome, failure = error.code.name.lower(), str(error)
                    if error.code is TransferErrorCode.PEER_LOST:
                        await self.peers.drop(peer)
                    raise
                except asyncio.CancelledError:
                    outcome, failure = "cancelled", "the receiver cancelled the transfer"
                    raise
                except BaseException as error:
                    outcome, failure = "internal", repr(error)
                    raise
                finally:
                    self._finish_later(peer, pull, failure)
        finally:
            metrics.TRANSFERS.labels(pull.transport, outcome).inc()
        seconds = self._clock() - started
        metrics.SECONDS.labels(pull.transport).observe(seconds)
        metrics.COPY_SECONDS.labels(pull.transport).observe(pull.copy_seconds)
        metrics.MOVES.labels(pull.transport).observe(pull.moves)
        self.rates.copied(pull.transport, pull.bytes, pull.copy_seconds)
        return PullResult(pull.bytes, pull.moves, pull.transport, seconds, pull.payload, pull.copy_seconds)

    # -- one pull -----------------------------------------------------------------------------

    async def _bounded(self, peer: Peer, store: BlockStore, pull: _Pull) -> None:
        """The pull within its deadline and within a slot."""
        try:
            async with asyncio.timeout(self._left(pull)):
                if self._waiting >= self._max_waiting and self._slots.locked():
                    raise TransferError(
                        TransferErrorCode.BUSY, f"{self._waiting} pulls wait at this receiver"
                    )
                self._waiting += 1
                metrics.WAITING_PULLS.inc()
                try:
                    await self._slots.acquire()
                finally:
                    self._waiting -= 1
                    metrics.WAITING_PULLS.dec()
                metrics.ACTIVE_PULLS.inc()
                try:
                    await self._run(peer, store, pull)
                finally:
                    metrics.ACTIVE_PULLS.dec()
                    self._slots.release()
        except TimeoutError as error:
            raise TransferError(
                TransferErrorCode.DEADLINE, f"transfer {pull.transfer_id} from {peer} passed its deadline"
            ) from error

    async def _run(self, peer: Peer, store: BlockStore, pull: _Pull) -> None:
        local = self.local_end(store, pull.attempt)
        try:
            handshake = await peer.connect(local, min(self.peer_timeout, self._left(pull)))
            try:
                await self._guarded(peer, local, store, pull, handshake.pool_id)
            except TransferError as error:
                if error.code is not TransferErrorCode.STALE_POOL:
                    raise
                # The sender loaded a model since we shook hands: once more with its new pool.
                await peer.forget()
                handshake = await peer.connect(local, min(self.peer_timeout, self._left(pull)))
                await self._guarded(peer, local, store, pull, handshake.pool_id)
        except TransferError as error:
            if error.code is TransferErrorCode.PEER_LOST and self._clock() >= pull.deadline:
                raise TimeoutError from error  # a call's own timeout ended with the deadline
            raise

    async def _guarded(
        self, peer: Peer, local: LocalEnd, store: BlockStore, pull: _Pull, pool_id: str
    ) -> None:
        """Follows the announcements with a heartbeat beside; the first of both to fail ends it."""
        try:
            async with asyncio.TaskGroup() as group:
                heartbeat = group.create_task(self._renew(peer, pull.transfer_id, local.receiver))
                await self._follow(peer, local, store, pull, pool_id)
                heartbeat.cancel()
        except BaseExceptionGroup as failures:
            typed = failures.subgroup(TransferError)
            raise (typed or failures).exceptions[0] from None

    async def _follow(
        self, peer: Peer, local: LocalEnd, store: BlockStore, pull: _Pull, pool_id: str
    ) -> None:
        transport = peer.transport
        pull.transport, pull.reshaper = transport.name, peer.reshaper
        if pull.reshaper is not None:
            pull.wanted = pull.reshaper.wanted(pull.first, pull.length)
        request = pb.WatchRequest(
            transfer_id=pull.transfer_id,
            receiver=local.receiver,
            pool_id=pool_id,
            attempt=pull.attempt,
            checksums=self.checksum and transport.name in UNCHECKED,
        )
        call = peer.stub.Watch(request, metadata=self.metadata, timeout=self._left(pull))
        try:
            async for update in call:
                match update.WhichOneof("update"):
                    case "chunk":
                        await self._copy(transport, local, store, pull, update.chunk)
                    case "complete":
                        self._check_complete(pull, update.complete)
                        pull.payload = update.complete.payload
                        return
                    case "failed":
                        raise TransferError(code_of(update.failed.code), update.failed.message)
        except grpc.aio.AioRpcError as error:
            raise error_of(error, f"watch of {pull.transfer_id} at {peer}") from error
        finally:
            call.cancel()
        raise TransferError(
            TransferErrorCode.PEER_LOST, f"{peer} ended the watch of {pull.transfer_id} without a result"
        )

    async def _copy(
        self, transport: Transport, local: LocalEnd, store: BlockStore, pull: _Pull, chunk: pb.ChunkReady
    ) -> None:
        """Copies what is needed of one chunk. A block announced again is copied again."""
        counts = np.fromiter((run.count for run in chunk.runs), np.int64, len(chunk.runs))
        count = int(counts.sum())
        if count != len(chunk.generations) or len(chunk.checksums) not in (0, count):
            raise TransferError(
                TransferErrorCode.INTERNAL, "a chunk's blocks and generations differ in number"
            )
        starts = np.fromiter((run.start for run in chunk.runs), np.int64, len(chunk.runs))
        announced = spelled(starts, counts)
        first = chunk.first_block
        wanted = range(max(first, pull.wanted.start), min(first + count, pull.wanted.stop))
        if not wanted:
            return
        sources = announced[wanted.start - first : wanted.stop - first]
        reshaper = pull.reshaper
        size = len(wanted) * (store.layout if reshaper is None else reshaper.staged).block_bytes
        job = Job(
            pull.transfer_id,
            local.receiver,
            (),
            dict(zip(announced, chunk.generations, strict=True)),
            store,
            self.checksum,
            lambda: self._left(pull),
        )
        async with self._budget.hold(size):
            started = self._clock()
            metrics.INFLIGHT_BYTES.inc(size)
            try:
                if reshaper is None:
                    blocks = pull.dst_blocks[wanted.start : wanted.stop]
                    moves = align(sources, blocks)
                    await transport.copy(replace(job, moves=moves))
                    pull.moves += len(moves)
                    if chunk.checksums:
                        sums = chunk.checksums[wanted.start - first : wanted.stop - first]
                        await run_quarantined(self._workers, functools.partial(compare, store, blocks, sums))
                else:
                    targets = Targets(store, pull.dst_blocks[: pull.needed], pull.first)
                    pull.moves += await reshaper.copy(
                        transport, job, list(zip(wanted, sources, strict=True)), targets, self._workers
                    )
            finally:
                metrics.INFLIGHT_BYTES.dec(size)
                pull.copy_seconds += self._clock() - started
        pull.in_place.update(wanted)
        pull.bytes += size
        metrics.BYTES.labels(transport.name).inc(size)

    def _check_complete(self, pull: _Pull, complete: pb.TransferComplete) -> None:
        missing = len(pull.wanted) - len(pull.in_place)
        if complete.tokens < pull.length or missing:
            raise TransferError(
                TransferErrorCode.ABORTED,
                f"transfer {pull.transfer_id} is complete with {complete.tokens} tokens, {pull.length} needed"
                f" ({missing} blocks were not announced)",
            )

    async def _renew(self, peer: Peer, transfer_id: str, receiver: str) -> None:
        """Extends the lease until cancelled. Raises TransferError(PEER_LOST) if the peer is silent."""
        request = pb.RenewRequest(transfer_id=transfer_id, receiver=receiver)
        while True:
            await asyncio.sleep(self._heartbeat)
            try:
                await peer.stub.Renew(request, metadata=self.metadata, timeout=self.peer_timeout / 2)
            except grpc.aio.AioRpcError as rpc:
                error = error_of(rpc, f"heartbeat to {peer}")
                if error.code is TransferErrorCode.PEER_LOST:
                    raise error from rpc
                # An ended or unknown transfer is the watch's and the generations' to tell.
                logger.debug("%s", error)

    # -- around it ----------------------------------------------------------------------------

    def local_end(self, store: BlockStore, attempt: int = 0) -> LocalEnd:
        """What this executor says of itself to a peer whose blocks go into `store`."""
        return LocalEnd(
            self.te_id,
            self.incarnation,
            store.layout,
            self.metadata,
            self._token,
            self.host_identity(),
            self._shm_dir,
            self._transports,
            self.peer_timeout,
            self._host,
            self._workers,
            self._streams,
            store,
            attempt=attempt,
        )

    def host_identity(self) -> str:
        """Of `kvtransfer.shm`; "" where no memory is shared."""
        if not self._host_identity and self._transports != "grpc":
            self._host_identity = host_identity(self._shm_dir)
        return self._host_identity

    def _left(self, pull: _Pull) -> float:
        return max(0.0, pull.deadline - self._clock())

    def _finish_later(self, peer: Peer, pull: _Pull, failure: str) -> None:
        """Sends the one Finish of a pull; the pull does not wait for it. Owned until `close`."""
        request = pb.FinishRequest(
            transfer_id=pull.transfer_id,
            receiver=f"{self.te_id}/{self.incarnation}/{pull.attempt}",
            ok=not failure,
            reason=failure[:500],
        )
        self.peers.hold(peer)
        work = self._finish(peer, request)
        task = asyncio.get_running_loop().create_task(work, name=f"kv-finish-{pull.transfer_id}")
        self._finishes.add(task)
        task.add_done_callback(self._finishes.discard)

    async def _finish(self, peer: Peer, request: pb.FinishRequest) -> None:
        try:
            await peer.stub.Finish(request, metadata=self.metadata, timeout=FINISH_SECONDS)
        except grpc.aio.AioRpcError as error:
            logger.info("finish of %s at %s: %s", request.transfer_id, peer, error.details())
        finally:
            await self.peers.give_back(peer)

    async def _cancel_pulls(self) -> None:
        pulls = tuple(self._pulls)
        for task in pulls:
            task.cancel()
        if pulls:
            await asyncio.wait(pulls)
