"""Fetches an image of weights from executors that have it (DeepServe, section 6.3: fork).

The TE-shell makes one `WeightFetcher` beside its receiver. Sources are tried in the order they are named;
where one is lost the next goes on from the block that was reached. What is here is told to `Growing`, so that
this executor feeds others before it has everything.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grpc.aio
from deepflow.v1 import kvtransfer_pb2 as pb

from kvtransfer import metrics
from kvtransfer.errors import TransferError, TransferErrorCode, error_of
from kvtransfer.images import BLOCK_BYTES, Description, ImageStore
from kvtransfer.peers import Peer
from kvtransfer.receiver import Receiver
from kvtransfer.runs import Move
from kvtransfer.transports.base import Job, Transport

logger = logging.getLogger(__name__)

DESCRIBE_SECONDS = 2.0
"""A source that does not say what it has within this is left out (ours)."""
BUSY_SECONDS = 10.0
"""How long sources that feed others already, or do not know the model yet, are asked again (ours)."""
BUSY_POLL_SECONDS = 0.05
STALL_SECONDS = 20.0
"""A source that grants nothing for so long is left (ours): two executors may wait for each other."""
COPY_SECONDS = 10.0
"""Bound of one copy, of at most a window of blocks: as DEFAULT_PEER_TIMEOUT."""
END_SECONDS = 1.0

_LATER = (TransferErrorCode.BUSY, TransferErrorCode.NOT_CACHED)
"""Answers that may change while others load."""


@dataclass(frozen=True, slots=True)
class WeightPeer:
    """An executor that may have the weights."""

    address: str
    te_id: str
    incarnation: str

    def __str__(self) -> str:
        return f"{self.te_id} at {self.address}"


@dataclass(frozen=True, slots=True)
class Described:
    """What a source has, and how it is read."""

    peer: WeightPeer
    image: Description
    end: pb.HandshakeResponse


@dataclass(frozen=True, slots=True)
class Fetch:
    """A fetch that is done. `sources` fed it, in order; `transport` is the last one's."""

    bytes: int
    seconds: float
    transport: str
    sources: tuple[str, ...]


@dataclass(slots=True)
class _Going:
    """A fetch under way."""

    revision: str
    image: Description
    store: ImageStore
    advance: Callable[[int], None]
    progressed: float  # when a block came last
    have: int = 0


class WeightFetcher:
    """On the receiver's loop."""

    def __init__(self, receiver: Receiver, clock: Callable[[], float] = time.monotonic) -> None:
        self._receiver = receiver
        self._clock = clock
        self._feeds = 0

    async def describe(self, peers: Sequence[WeightPeer], revision: str) -> Described:
        """What the first of `peers` that has weights of `revision` has. Raises TransferError."""
        failure: TransferError | None = None
        for peer in peers:
            try:
                return await self._describe(peer, revision)
            except TransferError as error:
                failure = error
                logger.info("no weights of %s from %s: %s", revision, peer, error)
        raise failure or TransferError(TransferErrorCode.NOT_CACHED, "no executor was named")

    async def fetch(
        self, peers: Sequence[WeightPeer], revision: str, image: Description, store: ImageStore,
        advance: Callable[[int], None],
    ) -> Fetch:  # fmt: skip
        """Fills `store` with `image` from `peers`; `advance` is told how many blocks are in place.

        Raises TransferError where no source can go on; the blocks told of stay as they are. When it returns,
        raises or is cancelled, nothing writes to `store` any more.
        """
        started = self._clock()
        going = _Going(revision, image, store, advance, progressed=started)
        sources: list[str] = []
        transport = ""
        while not transport:
            failure = TransferError(TransferErrorCode.NOT_CACHED, "no executor was named")
            later = False
            for peer in peers:
                before = going.have
                try:
                    transport = await self._from(peer, going)
                except TransferError as error:
                    failure, later = error, later or error.code in _LATER
                    logger.info(
                        "weights from %s at block %d of %d: %s", peer, going.have, image.blocks, error
                    )
                if transport or going.have > before:
                    sources.append(peer.te_id)
                if transport:
                    break
            else:
                if not later or self._clock() - going.progressed > BUSY_SECONDS:
                    metrics.FETCHES.labels("failed").inc()
                    raise failure
                await asyncio.sleep(BUSY_POLL_SECONDS)
        metrics.FETCHES.labels("ok" if len(sources) == 1 else "resumed").inc()
        return Fetch(image.size, self._clock() - started, transport, tuple(sources))

    async def _describe(self, peer: WeightPeer, revision: str) -> Described:
        receiver = self._receiver
        request = pb.DescribeWeightsRequest(model_revision=revision, host_identity=receiver.host_identity())
        async with receiver.peers.borrow(peer.address, peer.te_id, peer.incarnation) as borrowed:
            try:
                answer = await borrowed.stub.DescribeWeights(
                    request, metadata=receiver.metadata, timeout=DESCRIBE_SECONDS
                )
            except grpc.aio.AioRpcError as rpc:
                error = error_of(rpc, f"weights at {peer}")
                if error.code is TransferErrorCode.PEER_LOST:
                    await receiver.peers.drop(borrowed)
                raise error from rpc
        if (answer.end.te_id, answer.end.incarnation) != (peer.te_id, peer.incarnation):
            raise TransferError(TransferErrorCode.PEER_LOST, f"{answer.end.te_id} answers at {peer.address}")
        image = Description(answer.content, answer.form, answer.size, answer.config)
        if image.size % BLOCK_BYTES or not image.blocks or answer.end.pool_id != image.name:
            raise TransferError(TransferErrorCode.INTERNAL, f"{peer} describes no image: {image.name}")
        return Described(peer, image, answer.end)

    async def _from(self, peer: WeightPeer, going: _Going) -> str:
        """All blocks that are missing, from one source; the transport's name. Raises TransferError."""
        image, receiver = going.image, self._receiver
        described = await self._describe(peer, going.revision)
        if described.image.name != image.name:
            raise TransferError(
                TransferErrorCode.LAYOUT_MISMATCH, f"{peer} has {described.image.name}, not {image.name}"
            )
        local = receiver.local_end(going.store)
        self._feeds += 1
        name = f"{local.receiver}/{self._feeds}"
        async with receiver.peers.borrow(peer.address, peer.te_id, peer.incarnation) as borrowed:
            feed = _Feed(borrowed, receiver, name)
            try:
                granted = await feed.open(going)
                transport = await borrowed.open_image(local, described.end, image.blocks)
                try:
                    while True:
                        if granted > going.have:
                            await self._copy(transport, going, name, granted)
                            await feed.tell(going.have)
                        if going.have >= image.blocks:
                            await feed.end()
                            return transport.name
                        if self._clock() - going.progressed > STALL_SECONDS:
                            raise TransferError(TransferErrorCode.PEER_LOST, f"{peer} grants nothing")
                        granted = await feed.next()
                finally:
                    await transport.close()
            except grpc.aio.AioRpcError as rpc:
                error = error_of(rpc, f"weights from {peer}")
                if error.code is TransferErrorCode.PEER_LOST:
                    await receiver.peers.drop(borrowed)
                raise error from rpc
            finally:
                feed.close()

    async def _copy(self, transport: Transport, going: _Going, name: str, end: int) -> None:
        """The blocks before `end` that are missing. Raises TransferError."""
        start = going.have
        deadline = self._clock() + COPY_SECONDS
        job = Job(
            going.image.name,
            name,
            (Move(start, start, end - start),),
            dict.fromkeys(range(start, end), 0),
            going.store,
            self._receiver.checksum,
            lambda: max(0.0, deadline - self._clock()),
        )
        try:
            async with asyncio.timeout(COPY_SECONDS):
                await transport.copy(job)
        except TimeoutError as error:
            raise TransferError(TransferErrorCode.DEADLINE, f"a copy took {COPY_SECONDS:.0f} s") from error
        metrics.FETCHED_BYTES.labels(transport.name).inc((end - start) * BLOCK_BYTES)
        going.have, going.progressed = end, self._clock()
        going.advance(end)


class _Feed:
    """The stream that keeps a feed open."""

    def __init__(self, peer: Peer, receiver: Receiver, name: str) -> None:
        self._call = peer.stub.FeedWeights(metadata=receiver.metadata)
        self._peer = peer
        self._timeout = receiver.peer_timeout
        self._name = name

    async def open(self, going: _Going) -> int:
        """Blocks that may be read. Raises TransferError, AioRpcError."""
        await self._call.write(
            pb.FeedWeightsRequest(
                model_revision=going.revision,
                image=going.image.name,
                receiver=self._name,
                blocks=going.have,
            )
        )
        return await self.next()

    async def next(self) -> int:
        """Raises TransferError for a source that is silent or ended the feed, AioRpcError."""
        try:
            async with asyncio.timeout(self._timeout):
                answer = await self._call.read()
        except TimeoutError as error:
            raise TransferError(TransferErrorCode.PEER_LOST, f"{self._peer} is silent") from error
        if not isinstance(answer, pb.FeedWeightsResponse):
            raise TransferError(TransferErrorCode.PEER_LOST, f"{self._peer} ended the feed")
        return answer.blocks

    async def tell(self, have: int) -> None:
        """Raises AioRpcError."""
        await self._call.write(pb.FeedWeightsRequest(blocks=have))

    async def end(self) -> None:
        """Everything is here: so the source counts it, if it hears in time."""
        with contextlib.suppress(grpc.aio.AioRpcError, TimeoutError):
            async with asyncio.timeout(END_SECONDS):
                await self._call.done_writing()
                while await self._call.read() is not grpc.aio.EOF:
                    pass

    def close(self) -> None:
        self._call.cancel()
