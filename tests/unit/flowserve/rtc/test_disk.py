"""The disk tier: what a folder of pages promises to those who share it, and to those who read it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from flowserve.rtc import RTC, PopulateState, metrics
from flowserve.rtc.disk import DiskTier
from flowserve.rtc.folder import ACCOUNT, TEMPORARY, PageFolder, prepare
from flowserve.rtc.pagefile import HEADER_BYTES, PageLost, Seal
from kvtransfer.layout import KVLayout
from tests.support.engine import BLOCK_TOKENS, FakeClock, PageStore, tokens_of

LAYOUT = KVLayout("disk@1", "float16", BLOCK_TOKENS, layers=1, kv_heads=1, head_dim=2)
FILE = 4096  # what a page of these tests takes on the disk


def page(number: int) -> bytes:
    return bytes([number % 256]) * LAYOUT.block_bytes


def identity(number: int) -> bytes:
    return number.to_bytes(16, "big")


def opened(folder: Path, pages: int = 8, token: str = "", layout: KVLayout = LAYOUT) -> PageFolder:
    made = PageFolder(folder, pages * FILE, Seal.of(layout, token))
    made.scan()
    return made


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.kv"))


def until(met: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.005)


# -- one file ----------------------------------------------------------------------------------------


def test_a_page_comes_back_as_it_was(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    assert folder.write(identity(1), page(1)) == []
    assert bytes(folder.read(identity(1))) == page(1)
    assert folder.scan() == [identity(1)]
    with pytest.raises(PageLost) as missing:
        folder.read(identity(2))
    assert not missing.value.bad


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_changed_byte_and_no_torn_end_is_taken_for_a_page(tmp_path: Path, data: st.DataObject) -> None:
    folder = opened(tmp_path)
    folder.remove(identity(7))
    folder.write(identity(7), page(7))
    (path,) = files(tmp_path)
    content = bytearray(path.read_bytes())
    assert len(content) == HEADER_BYTES + LAYOUT.block_bytes
    if data.draw(st.booleans(), "torn"):
        content = content[: data.draw(st.integers(0, len(content) - 1), "at")]
    else:
        content[data.draw(st.integers(0, len(content) - 1), "at")] ^= data.draw(st.integers(1, 255), "by")
    path.write_bytes(content)
    with pytest.raises(PageLost) as lost:
        folder.read(identity(7))
    assert lost.value.bad


def test_a_page_under_anothers_name_is_none(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    folder.write(identity(1), page(1))
    (path,) = files(tmp_path)
    path.rename(path.with_name(identity(2).hex() + ".kv"))
    with pytest.raises(PageLost) as lost:
        folder.read(identity(2))
    assert lost.value.bad


def test_layouts_revisions_and_clusters_do_not_see_each_others_pages(tmp_path: Path) -> None:
    other = KVLayout("disk@2", "float16", BLOCK_TOKENS, layers=1, kv_heads=1, head_dim=2)
    wide = KVLayout("disk@1", "float32", BLOCK_TOKENS, layers=1, kv_heads=1, head_dim=2)
    opened(tmp_path, token="a").write(identity(1), page(1))
    assert opened(tmp_path, token="a").scan() == [identity(1)]
    assert opened(tmp_path, token="b").scan() == []
    assert opened(tmp_path, token="a", layout=other).scan() == []
    assert opened(tmp_path, token="a", layout=wide).scan() == []
    stolen = opened(tmp_path, token="b")
    (path,) = files(tmp_path)
    there = stolen._path(identity(1))
    there.parent.mkdir(parents=True)
    path.rename(there)
    with pytest.raises(PageLost):  # planted by somebody who does not know the cluster's token
        stolen.read(identity(1))


def test_a_page_is_not_followed_through_a_link(tmp_path: Path) -> None:
    folder = opened(tmp_path / "cache")
    folder.write(identity(1), page(1))
    (path,) = files(tmp_path)
    moved = path.rename(tmp_path / "elsewhere")
    path.symlink_to(moved)
    with pytest.raises(PageLost):
        folder.read(identity(1))


def test_a_folder_that_others_may_write_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(PermissionError, match="writable for nobody else"):
        prepare(tmp_path)


# -- the bound ---------------------------------------------------------------------------------------


def test_the_least_recently_read_page_goes_first(tmp_path: Path) -> None:
    folder = opened(tmp_path, pages=3)
    for number in range(3):
        folder.write(identity(number), page(number))
        os.utime(folder._path(identity(number)), (number + 1.0, number + 1.0))
    folder.scan()
    folder.read(identity(0))
    assert folder.write(identity(3), page(3)) == [identity(1)]
    assert folder.write(identity(4), page(4)) == [identity(2)]
    assert bytes(folder.read(identity(0))) == page(0)


@given(
    steps=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 9), st.sampled_from("wwwrxs")), max_size=60)
)
@settings(max_examples=40, deadline=None)
def test_two_who_share_a_folder_keep_its_bound_and_its_account(
    steps: list[tuple[int, int, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Each with its own, partly outdated, view of what is there."""
    path = tmp_path_factory.mktemp("shared")
    both = [opened(path, pages=4), opened(path, pages=4)]
    for who, number, what in steps:
        folder = both[who]
        if what == "w":
            folder.write(identity(number), page(number))
        elif what == "x":
            folder.remove(identity(number))
        elif what == "s":
            folder.scan()
        else:
            there = folder._path(identity(number)).exists()
            try:
                assert bytes(folder.read(identity(number))) == page(number) and there
            except PageLost:
                assert not there
        account = int.from_bytes((path / ACCOUNT).read_bytes()[:8], "little")
        assert account == FILE * len(files(path)) <= 4 * FILE


def test_what_a_killed_writer_left_is_counted_and_goes(tmp_path: Path) -> None:
    folder = opened(tmp_path, pages=2)
    folder.write(identity(1), page(1))
    (path,) = files(tmp_path)
    left = path.with_name(f"{TEMPORARY}123-0")
    left.write_bytes(page(9))
    again = opened(tmp_path, pages=2)
    assert again.used_bytes == 2 * FILE, "another may still be writing it"
    os.utime(left, (1.0, 1.0))
    again.scan()
    assert again.used_bytes == FILE and not left.exists()


def test_a_page_that_fits_nowhere_is_refused(tmp_path: Path) -> None:
    folder = PageFolder(tmp_path, FILE - 1, Seal.of(LAYOUT))
    assert not folder.takes_pages()
    with pytest.raises(OSError, match="no room"):
        folder.write(identity(1), page(1))
    assert files(tmp_path) == []


# -- the tier ----------------------------------------------------------------------------------------


def tier(path: Path, pages: int = 16, scan_seconds: float = 60.0) -> DiskTier:
    return DiskTier(path, pages * FILE, LAYOUT, scan_seconds=scan_seconds)


def rtc(path: Path, blocks: int = 4, host: int = 0, **options: float) -> tuple[RTC, PageStore, DiskTier]:
    store = PageStore(blocks)
    disk = DiskTier(path, 64 * FILE, store.layout, **options)  # type: ignore[arg-type]  # passed through
    cache = RTC(store, host_bytes=host * store.layout.block_bytes, disk=disk, clock=FakeClock())
    return cache, store, disk


def preserve(cache: RTC, store: PageStore, tokens: list[int]) -> None:
    """Computes the prompt's blocks, each filled with the first byte of its identity."""
    table = cache.alloc_blocks(len(tokens) // BLOCK_TOKENS)
    assert table is not None
    for block, name in zip(table, cache.identities(tokens), strict=True):
        store.store(block, name[:1] * store.layout.block_bytes)
        assert cache.commit(block, name)
    cache.free(table)


def evict_all(cache: RTC) -> None:
    table = cache.alloc_blocks(cache.num_blocks)
    assert table is not None
    cache.free(table)


def populated(cache: RTC, tokens: list[int]) -> tuple[PopulateState, list[int]]:
    match = cache.match_by_prefix_token(tokens)
    table = cache.alloc_blocks(0, match)
    assert table is not None
    done = threading.Event()
    ticket = cache.populate(match, table, done.set)
    assert done.wait(10)
    return cache.query_populate(ticket), table


def test_evicted_blocks_come_back_from_the_disk_and_after_a_restart(tmp_path: Path) -> None:
    cache, store, disk = rtc(tmp_path)
    tokens = tokens_of(1, 4 * BLOCK_TOKENS)
    preserve(cache, store, tokens)
    cache.take_changes()
    evict_all(cache)
    assert cache.take_changes() is None, "still reusable, from another tier"
    until(lambda: len(files(tmp_path)) == 4)
    cache.collect()
    assert not disk._pending and cache.take_changes() is None
    assert metrics.DISK_PENDING._value.get() == 0
    state, table = populated(cache, tokens)
    assert state is PopulateState.DONE
    names = cache.identities(tokens)
    assert [bytes(store.view(block, 1))[:1] for block in table] == [name[:1] for name in names]
    cache.free(table)
    cache.close()

    cache, store, disk = rtc(tmp_path)
    until(lambda: (cache.collect(), len(cache.match_by_prefix_token(tokens)) == 4)[1])
    changes = cache.take_changes()
    assert changes is not None and set(changes.stored) == set(names)
    assert set(cache.snapshot()[1]) == set(names)
    state, table = populated(cache, tokens)
    assert state is PopulateState.DONE
    assert [bytes(store.view(block, 1))[:1] for block in table] == [name[:1] for name in names]
    cache.close()


def test_what_is_in_memory_when_an_executor_stops_is_there_for_the_next(tmp_path: Path) -> None:
    cache, store, _ = rtc(tmp_path, blocks=4, host=2)
    old, new = tokens_of(1, 2 * BLOCK_TOKENS), tokens_of(2, 4 * BLOCK_TOKENS)
    preserve(cache, store, old)
    preserve(cache, store, new)  # pushes the other into host memory
    cache.close()
    assert len(files(tmp_path)) == 6
    cache.close()


def test_pages_that_host_memory_drops_go_to_the_disk(tmp_path: Path) -> None:
    cache, store, _ = rtc(tmp_path, blocks=4, host=1)
    tokens = tokens_of(1, 4 * BLOCK_TOKENS)
    preserve(cache, store, tokens)
    cache.take_changes()
    evict_all(cache)
    match = cache.match_by_prefix_token(tokens)
    assert len(match) == 4 and match.device_prefix().blocks == ()
    until(lambda: len(files(tmp_path)) == 3)
    cache.collect()
    assert cache.take_changes() is None and cache.host_bytes == store.layout.block_bytes
    state, table = populated(cache, tokens)
    assert state is PopulateState.DONE
    cache.free(table)
    cache.close()


def test_a_context_is_found_by_its_id_on_whatever_tier_its_blocks_are(tmp_path: Path) -> None:
    cache, store, _ = rtc(tmp_path, blocks=4, host=1)
    tokens = tokens_of(1, 4 * BLOCK_TOKENS)
    preserve(cache, store, tokens)
    cache.remember("doc", tokens)
    evict_all(cache)
    until(lambda: len(files(tmp_path)) == 3)
    cache.collect()
    found = cache.match_by_id("doc")
    assert len(found) == 4 and not found.on_device
    table = cache.alloc_blocks(0, found)
    done = threading.Event()
    ticket = cache.populate(found, table or [], done.set)
    assert done.wait(10) and cache.query_populate(ticket) is PopulateState.DONE
    assert cache.match_by_id("doc").on_device
    cache.close()


def test_a_bad_page_ends_the_match_before_it_and_is_removed(tmp_path: Path) -> None:
    cache, store, _ = rtc(tmp_path)
    tokens = tokens_of(1, 4 * BLOCK_TOKENS)
    preserve(cache, store, tokens)
    evict_all(cache)
    until(lambda: len(files(tmp_path)) == 4)
    cache.collect()
    cache.take_changes()
    bad = cache.identities(tokens)[2]
    (path,) = tmp_path.rglob(bad.hex() + ".kv")
    path.write_bytes(b"\0" * path.stat().st_size)
    state, table = populated(cache, tokens)
    assert state is PopulateState.FAILED
    cache.free(table)
    assert cache.audit([]).leaked == []
    changes = cache.take_changes()
    assert changes is not None and changes.removed == [bad]
    match = cache.match_by_prefix_token(tokens)
    assert len(match) == 2 and match.on_device, "what came before it is in place"
    until(lambda: not path.exists())
    cache.close()


def test_a_page_that_another_executor_evicted_is_a_miss(tmp_path: Path) -> None:
    cache, store, _ = rtc(tmp_path)
    tokens = tokens_of(1, 2 * BLOCK_TOKENS)
    preserve(cache, store, tokens)
    evict_all(cache)
    until(lambda: len(files(tmp_path)) == 2)
    cache.collect()
    for path in files(tmp_path):
        path.unlink()
    state, table = populated(cache, tokens)
    assert state is PopulateState.FAILED
    cache.free(table)
    assert len(cache.match_by_prefix_token(tokens)) == 0
    cache.close()


def test_executors_of_one_host_find_each_others_pages(tmp_path: Path) -> None:
    first, store, _ = rtc(tmp_path, scan_seconds=0.05)
    second, other, _ = rtc(tmp_path, scan_seconds=0.05)
    tokens = tokens_of(1, 4 * BLOCK_TOKENS)
    preserve(first, store, tokens)
    evict_all(first)
    until(lambda: (second.collect(), len(second.match_by_prefix_token(tokens)) == 4)[1])
    state, table = populated(second, tokens)
    assert state is PopulateState.DONE
    assert bytes(other.view(table[0], 1))[:1] == first.identities(tokens)[0][:1]
    changes = second.take_changes()
    assert changes is not None and len(changes.stored) == 4
    for path in files(tmp_path):
        path.unlink()
    second.free(table)
    first.close()
    second.close()


def test_a_slow_or_broken_disk_costs_pages_and_never_waits(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    disk = DiskTier(folder, 64 * FILE, LAYOUT, pending_bytes=2 * LAYOUT.block_bytes)
    disk._folder.write = lambda *_: (_ for _ in ()).throw(OSError("the disk is broken"))  # type: ignore[method-assign]
    until(lambda: not disk._working)
    kept = [disk.put(identity(number), page(number)) for number in range(20)]
    assert kept[0] and len(disk._pending) <= 2
    until(lambda: not disk._jobs and not disk._working)
    came, went = disk.collect()
    assert came == [] and set(went) <= {identity(number) for number in range(20)}
    assert list(disk) == []
    disk.close()


@given(steps=st.lists(st.tuples(st.integers(0, 5), st.sampled_from("pdcg")), max_size=40))
@settings(max_examples=30, deadline=None)
def test_what_comes_and_goes_adds_up_to_what_is_there(
    steps: list[tuple[int, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A follower of `put`, `drop` and `collect` holds exactly what the tier says it holds, at any time."""
    disk = DiskTier(tmp_path_factory.mktemp("tier"), 3 * FILE, LAYOUT, scan_seconds=0.01)
    follower: set[bytes] = set()

    def collect() -> None:
        came, went = disk.collect()
        assert not set(came) & follower and set(went) <= follower
        follower.update(came)
        follower.difference_update(went)

    for number, what in steps:
        name = identity(number)
        if what == "p":
            if disk.put(name, page(number)):
                follower.add(name)
        elif what == "d":
            assert disk.drop(name) == (name in follower)
            follower.discard(name)
        elif what == "c":
            collect()
        else:
            found = disk.get(name)
            assert (found is not None) == (name in follower)
            if isinstance(found, bytes):
                assert found == page(number)
        assert set(disk) == follower
    disk.close(seconds=5.0)
    collect()
    assert set(disk) == follower
