"""A folder of KV pages that is bounded in bytes however many executors of a host write to it.

Called by `flowserve.rtc.disk`. Whoever writes or evicts holds the folder's lock and keeps its account (bytes
and a count of changes, 16 bytes in the locked file): bytes are entered before a file is written and taken off
after one is gone, so a process killed in between makes the account too large, never too small, and the
bound holds. Opening the folder counts anew. Pages go least recently used first, by their files' times: a
read renews them, so what another executor uses stays.

Tree:  folder / account · folder / <namespace> / <first byte of the identity> / <identity>.kv
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import struct
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from flowserve.rtc.pagefile import HEADER_BYTES, Page, Seal, read_page, write_page

ACCOUNT = "account"
_ACCOUNT = struct.Struct("<QQ")  # bytes, changes
SUFFIX = ".kv"
TEMPORARY = ".tmp-"
TEMPORARY_SECONDS = 60.0
"""A temporary file this old was left by a process that died while it wrote a page (ours)."""
FILE_BYTES = 4096
"""Files take whole blocks of a file system: the bound counts them."""
MAX_PAGES = 131_072
"""Pages of a folder (ours): their identities, told to a gateway at once, are 2 MiB."""
LOCK_SECONDS = 1.0
"""Longest wait for the lock (ours): a stopped process may hold it."""
LOCK_POLL_SECONDS = 0.005
FOLDER_MODE = 0o700


class FolderBusy(OSError):
    """Another process holds the lock for too long."""


@dataclass(frozen=True, slots=True)
class _File:
    size: int  # bytes on the disk
    used: float  # file time


def on_disk(size: int) -> int:
    """Bytes that a file of `size` takes."""
    return -(-size // FILE_BYTES) * FILE_BYTES


def prepare(folder: Path) -> None:
    """Makes the folder. Raises OSError where it cannot be used, or is not this user's own."""
    folder.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise PermissionError(f"{folder} must belong to this user and be writable for nobody else")
    descriptor = os.open(folder / ACCOUNT, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    os.close(descriptor)


class PageFolder:
    """One process's view. `read` from any thread; all else from one thread."""

    def __init__(
        self,
        folder: Path,
        capacity_bytes: int,
        seal: Seal,
        *,
        max_pages: int = MAX_PAGES,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`clock` is the one of file times. Raises OSError where the folder cannot be used."""
        prepare(folder)
        self._folder = folder
        self._capacity = capacity_bytes
        self._max_pages = max_pages
        self._seal = seal
        self._clock = clock
        self._files: OrderedDict[Path, _File] = OrderedDict()  # least recently used first, as last counted
        self._changes = -1  # of the account, but for those by others since the last count
        self._bytes = 0
        self._names = itertools.count()

    @property
    def used_bytes(self) -> int:
        """Bytes of all namespaces, as last seen."""
        return self._bytes

    @property
    def page_bytes(self) -> int:
        """Bytes that a page takes in the folder."""
        return on_disk(HEADER_BYTES + self._seal.page_bytes)

    def takes_pages(self) -> bool:
        """Whether one page fits at all."""
        return self.page_bytes <= self._capacity

    def read(self, identity: bytes) -> bytearray:
        """Raises PageLost."""
        return read_page(self._path(identity), self._seal, identity)

    def write(self, identity: bytes, page: Page) -> list[bytes]:
        """Keeps the page; returns the identities of this namespace that had to go. Raises OSError."""
        path, size = self._path(identity), self.page_bytes
        with self._locked() as account:
            gone: list[bytes] = []
            if path.exists():  # another executor has written it
                return gone
            self._bytes = self._read(account)[0]
            counted = False
            while self._bytes + size > self._capacity or len(self._files) >= self._max_pages:
                if self._files:
                    evicted = self._evict(account)
                    gone += [] if evicted is None else [evicted]
                elif not counted:  # what fills it are others' pages
                    self._count(account)
                    counted = True
                else:
                    raise OSError(f"{self._folder} has no room for a page of {size} bytes")
            self._enter(account, size)
            try:
                path.parent.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
                temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{next(self._names)}")
                write_page(path, temporary, self._seal, identity, page)
            except BaseException:
                self._enter(account, -size)
                raise
            self._files[path] = _File(size, self._clock())
            return gone

    def remove(self, identity: bytes) -> None:
        """Takes a page away, if it is there. Raises OSError."""
        path = self._path(identity)
        with self._locked() as account:
            self._files.pop(path, None)
            with contextlib.suppress(FileNotFoundError):
                size = on_disk(path.stat(follow_symlinks=False).st_size)
                path.unlink()
                self._enter(account, -size)

    def changed(self) -> bool:
        """Whether another process wrote or evicted since this one counted. Raises OSError."""
        record = (self._folder / ACCOUNT).read_bytes()
        return len(record) != _ACCOUNT.size or _ACCOUNT.unpack(record)[1] != self._changes

    def scan(self) -> list[bytes]:
        """Counts anew; the identities of this namespace. Raises OSError."""
        with self._locked() as account:
            self._count(account)
        folder = self._folder / self._seal.folder
        return [
            bytes.fromhex(path.stem)
            for path in self._files
            if path.parent.parent == folder and _is_identity(path.stem)
        ]

    # -- inside ----------------------------------------------------------------------------------

    def _path(self, identity: bytes) -> Path:
        name = identity.hex()
        return self._folder / self._seal.folder / name[:2] / (name + SUFFIX)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        """The account's descriptor, under the folder's lock. Raises FolderBusy."""
        account = os.open(
            self._folder / ACCOUNT, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
        )
        try:
            deadline = time.monotonic() + LOCK_SECONDS
            while True:
                try:
                    fcntl.flock(account, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        raise FolderBusy(f"{self._folder} is locked by another process") from None
                    time.sleep(LOCK_POLL_SECONDS)
            yield account
        finally:
            os.close(account)  # and so unlocked

    def _read(self, account: int) -> tuple[int, int]:
        """(bytes, changes). Under the lock."""
        record = os.pread(account, _ACCOUNT.size, 0)
        if len(record) != _ACCOUNT.size:
            self._count(account)
            record = os.pread(account, _ACCOUNT.size, 0)
        size, changes = _ACCOUNT.unpack(record)
        return size, changes

    def _enter(self, account: int, size: int) -> None:
        """Adds to the account. Under the lock."""
        known, changes = self._read(account)
        self._bytes = max(0, known + size)
        self._changes += 1
        os.pwrite(account, _ACCOUNT.pack(self._bytes, changes + 1), 0)

    def _count(self, account: int) -> None:
        """Looks at every file, removes what killed writers left, writes the account. Under the lock."""
        found: list[tuple[Path, _File]] = []
        total = 0
        for entry in _files_in(self._folder):
            try:
                stat = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            size = on_disk(stat.st_size)
            if entry.name.endswith(SUFFIX):
                found.append((Path(entry.path), _File(size, stat.st_mtime)))
            elif entry.name.startswith(TEMPORARY) and self._clock() - stat.st_mtime > TEMPORARY_SECONDS:
                os.unlink(entry.path)
                continue
            total += size
        found.sort(key=lambda item: item[1].used)
        self._files = OrderedDict(found)
        record = os.pread(account, _ACCOUNT.size, 0)
        known = _ACCOUNT.unpack(record)[1] if len(record) == _ACCOUNT.size else 0
        self._bytes, self._changes = total, known
        os.pwrite(account, _ACCOUNT.pack(total, known), 0)

    def _evict(self, account: int) -> bytes | None:
        """Removes the least recently used page; its identity, if it was of this namespace."""
        path, known = self._files.popitem(last=False)
        mine = path.parent.parent.name == self._seal.folder and _is_identity(path.stem)
        try:
            used = path.stat(follow_symlinks=False).st_mtime
            if used > known.used:  # somebody read it since: not the oldest any more
                self._files[path] = _File(known.size, used)
                return None
            path.unlink()
        except FileNotFoundError:  # another executor evicted it, and took it off the account
            pass
        else:
            self._enter(account, -known.size)
        return bytes.fromhex(path.stem) if mine else None


def _is_identity(name: str) -> bool:
    return len(name) == 32 and all(letter in "0123456789abcdef" for letter in name)


def _files_in(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Files two folders below; folders that vanish meanwhile are passed over."""
    for depth_one in _folders(folder):
        for depth_two in _folders(depth_one):
            with contextlib.suppress(FileNotFoundError), os.scandir(depth_two) as entries:
                yield from (entry for entry in entries if entry.is_file(follow_symlinks=False))


def _folders(folder: str | Path) -> list[str]:
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        return [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
    return []
