"""The receiver's cache of peers: a channel, a handshake and an open transport for each.

Keyed by (te_id, incarnation): a restarted executor is another peer. Bounded; a peer in use is never
evicted, and the number of peers in use is bounded by the receiver's concurrent pulls.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
from collections import OrderedDict
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio
from deepflow.v1 import kvtransfer_pb2 as pb
from deepflow.v1 import kvtransfer_pb2_grpc as pb_grpc

from kvtransfer import metrics
from kvtransfer.channel import open_channel
from kvtransfer.errors import TransferError, TransferErrorCode, TransportUnavailable, error_of
from kvtransfer.images import BLOCK_BYTES, ImageStore
from kvtransfer.layout import KVLayout, LayoutMismatch
from kvtransfer.pool import BlockStore, HostPool, PoolError
from kvtransfer.reshape import Reshaper
from kvtransfer.shm import request_pool
from kvtransfer.tls import Tls
from kvtransfer.transports.base import Transport
from kvtransfer.transports.choice import BEST_FIRST, Mode, Opener, open_best
from kvtransfer.transports.collective import NAME as COLLECTIVE
from kvtransfer.transports.collective import CollectiveTransport, FarEnd
from kvtransfer.transports.grpc_read import GrpcTransport
from kvtransfer.transports.onesided import LIBRARIES, OneSidedTransport, Registered
from kvtransfer.transports.shm import ShmTransport
from kvtransfer.transports.stream import StreamEnd, StreamTransport

logger = logging.getLogger(__name__)

MAX_PEERS = 64
"""Peers kept when idle: above the size of any TE group planned so far (ours)."""

SWEEP_SECONDS = 5.0
"""How soon the memory of a peer that is gone is let go (ours): a pool stays as long as anybody maps it."""

READ_METHOD = "/deepflow.v1.KVTransfer/Read"


@dataclass(frozen=True, slots=True)
class LocalEnd:
    """What this executor says of itself in a handshake."""

    te_id: str
    incarnation: str
    layout: KVLayout
    metadata: tuple[tuple[str, str], ...]
    token: str
    host_identity: str
    shm_dir: Path | None
    transports: Mode
    peer_timeout: float  # seconds
    host: str  # this executor's address, for libraries that listen
    copy_workers: ThreadPoolExecutor
    stream_workers: ThreadPoolExecutor
    pool: BlockStore
    attempt: int = 0  # of the task that pulls

    @property
    def receiver(self) -> str:
        """Names one pull, so that a late word of an earlier one is not taken for it."""
        return f"{self.te_id}/{self.incarnation}/{self.attempt}"


class Peer:
    """One executor to pull from. Use through `PeerCache.borrow`."""

    def __init__(self, address: str, te_id: str, incarnation: str, tls: Tls | None = None) -> None:
        self.address = address
        self.te_id = te_id
        self.incarnation = incarnation
        self.users = 0
        self.dropped = False
        self.channel = open_channel(address, tls)
        self.stub = pb_grpc.KVTransferStub(self.channel)
        self.read: grpc.aio.UnaryStreamMultiCallable[pb.ReadRequest, bytes] = self.channel.unary_stream(
            READ_METHOD, request_serializer=pb.ReadRequest.SerializeToString
        )
        self._lock = asyncio.Lock()
        self._handshake: pb.HandshakeResponse | None = None
        self._layout: KVLayout | None = None
        self._transport: Transport | None = None
        self._reshaper: Reshaper | None = None

    def __str__(self) -> str:
        return f"{self.te_id}/{self.incarnation} at {self.address}"

    @property
    def transport(self) -> Transport:
        """The one chosen in the last handshake."""
        assert self._transport is not None, "connect comes first"
        return self._transport

    @property
    def transport_name(self) -> str | None:
        """Of the one chosen in the last handshake; None before one. Any thread."""
        transport = self._transport
        return transport.name if transport is not None else None

    @property
    def reshaper(self) -> Reshaper | None:
        """What brings the peer's pages into this pool's layout; None where they are equal."""
        return self._reshaper

    async def connect(self, local: LocalEnd, timeout: float) -> pb.HandshakeResponse:
        """Shakes hands once, and opens the best transport of both ends. Raises TransferError."""
        async with self._lock:
            if self._handshake is not None and self._layout == local.layout:
                return self._handshake
            await self.forget()
            request = pb.HandshakeRequest(
                te_id=local.te_id,
                incarnation=local.incarnation,
                layout=local.layout.to_proto(),
                host_identity=local.host_identity,
            )
            try:
                answer = await self.stub.Handshake(request, metadata=local.metadata, timeout=timeout)
            except grpc.aio.AioRpcError as error:
                raise error_of(error, f"handshake with {self}") from error
            if (answer.te_id, answer.incarnation) != (self.te_id, self.incarnation):
                raise TransferError(
                    TransferErrorCode.PEER_LOST,
                    f"{self} is gone: {answer.te_id}/{answer.incarnation} answers there",
                )
            try:
                theirs = KVLayout.from_proto(answer.layout)
                local.layout.check_compatible(theirs)
            except LayoutMismatch as mismatch:
                raise TransferError(TransferErrorCode.LAYOUT_MISMATCH, mismatch.reason) from mismatch
            openers = self._openers(local, theirs, answer)
            self._transport = await open_best(local.transports, openers, str(self))
            self._reshaper = None if theirs == local.layout else Reshaper(theirs, local.layout)
            self._handshake, self._layout = answer, local.layout
            return answer

    async def open_image(self, local: LocalEnd, end: pb.HandshakeResponse, blocks: int) -> Transport:
        """The best transport out of an image of weights that this peer feeds us; the caller closes it. Raises
        TransferError."""
        openers = self._openers(local, local.layout, end)
        if "shm" in openers and local.shm_dir is not None:
            openers["shm"] = functools.partial(
                self._open_mapped, local, local.shm_dir / Path(end.shm_socket).name, end.pool_id, blocks
            )
        # Libraries and groups know the pool alone: what is read once is not worth registering there.
        sockets = {name: openers[name] for name in BEST_FIRST if name in openers}
        mode = local.transports if local.transports in BEST_FIRST else "auto"
        return await open_best(mode, sockets, str(self))

    @property
    def gone(self) -> bool:
        """Its pool was given up, or the connection to it has ended: what is mapped of it helps nobody."""
        transport = self._transport
        if isinstance(transport, ShmTransport) and transport.retired:
            return True
        return self._handshake is not None and self.channel.get_state() is not grpc.ChannelConnectivity.READY

    async def forget(self) -> None:
        """The next `connect` shakes hands anew."""
        self._handshake = None
        if self._transport is not None:
            await self._transport.close()  # a pull that still copies keeps what it uses

    async def close(self) -> None:
        await self.forget()
        await self.channel.close()

    def _openers(self, local: LocalEnd, theirs: KVLayout, answer: pb.HandshakeResponse) -> dict[str, Opener]:
        """How to open each transport that both ends can do."""

        async def grpc_read() -> Transport:
            return GrpcTransport(self.read, str(self), local.metadata, local.copy_workers)

        openers: dict[str, Opener] = {"grpc": grpc_read}
        shm_dir = local.shm_dir if local.host_identity else None
        if shm_dir is not None and answer.shm_socket:
            # The peer's folder may be mounted elsewhere here: only the name is taken from it.
            openers["shm"] = functools.partial(
                self._open_shm, local, theirs, shm_dir / Path(answer.shm_socket).name, answer.pool_id
            )
        for offer in answer.offers:
            if offer.name == "unix" and shm_dir is not None:
                address: str | tuple[str, int] = os.fspath(shm_dir / Path(offer.address).name)
            elif offer.name == "tcp" and offer.address.isdecimal():
                host = self.address.rpartition(":")[0].removeprefix("[").removesuffix("]")
                address = (host, int(offer.address))
            elif offer.name in LIBRARIES:
                source = Registered(offer.library, offer.pages, offer.table)
                openers[offer.name] = functools.partial(
                    OneSidedTransport.open, offer.name, local.receiver, local.host, source, theirs
                )
                continue
            elif offer.name == COLLECTIVE and local.transports == COLLECTIVE:
                openers[COLLECTIVE] = functools.partial(self._open_collective, local, offer.address)
                continue
            else:
                continue  # of a newer peer, or out of our reach
            end = StreamEnd(offer.name, address, self.incarnation, local.token)
            openers[offer.name] = functools.partial(
                StreamTransport.open, end, local.stream_workers, local.peer_timeout
            )
        return openers

    async def _open_collective(self, local: LocalEnd, offered: str) -> Transport:
        """Raises TransportUnavailable."""
        far = FarEnd(
            str(self),
            offered,
            functools.partial(self.stub.Meet, metadata=local.metadata, timeout=local.peer_timeout),
            self.read,
            local.metadata,
            local.receiver,
            local.host,
            local.pool,
        )
        return await CollectiveTransport.open(far, local.copy_workers, local.peer_timeout)

    async def _open_mapped(self, local: LocalEnd, path: Path, name: str, blocks: int) -> ShmTransport:
        """Maps the image that the peer feeds us. Raises TransportUnavailable."""
        passed = await request_pool(path, self.incarnation, local.token, name)
        try:
            image = ImageStore.attach(name, passed.fd, blocks * BLOCK_BYTES)
        except (OSError, ValueError) as error:
            raise TransportUnavailable("pool", str(error)) from error
        return ShmTransport(image, local.copy_workers)

    async def _open_shm(self, local: LocalEnd, theirs: KVLayout, path: Path, pool_id: str) -> ShmTransport:
        """Maps the peer's pool. Raises TransportUnavailable."""
        passed = await request_pool(path, self.incarnation, local.token)
        try:
            if passed.pool_id != pool_id:
                raise TransportUnavailable("reloaded", "the pool was replaced during the handshake")
            pool = await asyncio.to_thread(HostPool.attach, passed.fd, theirs, passed.num_blocks)
        except PoolError as error:
            raise TransportUnavailable("pool", str(error)) from error
        finally:
            os.close(passed.fd)
        return ShmTransport(pool, local.copy_workers)


class PeerCache:
    """Least recently used peers beyond `max_peers` are closed once idle."""

    def __init__(self, max_peers: int = MAX_PEERS, tls: Tls | None = None) -> None:
        self._max_peers = max_peers
        self._tls = tls
        self._peers: OrderedDict[tuple[str, str, str], Peer] = OrderedDict()
        self._sweeping: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return len(self._peers)

    def transport_of(self, key: tuple[str, str, str]) -> str | None:
        """By (te_id, incarnation, address), as of the last handshake; None before one. Any thread."""
        peer = self._peers.get(key)
        return peer.transport_name if peer is not None else None

    @contextlib.asynccontextmanager
    async def borrow(self, address: str, te_id: str, incarnation: str) -> AsyncIterator[Peer]:
        """The peer, kept open for the time of the context. Does not connect."""
        key = (te_id, incarnation, address)
        if key not in self._peers:
            for other in [k for k in self._peers if k[0] == te_id and k[1] != incarnation]:
                await self._drop(other)  # an older life of the same executor
        if (peer := self._peers.get(key)) is None:  # looked at again: another pull may have made it
            peer = self._peers[key] = Peer(address, te_id, incarnation, self._tls)
        if self._sweeping is None:
            self._sweeping = asyncio.get_running_loop().create_task(self._sweep(), name="kv-peers")
        self._peers.move_to_end(key)
        self.hold(peer)
        await self._evict()
        metrics.PEERS.set(len(self._peers))
        try:
            yield peer
        finally:
            await self.give_back(peer)

    def hold(self, peer: Peer) -> None:
        """Keeps the peer's channel open until `give_back`."""
        peer.users += 1

    async def give_back(self, peer: Peer) -> None:
        peer.users -= 1
        if peer.dropped and peer.users == 0:
            await peer.close()

    async def drop(self, peer: Peer) -> None:
        """The peer was lost: the next pull from it makes a new channel."""
        key = (peer.te_id, peer.incarnation, peer.address)
        if self._peers.get(key) is peer:
            await self._drop(key)

    async def close(self) -> None:
        if self._sweeping is not None:
            self._sweeping.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._sweeping
            self._sweeping = None
        for key in list(self._peers):
            await self._drop(key)

    async def _sweep(self) -> None:
        """Lets go of peers that are gone. One in use is left to its pull, which notices."""
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            for key, peer in list(self._peers.items()):
                if peer.users == 0 and peer.gone:
                    logger.info("peer %s is gone: its memory is let go", peer)
                    metrics.PEERS_GONE.inc()
                    await self._drop(key)

    async def _drop(self, key: tuple[str, str, str]) -> None:
        peer = self._peers.pop(key, None)
        metrics.PEERS.set(len(self._peers))
        if peer is not None:
            peer.dropped = True
            if peer.users == 0:
                await peer.close()

    async def _evict(self) -> None:
        idle = [key for key, peer in self._peers.items() if peer.users == 0]
        for key in idle[: max(0, len(self._peers) - self._max_peers)]:
            await self._drop(key)
