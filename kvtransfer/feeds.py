"""Serves images of weights: the calls DescribeWeights and FeedWeights of the KV-transfer service.

A feed is one stream. The receiver says how many blocks it has, the sender how many it may read: those that
are here, a window beyond what the receiver has, and no faster than the pace of `kvtransfer.images`. The bytes
themselves go as those of a KV transfer. The stream is the lease: when it ends, so does the feed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

import grpc.aio
from deepflow.v1 import kvtransfer_pb2 as pb

from kvtransfer import metrics
from kvtransfer.errors import TransferError, TransferErrorCode
from kvtransfer.images import BLOCK_BYTES, GRANT_BLOCKS, WINDOW_BLOCKS, Description, Feed, Images

logger = logging.getLogger(__name__)

REPEAT_SECONDS = 2.0
"""A receiver hears at least this often that its feed lives: a fifth of DEFAULT_PEER_TIMEOUT."""
SILENT_SECONDS = 60.0
"""A receiver that takes nothing of what it was granted for so long is given up (ours)."""

End = Callable[[Description, str], pb.HandshakeResponse]
"""How an image can be read by an end of some host identity."""


class WeightFeeds:
    """The handlers, for `kvtransfer.service`."""

    def __init__(self, images: Images, end: End) -> None:
        self.images = images
        self._end = end

    def describe(self, request: pb.DescribeWeightsRequest) -> pb.DescribeWeightsResponse:
        """Raises TransferError(NOT_CACHED)."""
        image = self.images.find(request.model_revision)
        return pb.DescribeWeightsResponse(
            content=image.content,
            form=image.form,
            size=image.size,
            config=image.config,
            end=self._end(image, request.host_identity),
        )

    async def feed(
        self, requests: AsyncIterator[pb.FeedWeightsRequest]
    ) -> AsyncGenerator[pb.FeedWeightsResponse]:
        """Grants until the receiver ends the stream. Raises TransferError."""
        requests = aiter(requests)
        first = await anext(requests, None)
        if first is None:
            return
        async with self.images.feeding(first.model_revision, first.image, first.receiver) as feed:
            has = _Has(first.blocks)
            reading = asyncio.create_task(has.follow(requests), name="weights-feed")
            outcome = "lost"
            try:
                async with contextlib.aclosing(self._grants(feed, has)) as grants:
                    async for blocks in grants:
                        yield pb.FeedWeightsResponse(blocks=blocks)
                outcome = "ok" if has.blocks >= feed.image.blocks else "left"
            finally:
                reading.cancel()
                with contextlib.suppress(asyncio.CancelledError, grpc.aio.AioRpcError):
                    await reading
                metrics.FED.labels(outcome).inc()
                metrics.FED_BYTES.inc(max(0, has.blocks - first.blocks) * BLOCK_BYTES)
                logger.info("fed %s to %s: %s", feed.image.name, first.receiver, outcome)

    async def _grants(self, feed: Feed, has: _Has) -> AsyncGenerator[int]:
        """How far the receiver may read, each time that is further, or nothing was said for a while."""
        feed.granted = has.blocks
        silent = 0.0
        while not has.ended:
            if feed.store.retired:
                raise TransferError(TransferErrorCode.ABORTED, "the image is given up here")
            step = min(feed.ready, has.blocks + WINDOW_BLOCKS) - feed.granted
            if step > 0:
                if self.images.pace.holds:
                    step = min(step, GRANT_BLOCKS)
                delay = self.images.pace.delay(step * BLOCK_BYTES)
                metrics.FEED_WAITS.inc(delay)
                while delay > 0:
                    await asyncio.sleep(min(delay, REPEAT_SECONDS))
                    delay -= REPEAT_SECONDS
                    if delay > 0:
                        yield feed.granted
                feed.granted += step
                yield feed.granted
                continue
            before = has.blocks
            if not await _any(REPEAT_SECONDS, has.changed, feed.growing.changed if feed.growing else None):
                idle = feed.granted > has.blocks == before or feed.granted >= feed.image.blocks
                silent = silent + REPEAT_SECONDS if idle else 0.0
                if silent >= SILENT_SECONDS:
                    raise TransferError(TransferErrorCode.PEER_LOST, "the receiver takes nothing")
                yield feed.granted
            else:
                silent = 0.0


class _Has:
    """What the receiver said last."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.ended = False
        self.changed = asyncio.Event()

    async def follow(self, requests: AsyncIterator[pb.FeedWeightsRequest]) -> None:
        try:
            async for request in requests:
                self.blocks = max(self.blocks, request.blocks)
                self.changed.set()
                self.changed = asyncio.Event()
        finally:
            self.ended = True
            self.changed.set()


async def _any(seconds: float, *events: asyncio.Event | None) -> bool:
    """Whether one of them is set within so long."""
    waits: list[asyncio.Task[Any]] = [asyncio.create_task(event.wait()) for event in events if event]
    try:
        done, _ = await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        return bool(done)
    finally:
        for wait in waits:
            wait.cancel()
