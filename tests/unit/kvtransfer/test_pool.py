"""Pools in memory files (needs Linux memfd)."""

from __future__ import annotations

import dataclasses
import gc
import mmap
import os
from collections.abc import Iterator

import numpy as np
import pytest

from kvtransfer.layout import KVLayout
from kvtransfer.pool import HostPool, PoolError

LAYOUT = KVLayout("m@1", "float32", block_tokens=16, layers=2, kv_heads=2, head_dim=8)


@pytest.fixture
def pool() -> Iterator[HostPool]:
    made = HostPool.create(LAYOUT, 10)
    yield made
    made.close()


def open_fds() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def test_an_attached_pool_sees_the_same_bytes_and_generations(pool: HostPool) -> None:
    peer = HostPool.attach(pool.fd, LAYOUT, 10)
    pool.store(3, bytes(range(256)) * (LAYOUT.block_bytes // 256))
    assert bytes(peer.view(3, 1)) == bytes(pool.view(3, 1)) == bytes(pool.load(3, 1))
    assert peer.generations_equal([3, 4], [0, 0])
    pool.bump(3)
    assert peer.generation(3) == 1
    assert not peer.generations_equal([3, 4], [0, 0])
    peer.close()


def test_peers_can_neither_write_nor_shrink(pool: HostPool) -> None:
    peer = HostPool.attach(pool.fd, LAYOUT, 10)
    assert peer.pages.readonly and not pool.pages.readonly
    with pytest.raises(TypeError):
        peer.bump(0)
    with pytest.raises(OSError, match="not permitted"):
        os.ftruncate(pool.fd, 4096)
    with pytest.raises(OSError, match="not permitted"):
        mmap.mmap(pool.fd, 4096)
    peer.close()


def test_closing_the_owner_retires_the_pool_for_peers(pool: HostPool) -> None:
    peer = HostPool.attach(pool.fd, LAYOUT, 10)
    pool.close()
    assert peer.retired
    assert peer.generation(0) == 1
    assert not peer.generations_equal([], [])
    peer.close()
    peer.close()


def test_memory_under_a_living_array_survives_close() -> None:
    pool = HostPool.create(LAYOUT, 4)
    pages = np.frombuffer(pool.pages, np.float32).reshape(4, *LAYOUT.shape)
    pool.close()
    pages[3] = 7.0
    assert pages[3].min() == 7.0


def test_pages_are_page_aligned(pool: HostPool) -> None:
    assert np.frombuffer(pool.pages, np.uint8).ctypes.data % mmap.PAGESIZE == 0
    assert len(pool.pages) == 10 * LAYOUT.block_bytes


def test_nothing_leaks() -> None:
    before = open_fds()
    for _ in range(20):
        pool = HostPool.create(LAYOUT, 10)
        peer = HostPool.attach(pool.fd, LAYOUT, 10)
        with pytest.raises(PoolError):
            HostPool.attach(pool.fd, LAYOUT, 999)
        peer.close()
        pool.close()
    del pool, peer
    assert open_fds() == before


def test_another_layout_or_file_is_not_attached(pool: HostPool) -> None:
    with pytest.raises(PoolError, match="header"):
        HostPool.attach(pool.fd, dataclasses.replace(LAYOUT, model_revision="m@2"), 10)
    with pytest.raises(PoolError, match="bytes"):
        HostPool.attach(pool.fd, LAYOUT, 20)
    with open("/proc/self/exe", "rb") as file, pytest.raises(PoolError):
        HostPool.attach(file.fileno(), LAYOUT, 10)


def test_an_unsealed_copy_is_not_attached(pool: HostPool) -> None:
    fd = os.memfd_create("fake")
    os.ftruncate(fd, os.fstat(pool.fd).st_size)
    with pytest.raises(PoolError, match="sealed"):
        HostPool.attach(fd, LAYOUT, 10)
    os.close(fd)


def test_ranges_are_checked(pool: HostPool) -> None:
    for start, count in ((-1, 1), (0, 11), (10, 1)):
        with pytest.raises(IndexError):
            pool.view(start, count)
    with pytest.raises(IndexError):
        pool.store(9, bytes(2 * LAYOUT.block_bytes))
    with pytest.raises(ValueError, match="whole blocks"):
        pool.store(0, b"abc")


def test_memory_that_cannot_be_had_is_a_typed_error() -> None:
    with pytest.raises(PoolError, match="cannot allocate"):
        HostPool.create(LAYOUT, 1 << 40)
