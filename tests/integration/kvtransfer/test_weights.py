"""Images of weights from executor to executor: over every transport, in a tree, and when sources fail."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY

from kvtransfer import weights
from kvtransfer.errors import TransferError, TransferErrorCode
from kvtransfer.images import BLOCK_BYTES, Description, Growing, Images, ImageStore, Pace
from kvtransfer.runs import Run
from kvtransfer.weights import WeightFetcher, WeightPeer
from tests.support.kv import SenderHost, receiving, serving

BLOCKS = 70  # more than a window
IMAGE = Description("c0ffee", "cpu1", BLOCKS * BLOCK_BYTES, b"{}")
CONTENT = random.Random(7).randbytes(IMAGE.size)


class Files:
    """The images of an executor: one file, or none."""

    def __init__(self, folder: Path | None) -> None:
        self.opens = 0
        self._path = None if folder is None else folder / "image"
        if self._path is not None and not self._path.exists():
            self._path.write_bytes(CONTENT)

    def described(self, revision: str) -> Description | None:
        return IMAGE if self._path is not None and revision == "model@1" else None

    def opened(self, image: Description) -> ImageStore | None:
        assert self._path is not None
        self.opens += 1
        return ImageStore.attach(image.name, os.open(self._path, os.O_RDONLY), image.size)


def images(folder: Path | None = None, *, rate: int = 0, **options: Any) -> Images:
    return Images(Files(folder), Pace(lambda: True, rate), **options)


def empty() -> ImageStore:
    fd = os.memfd_create("image")
    os.ftruncate(fd, IMAGE.size)
    return ImageStore(IMAGE.name, IMAGE.size, memoryview(mmap.mmap(fd, IMAGE.size)), fd)


def peer(host: SenderHost) -> WeightPeer:
    return WeightPeer(host.address, host.sender.te_id, host.sender.incarnation)


@contextlib.asynccontextmanager
async def fetching(shm_dir: Path | None = None, **options: Any) -> AsyncIterator[WeightFetcher]:
    async with receiving(shm_dir, **options) as (receiver, _):
        yield WeightFetcher(receiver)


async def fetched(
    fetcher: WeightFetcher, *hosts: SenderHost, then: Callable[[int], None] | None = None
) -> Any:
    """Fetches, and checks every byte."""
    store, reached = empty(), [0]

    def advance(blocks: int) -> None:
        assert blocks > reached[-1]
        assert store.pages[: blocks * BLOCK_BYTES] == CONTENT[: blocks * BLOCK_BYTES]
        reached.append(blocks)
        if then is not None:
            then(blocks)

    done = await fetcher.fetch([peer(host) for host in hosts], "model@1", IMAGE, store, advance)
    assert reached[-1] == BLOCKS and done.bytes == IMAGE.size
    return done


def value(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


@pytest.mark.parametrize("transport", ["shm", "unix", "tcp", "grpc"])
async def test_an_image_arrives_bit_exact(tmp_path: Path, transport: Any) -> None:
    before = value("deepflow_weights_fetched_bytes_total", transport=transport)
    held = images(tmp_path)
    async with (
        serving(tmp_path, images=held) as host,
        fetching(tmp_path, transports=transport, checksum=True) as fetcher,
    ):
        described = await fetcher.describe([peer(host)], "model@1")
        assert described.image == IMAGE
        done = await fetched(fetcher, host)
        assert (done.transport, done.sources) == (transport, ("te-p",))
        async with asyncio.timeout(5):  # the end of the stream is seen a moment later
            while held.active:
                await asyncio.sleep(0.01)
    assert value("deepflow_weights_fetched_bytes_total", transport=transport) - before == IMAGE.size
    assert value("deepflow_weights_feeds") == 0


async def test_what_arrives_is_fed_on_before_it_is_whole(tmp_path: Path) -> None:
    """A chain of three: the last one has blocks while the first still sends."""
    middle = images()
    async with (
        serving(tmp_path, images=images(tmp_path, rate=100 << 20)) as root,
        serving(tmp_path, images=middle, te_id="te-m", incarnation="m1") as relay,
        fetching(tmp_path) as first,
        fetching(tmp_path, te_id="te-e") as second,
    ):
        store = empty()
        growing = middle.grow("model@1", IMAGE, store)
        overlap: list[int] = []
        filling = asyncio.create_task(first.fetch([peer(root)], "model@1", IMAGE, store, growing.advance))
        await fetched(second, relay, then=lambda blocks: overlap.append(growing.ready))
        await filling
        assert overlap[0] < BLOCKS
        middle.end()


async def test_the_next_source_goes_on_where_one_was_lost(tmp_path: Path) -> None:
    before = value("deepflow_weights_fetches_total", outcome="resumed")
    dying, whole = images(), images(tmp_path)
    async with (
        serving(tmp_path, images=dying) as first,
        serving(tmp_path, images=whole, te_id="te-q", incarnation="q1") as second,
        fetching(tmp_path) as fetcher,
    ):
        store = empty()
        store.pages[:] = CONTENT
        growing: Growing = dying.grow("model@1", IMAGE, store)
        growing.advance(30)

        def then(blocks: int) -> None:
            if blocks == 30:
                dying.end()

        done = await fetched(fetcher, first, second, then=then)
        assert done.sources == ("te-p", "te-q")
    assert value("deepflow_weights_fetches_total", outcome="resumed") == before + 1


async def test_a_source_that_vanishes_is_left(tmp_path: Path) -> None:
    async with serving(tmp_path, images=images(tmp_path)) as whole, fetching(tmp_path) as fetcher:
        async with serving(tmp_path, images=images(tmp_path), te_id="te-q", incarnation="q1") as gone:
            pass
        done = await fetched(fetcher, gone, whole)
        assert done.sources == ("te-p",)
        with pytest.raises(TransferError) as failure:
            await fetcher.describe([peer(gone)], "model@1")
        assert failure.value.code is TransferErrorCode.PEER_LOST


async def test_more_receivers_than_the_bound_wait_their_turn(tmp_path: Path) -> None:
    refused = value("deepflow_kv_refused_total", what="feed")
    async with (
        serving(tmp_path, images=images(tmp_path, rate=400 << 20, max_feeds=1)) as host,
        fetching(tmp_path) as first,
        fetching(tmp_path, te_id="te-e") as second,
    ):
        await asyncio.gather(fetched(first, host), fetched(second, host))
    assert value("deepflow_kv_refused_total", what="feed") > refused


async def test_two_that_wait_for_each_other_give_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "STALL_SECONDS", 0.1)
    monkeypatch.setattr("kvtransfer.feeds.REPEAT_SECONDS", 0.05)
    stuck = images()
    async with serving(tmp_path, images=stuck) as host, fetching(tmp_path) as fetcher:
        stuck.grow("model@1", IMAGE, empty())
        with pytest.raises(TransferError) as failure:
            await fetcher.fetch([peer(host)], "model@1", IMAGE, empty(), lambda blocks: None)
        assert failure.value.code is TransferErrorCode.PEER_LOST


async def test_nobody_has_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "BUSY_SECONDS", 0.2)
    async with (
        serving(tmp_path, images=images(tmp_path)) as host,
        serving(tmp_path, te_id="te-q", incarnation="q1") as without,
        fetching(tmp_path) as fetcher,
    ):
        for hosts, revision in (([host], "other@1"), ([without], "model@1"), ([], "model@1")):
            peers = [peer(one) for one in hosts]
            with pytest.raises(TransferError) as failure:
                await fetcher.describe(peers, revision)
            assert failure.value.code is TransferErrorCode.NOT_CACHED
            with pytest.raises(TransferError):
                await fetcher.fetch(peers, revision, IMAGE, empty(), lambda blocks: None)
        other = Description("f00d", "cpu1", IMAGE.size, b"{}")
        with pytest.raises(TransferError) as failure:
            await fetcher.fetch([peer(host)], "model@1", other, empty(), lambda blocks: None)
        assert failure.value.code is TransferErrorCode.LAYOUT_MISMATCH


async def test_only_what_was_granted_may_be_read(tmp_path: Path) -> None:
    held = images(tmp_path)
    async with held.feeding("model@1", IMAGE.name, "r") as feed:
        feed.granted = 8
        assert held.check_read(IMAGE.name, "r", [Run(0, 8)], [0] * 8) is feed.store
        for receiver, runs, generations in (
            ("r", [Run(4, 5)], [0] * 5),
            ("other", [Run(0, 1)], [0]),
            ("r", [Run(0, 2)], [0]),
            ("r", [Run(0, 1)], [1]),
        ):
            with pytest.raises(TransferError):
                held.check_read(IMAGE.name, receiver, runs, generations)
    with pytest.raises(TransferError):
        held.check_read(IMAGE.name, "r", [Run(0, 1)], [0])


async def test_feeds_of_one_image_share_its_memory(tmp_path: Path) -> None:
    files = Files(tmp_path)
    held = Images(files, Pace(lambda: False, 0))
    async with held.feeding("model@1", IMAGE.name, "a") as a:
        async with held.feeding("model@1", IMAGE.name, "b") as b:
            assert a.store is b.store
        assert not a.store.retired
    assert a.store.retired and files.opens == 1 and held.store_of(IMAGE.name) is None


def test_the_pace_holds_only_while_tasks_run() -> None:
    now, busy = [0.0], [True]
    pace = Pace(lambda: busy[0], 100, lambda: now[0])
    assert [pace.delay(50), pace.delay(50), pace.delay(50)] == [0.0, 0.5, 1.0]
    now[0] = 10.0
    assert pace.delay(50) == 0.0
    busy[0] = False
    assert [pace.delay(5000), pace.delay(5000)] == [0.0, 0.0]
    with pytest.raises(ValueError, match="negative"):
        Pace(lambda: True, -1)


def test_an_image_has_whole_blocks() -> None:
    with pytest.raises(ValueError, match="whole blocks"):
        ImageStore("weights/x", BLOCK_BYTES + 1)
    store = ImageStore("weights/x", 2 * BLOCK_BYTES, memoryview(bytearray(2 * BLOCK_BYTES)))
    assert store.layout.block_bytes == BLOCK_BYTES
    with pytest.raises(IndexError):
        store.view(1, 2)
