"""The sender's side of the pull protocol: the grpc.aio service `deepflow.v1.KVTransfer`.

The TE-shell makes one, adds it to its server with `add_to_server`, and runs it from `start` to
`stop`; in between it owns the task that ends expired leases and the unix socket that passes the
pool's descriptor. Credentials are checked before it, by `kvtransfer.auth.TokenAuth`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import grpc
import grpc.aio
from deepflow.v1 import kvtransfer_pb2 as pb

from kvtransfer import metrics
from kvtransfer.checks import checksums
from kvtransfer.errors import TransferError, TransferErrorCode, TransportUnavailable, status_of
from kvtransfer.feeds import WeightFeeds
from kvtransfer.images import Description, Images
from kvtransfer.layout import KVLayout, LayoutMismatch
from kvtransfer.pool import BlockStore, HostPool
from kvtransfer.sender import Chunk, Sender
from kvtransfer.shm import PoolServer, host_identity
from kvtransfer.transports.collective import NAME as COLLECTIVE
from kvtransfer.transports.collective_serve import Groups
from kvtransfer.transports.grpc_serve import read_frames
from kvtransfer.transports.onesided import LIBRARIES, Source
from kvtransfer.transports.stream_server import StreamServer

logger = logging.getLogger(__name__)

SERVICE = "deepflow.v1.KVTransfer"
WATCH_GRACE_SECONDS = 2.0
"""A watch may overtake the offer it is for (both start at placement); ours, above one engine step."""
MAX_READS = 8
"""Read streams served at once; more only divide the same memory and network bandwidth."""
MAX_WAITING_READS = 64
MAX_WATCHES = 2048
"""Twice the bound of transfers: one each, and one that reconnects before the old one is noticed gone."""
MAX_PREFIX_BLOCKS = 1 << 16
"""Blocks that one prefix may have (ours): a million tokens at 16 a block."""
IDENTITY_BYTES = 16
MAX_REAP_SECONDS = 1.0
"""Leases are looked at ten times a lease, at least this often."""

Context = grpc.aio.ServicerContext[Any, Any]
Lend = Callable[[Sequence[bytes]], tuple[str, int]]
"""Opens a transfer of the first cached blocks of some identities: its id and their number. Called on a worker
thread, must not wait for a step. Raises TransferError (NOT_CACHED, BUSY)."""


class KVTransferService:
    """Serves one Sender. Without `shm_dir` nothing is shared on the host; `data_listen` is the host and
    port of the data socket (port 0: any), without it other hosts read over gRPC. `library` ("nixl",
    "mooncake") reads the pool at `host`, where it is asked for, or "collective" sends it."""

    def __init__(
        self,
        sender: Sender,
        *,
        token: str = "",
        shm_dir: Path | None = None,
        data_listen: tuple[str, int] | None = None,
        library: str = "",
        host: str = "127.0.0.1",
        max_reads: int = MAX_READS,
        max_watches: int = MAX_WATCHES,
        watch_grace: float = WATCH_GRACE_SECONDS,
        lend: Lend | None = None,
        images: Images | None = None,
    ) -> None:
        """`lend` opens transfers of what is cached; without it nothing is lent. `images` are weights that
        may be read; without them none are fed."""
        self.sender = sender
        self._shm_dir = shm_dir
        self._host_identity = ""
        self._pool_server = PoolServer(sender, shm_dir, token) if shm_dir is not None else None
        self._shm_socket = ""
        self._token = token
        self._data_listen = data_listen
        self._streams: StreamServer | None = None
        self._offers: dict[str, str] = {}  # address by name
        self._library = library
        self._host = host
        self._registered: tuple[str, Source] | None = None  # of the pool with this id
        self._registering = asyncio.Lock()
        self._groups = Groups(sender, host) if library == COLLECTIVE else None
        self._reads = asyncio.Semaphore(max_reads)
        self._waiting_reads = 0
        self._watches = 0
        self._max_watches = max_watches
        self._watch_grace = watch_grace
        self._lend = lend
        sender.images = images
        self._feeds = None if images is None else WeightFeeds(images, self._image_end)
        self._reaper: asyncio.Task[None] | None = None

    # -- life ---------------------------------------------------------------------------------

    def add_to_server(self, server: grpc.aio.Server) -> None:
        """Registers the service. Not the generated registration: Read's frames are built here."""

        def unary(call: Callable[[Any, Context], Awaitable[Any]], request: Any, response: Any) -> Any:
            return grpc.unary_unary_rpc_method_handler(
                call, request_deserializer=request.FromString, response_serializer=response.SerializeToString
            )

        server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(
                    SERVICE,
                    {
                        "Handshake": unary(self.handshake, pb.HandshakeRequest, pb.HandshakeResponse),
                        "Renew": unary(self.renew, pb.RenewRequest, pb.RenewResponse),
                        "Finish": unary(self.finish, pb.FinishRequest, pb.FinishResponse),
                        "OpenPrefix": unary(self.open_prefix, pb.OpenPrefixRequest, pb.OpenPrefixResponse),
                        "Meet": unary(self.meet, pb.MeetRequest, pb.MeetResponse),
                        "DescribeWeights": unary(
                            self.describe_weights, pb.DescribeWeightsRequest, pb.DescribeWeightsResponse
                        ),
                        "FeedWeights": grpc.stream_stream_rpc_method_handler(
                            self.feed_weights,
                            request_deserializer=pb.FeedWeightsRequest.FromString,
                            response_serializer=pb.FeedWeightsResponse.SerializeToString,
                        ),
                        "Watch": grpc.unary_stream_rpc_method_handler(
                            self.watch,
                            request_deserializer=pb.WatchRequest.FromString,
                            response_serializer=pb.TransferUpdate.SerializeToString,
                        ),
                        "Read": grpc.unary_stream_rpc_method_handler(
                            self.read, request_deserializer=pb.ReadRequest.FromString
                        ),
                    },
                ),
            )
        )

    async def start(self) -> None:
        """Starts the reaper and, where it can be, the socket; without it peers use gRPC."""
        if self._pool_server is not None:
            try:
                self._pool_server.start()
            except OSError as error:
                logger.warning("no shared-memory transport: %s", error)
            else:
                self._shm_socket = str(self._pool_server.path)
                self._host_identity = host_identity(self._shm_dir)
        self._start_streams()
        self._reaper = asyncio.create_task(self._reap(), name="kv-lease-reaper")

    def _start_streams(self) -> None:
        """The data sockets; what cannot be had is not offered."""
        self._streams = StreamServer(self.sender, self._token)
        if self._host_identity and self._pool_server is not None:
            path = self._pool_server.path.with_suffix(".data.sock")
            try:
                self._streams.listen_unix(path)
                self._offers["unix"] = path.name
            except OSError as error:
                logger.warning("no unix data socket: %s", error)
        if self._data_listen is not None:
            try:
                self._offers["tcp"] = str(self._streams.listen_tcp(*self._data_listen))
            except OSError as error:
                logger.warning("no TCP data socket at %s: %s", self._data_listen, error)

    async def stop(self, reason: str = "the executor stops") -> None:
        """Withdraws what is left and gives the socket back. Idempotent."""
        self.detach_store(reason)
        if self._reaper is not None:
            self._reaper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reaper
            self._reaper = None
        if self._streams is not None:
            await self._streams.stop()
            self._streams = None
            self._offers.clear()
        if self._pool_server is not None:
            await self._pool_server.stop()
            self._shm_socket = ""

    def attach_store(self, store: BlockStore) -> None:
        self.sender.attach_store(store)

    def detach_store(self, reason: str = "the model was unloaded") -> None:
        self.sender.detach_store(reason)
        self._registered = None
        if self._groups is not None:
            self._groups.close()

    async def _reap(self) -> None:
        interval = min(MAX_REAP_SECONDS, self.sender.lease_seconds / 10)
        while True:
            await asyncio.sleep(interval)
            self.sender.reap()

    # -- calls --------------------------------------------------------------------------------

    async def handshake(self, request: pb.HandshakeRequest, context: Context) -> pb.HandshakeResponse:
        store, pool_id = self.sender.store, self.sender.pool_id
        if store is None:
            await _abort(
                context, TransferError(TransferErrorCode.UNKNOWN_TRANSFER, "no model is loaded here")
            )
        try:
            store.layout.check_compatible(KVLayout.from_proto(request.layout))
        except LayoutMismatch as mismatch:
            logger.warning("handshake with %s/%s refused: %s", request.te_id, request.incarnation, mismatch)
            await _abort(context, TransferError(TransferErrorCode.LAYOUT_MISMATCH, mismatch.reason))
        registered = await self._register(store, pool_id)
        shared = bool(self._host_identity) and request.host_identity == self._host_identity
        return pb.HandshakeResponse(
            te_id=self.sender.te_id,
            incarnation=self.sender.incarnation,
            layout=store.layout.to_proto(),
            num_blocks=store.num_blocks,
            host_identity=self._host_identity,
            shm_socket=self._shm_socket if shared and isinstance(store, HostPool) else "",
            pool_id=pool_id,
            offers=[*self._socket_offers(shared), *([] if registered is None else [registered])],
        )

    def _socket_offers(self, shared: bool) -> list[pb.TransportOffer]:
        return [
            pb.TransportOffer(name=name, address=address)
            for name, address in self._offers.items()
            if shared or name != "unix"
        ]

    async def _register(self, store: BlockStore, pool_id: str) -> pb.TransportOffer | None:
        """The configured library's offer; made once for each pool, None without it."""
        if self._groups is not None:
            offered = await self._groups.offered(store)
            return pb.TransportOffer(name=COLLECTIVE, address=offered) if offered else None
        if self._library not in LIBRARIES or not isinstance(store, HostPool):
            return None
        async with self._registering:
            if self._registered is None or self._registered[0] != pool_id:
                owner = f"{self.sender.te_id}/{self.sender.incarnation}"
                make = functools.partial(Source, self._library, owner, self._host, store)
                try:
                    self._registered = (pool_id, await asyncio.to_thread(make))
                except TransportUnavailable as error:
                    logger.warning("no transport %s: %s", self._library, error)
                    return None
            made = self._registered[1].registered
        return pb.TransportOffer(
            name=self._library, library=made.description, pages=made.pages, table=made.table
        )

    async def watch(self, request: pb.WatchRequest, context: Context) -> AsyncIterator[pb.TransferUpdate]:
        """Every announced chunk from the first on, then exactly one terminal update."""
        if request.pool_id and request.pool_id != self.sender.pool_id:
            stale = TransferError(
                TransferErrorCode.STALE_POOL, "the pool of this executor is another one now"
            )
            yield _failed(stale)
            return
        if self._watches >= self._max_watches:
            metrics.REFUSED.labels("watch").inc()
            yield _failed(TransferError(TransferErrorCode.BUSY, "too many watches are open here"))
            return
        loop = asyncio.get_running_loop()
        changed = asyncio.Event()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(changed.set)

        transfer_id = request.transfer_id
        self.sender.subscribe(transfer_id, wake)
        self._watches += 1
        try:
            if not self.sender.known(transfer_id):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._watch_grace):
                        await changed.wait()
            seen = 0
            while True:
                changed.clear()
                progress = self.sender.progress(transfer_id, request.receiver, seen, request.attempt)
                for chunk in progress.chunks:
                    message = _chunk_message(chunk)
                    store = self.sender.store
                    if request.checksums and store is not None:
                        full = chunk.tokens if progress.tokens is None else None
                        message.checksums.extend(await asyncio.to_thread(checksums, store, chunk, full))
                    yield pb.TransferUpdate(chunk=message)
                seen = progress.seen
                if progress.failure is not None:
                    yield _failed(progress.failure)
                    return
                if progress.tokens is not None:
                    complete = pb.TransferComplete(
                        tokens=progress.tokens, blocks=progress.blocks, payload=progress.payload
                    )
                    yield pb.TransferUpdate(complete=complete)
                    return
                await changed.wait()
        finally:
            self._watches -= 1
            self.sender.unsubscribe(transfer_id, wake)

    async def read(self, request: pb.ReadRequest, context: Context) -> AsyncIterator[bytes]:
        """The runs' bytes in order; a piece is sent only if no block of it moved while it was copied."""
        if context.time_remaining() is None:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a Read needs a deadline")
        if self._waiting_reads >= MAX_WAITING_READS:
            metrics.REFUSED.labels("read").inc()
            await _abort(context, TransferError(TransferErrorCode.BUSY, "too many Reads wait here"))
        self._waiting_reads += 1
        try:
            await self._reads.acquire()
        finally:
            self._waiting_reads -= 1
        metrics.ACTIVE_READS.inc()
        try:
            if request.group and self._groups is None:
                raise TransferError(TransferErrorCode.STALE_POOL, "no groups are met here")
            if request.group and self._groups is not None:
                frames = self._groups.read(request)
            else:
                frames = read_frames(self.sender, request)
            async with contextlib.aclosing(frames):
                async for frame in frames:
                    yield frame
        except TransferError as error:
            await _abort(context, error)
        finally:
            metrics.ACTIVE_READS.dec()
            self._reads.release()

    async def meet(self, request: pb.MeetRequest, context: Context) -> pb.MeetResponse:
        """The board of a group of torch.distributed, see kvtransfer.transports.collective."""
        store = self.sender.store
        try:
            if self._groups is None or store is None:
                raise TransferError(TransferErrorCode.STALE_POOL, "no groups are met here")
            return await self._groups.meet(request, store)
        except TransferError as error:
            await _abort(context, error)

    async def renew(self, request: pb.RenewRequest, context: Context) -> pb.RenewResponse:
        try:
            lease = self.sender.renew(request.transfer_id, request.receiver)
        except TransferError as error:
            await _abort(context, error)
        return pb.RenewResponse(lease_ms=int(lease * 1000))

    async def finish(self, request: pb.FinishRequest, context: Context) -> pb.FinishResponse:
        try:
            first = self.sender.finish(request.transfer_id, request.receiver, request.ok, request.reason)
        except TransferError as error:
            await _abort(context, error)
        return pb.FinishResponse(first=first)

    async def open_prefix(self, request: pb.OpenPrefixRequest, context: Context) -> pb.OpenPrefixResponse:
        identities = request.identities
        if not 0 < len(identities) <= MAX_PREFIX_BLOCKS or any(len(i) != IDENTITY_BYTES for i in identities):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "identities of 16 bytes each")
        store = self.sender.store
        try:
            if store is None or self._lend is None:
                raise TransferError(TransferErrorCode.NOT_CACHED, "nothing is lent here")
            if request.layout != store.layout.digest():
                raise TransferError(
                    TransferErrorCode.LAYOUT_MISMATCH, "cached blocks are lent to equal layouts only"
                )
            opening = asyncio.ensure_future(asyncio.to_thread(self._lend, list(identities)))
            try:
                transfer_id, blocks = await asyncio.shield(opening)
            except asyncio.CancelledError:  # nobody hears of the transfer: it must not wait for its lease
                opening.add_done_callback(self._take_back)
                raise
        except TransferError as error:
            await _abort(context, error)
        metrics.PREFIXES_LENT.inc()
        return pb.OpenPrefixResponse(transfer_id=transfer_id, blocks=blocks)

    # -- weights ------------------------------------------------------------------------------

    def _image_end(self, image: Description, host: str) -> pb.HandshakeResponse:
        shared = bool(self._host_identity) and host == self._host_identity
        return pb.HandshakeResponse(
            te_id=self.sender.te_id,
            incarnation=self.sender.incarnation,
            num_blocks=image.blocks,
            host_identity=self._host_identity,
            shm_socket=self._shm_socket if shared else "",
            pool_id=image.name,
            offers=self._socket_offers(shared),
        )

    async def describe_weights(
        self, request: pb.DescribeWeightsRequest, context: Context
    ) -> pb.DescribeWeightsResponse:
        try:
            return self._weights().describe(request)
        except TransferError as error:
            await _abort(context, error)

    async def feed_weights(
        self, requests: AsyncIterator[pb.FeedWeightsRequest], context: Context
    ) -> AsyncIterator[pb.FeedWeightsResponse]:
        try:
            async with contextlib.aclosing(self._weights().feed(requests)) as granted:
                async for grant in granted:
                    yield grant
        except TransferError as error:
            await _abort(context, error)

    def _weights(self) -> WeightFeeds:
        if self._feeds is None:
            raise TransferError(TransferErrorCode.NOT_CACHED, "no weights are fed here")
        return self._feeds

    def _take_back(self, opening: asyncio.Future[tuple[str, int]]) -> None:
        if not opening.cancelled() and opening.exception() is None:
            self.sender.withdraw(opening.result()[0], "the receiver went away")


async def _abort(context: Context, error: TransferError) -> NoReturn:
    await context.abort(*status_of(error))
    raise AssertionError("abort returned")


def _failed(error: TransferError) -> pb.TransferUpdate:
    failed = pb.TransferFailed(code=pb.TransferErrorCode.ValueType(error.code.value), message=error.message)
    return pb.TransferUpdate(failed=failed)


def _chunk_message(chunk: Chunk) -> pb.ChunkReady:
    message = pb.ChunkReady(first_block=chunk.first_block, generations=chunk.generations, tokens=chunk.tokens)
    add = message.runs.add
    for run in chunk.runs:  # in place: runs made apart and copied take three times as long
        added = add()
        added.start = run.start
        added.count = run.count
    return message
