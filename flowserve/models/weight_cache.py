"""The node's weight cache: weights in the form a device computes with, one copy that every executor maps.

Called by `flowserve.executor.local` (a source that knows the cache) and by the models that keep their
weights there. The folder lies in memory (tmpfs); who starts executors names it and its bound (DeepServe,
section 6.2: weights are pre-loaded into host memory and shared).

    <folder>/sources/<identity>.json      of a model file as it lay there (path, size, times): the digest of
                                          its content, and its shape, so that a hot start reads no storage
    <folder>/<content>-<form>/weights     an image: the bytes of one form, mapped read-only
    <folder>/<content>-<form>/seal.json   the image file as it was published; one without it is torn
    <folder>/<content>-<form>/uses.json   uses, halved every hour: the least needed image goes first
    <folder>/.building-<nn>               locks: one process converts a model, the others wait for its image
    <folder>/.draft-*                     conversions under way, locked as long as their process lives
    <folder>/.reserve/weights             memory set aside for the next image, zeroed
    <folder>/.account                     lock of those who add or evict

An image is referenced by a shared lock on its file, so the system counts, crashes included. A process may
not change a published image; one whose file is not as it was published is removed and made again.

Where other executors have an image it comes from them (`Feed`; DeepServe, section 6.3: fork), and only then
is storage read. What they say of a model counts for this start alone: the file here, if there is one, is
noted when it was read.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import logging
import math
import mmap
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from prometheus_client import Counter, Gauge

from flowserve.models.config import ModelConfig, RopeScaling
from flowserve.models.loader import open_model
from flowserve.models.weights import WeightSource
from kvtransfer.images import BLOCK_BYTES
from kvtransfer.native import populate_read, protect

log = logging.getLogger(__name__)

FORMAT = 2
"""Of the folder's files: another one starts anew."""
HALF_LIFE_SECONDS = 3600.0
"""What was used an hour ago counts half (ours: models that are woken daily lose to those used hourly)."""
BUILD_SECONDS = 1800.0
"""Longest wait for another process's conversion; then this one converts for itself."""
LOCK_POLL_SECONDS = 0.01
MAX_SOURCES = 256
"""Model files of a node that are remembered (ours); the oldest notes go first."""
HASH_CHUNK = 4 << 20
FOLDER_MODE = 0o700
RESERVE = ".reserve"
_POPULATED = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
"""All pages are mapped in one go, which takes a fraction of as many faults."""

LOOKUPS = Counter(
    "deepflow_te_weight_cache_lookups",
    "Weights asked of the node's cache: `hit`, `built` here, `forked` from another executor, `waited` for"
    " another's, `private` (no room).",
    ("result",),
)
HELD = Gauge("deepflow_te_weight_cache_bytes", "Bytes in the node's weight cache when last looked at.")
EVICTIONS = Counter("deepflow_te_weight_cache_evictions", "Images removed for others.")
TORN = Counter("deepflow_te_weight_cache_torn", "Images that were not as they were published, and removed.")


class NoRoom(Exception):
    """The image does not fit the cache's bound or the node's memory."""


class FeedLost(Exception):
    """No executor can feed the image (any more): storage has to serve."""


class Feed(Protocol):
    """An image that other executors have. On the thread that loads."""

    content: str
    form: str
    size: int  # bytes of the image's file
    config: bytes  # as `config_bytes` writes it

    def fill(self, mapping: mmap.mmap, fd: int) -> None:
        """Writes the image to shared memory of `size` bytes, the file `fd`. Raises FeedLost."""
        ...


@dataclass(frozen=True, slots=True)
class Named:
    """An image in this cache, as others can ask for it."""

    content: str
    form: str
    size: int  # bytes of its file
    config: bytes


@dataclass(frozen=True, slots=True)
class _Seal:
    """A file as it was when it was published."""

    format: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, stat: os.stat_result) -> _Seal:
        return cls(FORMAT, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


class Image:
    """A mapped image. The memory stays until `close`; nobody may write to it."""

    def __init__(self, mapping: mmap.mmap, fd: int, size: int, result: str) -> None:
        self._mapping, self.fd = mapping, fd
        self.size = size
        self.result = result  # "hit" | "built" | "forked" | "waited"
        self.base = _address(mapping)

    def tensor(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A view of the image, valid until `close`. Writing to it ends the process (read-only memory)."""
        count = 1
        for length in shape:
            count *= length
        memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(self.base + offset)
        return torch.frombuffer(memory, dtype=dtype).view(shape)

    def close(self) -> None:
        """Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)  # the lock goes with it
            self.fd = -1
            with contextlib.suppress(BufferError):  # others are being fed out of it: it goes with them
                self._mapping.close()


class WeightCache:
    """One process's view of the folder. From any thread."""

    def __init__(self, folder: Path, max_bytes: int, *, clock: Callable[[], float] = time.time) -> None:
        """`clock` is that of the uses. Raises OSError where the folder cannot be used, or is not ours."""
        self._folder, self._max_bytes, self._clock = folder, max_bytes, clock
        folder.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
        found = folder.stat()
        if found.st_uid != os.geteuid() or found.st_mode & 0o022:
            raise PermissionError(f"{folder} must belong to this user and be writable for nobody else")
        (folder / "sources").mkdir(mode=FOLDER_MODE, exist_ok=True)

    def open(self, path: str | Path, feed: Feed | None = None) -> CachedSource:
        """The weight source at `path`, whose image `feed` may have: then nothing needs to lie there. Raises
        ModelNotFound, UnsupportedModel, BadWeights."""
        return CachedSource(self, Path(path), feed)

    def opened(self, named: Named) -> int | None:
        """A descriptor of an image's file that keeps it from being evicted; None where there is none."""
        found = self._sealed(self._folder / f"{named.content}-{named.form}")
        return None if found is None else found[0]

    def reserve(self, size: int) -> None:
        """Sets `size` bytes of memory aside for the next image, taken and zeroed, where there is room beside
        what is held and none are set aside: an image is then made without waiting for memory. Blocks."""
        if (self._folder / RESERVE).exists():
            return
        with contextlib.suppress(NoRoom, OSError), self._draft(whole_blocks(size), evict=False) as draft:
            draft.folder.rename(self._folder / RESERVE)

    def image(self, source: CachedSource, form: str, size: int, fill: Callable[[int], None]) -> Image | None:
        """The image of `source` in `form`, `size` bytes; where there is none, `fill(address)` makes it in
        zeroed memory. `form` names everything that the bytes depend on beside the model's content.

        None where there is no room for it: the caller then keeps its weights to itself. What `fill` raises
        passes through, and nothing of it stays.
        """
        if (image := self._published(source, form, "hit")) is None:
            try:
                with self._building(source, form):
                    image = (
                        self._published(source, form, "waited")
                        or self._receive(source, form, size)
                        or self._build(source, form, size, fill)
                    )
            except (NoRoom, OSError) as error:
                log.warning("weights of %s are kept in this process alone: %s", source.path, error)
                image = None
        source.used = image.result if image is not None else "private"
        if image is not None and (content := source.recalled()) is not None:
            source.named = Named(content, form, image.size, config_bytes(source.config))
        LOOKUPS.labels(source.used).inc()
        return image

    # -- finding ---------------------------------------------------------------------------------

    def _published(self, source: CachedSource, form: str, result: str) -> Image | None:
        content = source.recalled()
        if content is None:
            return None
        folder = self._folder / f"{content}-{form}"
        image = self._map(folder, result)
        if image is not None:
            self._use(folder)
        return image

    def _map(self, folder: Path, result: str) -> Image | None:
        """The image in `folder`, None where there is none (any more)."""
        found = self._sealed(folder)
        if found is None:
            return None
        fd, size = found
        try:
            mapping = mmap.mmap(fd, size, _POPULATED, mmap.PROT_READ)
        except BaseException:
            os.close(fd)
            raise
        return Image(mapping, fd, size, result)

    @staticmethod
    def _sealed(folder: Path) -> tuple[int, int] | None:
        """The file of the image in `folder`, locked against removal, and its size; None where there is none
        (any more)."""
        try:
            fd = os.open(folder / "weights", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_SH)  # nobody holds it alone for longer than a removal takes
            stat = os.fstat(fd)
            if stat.st_nlink == 0:  # evicted in between
                os.close(fd)
                return None
            sealed = _read(folder / "seal.json")
            if sealed != asdict(_Seal.of(stat)) or stat.st_size == 0:
                log.error("%s is not as it was published: removed", folder)
                TORN.inc()
                os.close(fd)
                shutil.rmtree(folder, ignore_errors=True)
                return None
        except BaseException:
            with contextlib.suppress(OSError):
                os.close(fd)
            raise
        return fd, stat.st_size

    def _use(self, folder: Path) -> None:
        now = self._clock()
        with contextlib.suppress(OSError):  # a count that is lost costs an eviction at most
            _write(folder / "uses.json", {"uses": self._uses(folder, now) + 1.0, "at": now})

    @staticmethod
    def _uses(folder: Path, now: float) -> float:
        """Uses of an image, halved every HALF_LIFE_SECONDS."""
        found = _read(folder / "uses.json") or {}
        try:
            age = max(0.0, now - float(found["at"]))
            return float(found["uses"]) * math.pow(0.5, age / HALF_LIFE_SECONDS)
        except (KeyError, TypeError, ValueError):
            return 0.0

    # -- making ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _building(self, source: CachedSource, form: str) -> Iterator[None]:
        """Alone, or after BUILD_SECONDS not alone."""
        with _locked(self._folder / f".building-{source.identity[:2]}", BUILD_SECONDS):
            yield

    def _build(self, source: CachedSource, form: str, size: int, fill: Callable[[int], None]) -> Image:
        """Raises NoRoom, OSError, and what `fill` raises."""
        digest = _Background(source.digest)  # reads what the conversion reads: one pass over storage
        try:
            with self._draft(whole_blocks(size)) as draft:
                fill(_address(draft.mapping))
                content = digest.result()
                image = self._publish(draft, content, form, "built")
        finally:
            digest.join()
        source.know(content)
        image = image or self._published(source, form, "built")
        if image is None:
            raise NoRoom("its image was removed at once")
        return image

    def _receive(self, source: CachedSource, form: str, size: int) -> Image | None:
        """The image from other executors; None where they have none of this form, or cannot finish. Raises
        NoRoom, OSError."""
        feed = source.feed
        if feed is None:
            return None
        if (feed.form, feed.size) != (form, whole_blocks(size)):
            log.warning("weights of %s are fed as %s, needed as %s", source.path, feed.form, form)
            return None
        try:
            with self._draft(feed.size) as draft:
                feed.fill(draft.mapping, draft.fd)
                image = self._publish(draft, feed.content, form, "forked")
        except FeedLost as lost:
            log.warning("weights of %s come from storage: %s", source.path, lost)
            source.feed = None
            return None
        return image or self._published(source, form, "forked")

    @contextlib.contextmanager
    def _draft(self, size: int, *, evict: bool = True) -> Iterator[_Draft]:
        """An image in the making, `size` bytes of zeros; gone afterwards unless it was published. Raises
        NoRoom, OSError."""
        folder = self._folder / f".draft-{os.getpid()}-{secrets.token_hex(4)}"
        try:
            fd = self._reserved(folder, size) if evict else None
            if fd is None:
                folder.mkdir(mode=FOLDER_MODE)
                fd = os.open(folder / "weights", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                fresh = True
            else:
                fresh = False
            draft = None
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
                if fresh:
                    self._make_room(fd, size, evict=evict)
                draft = _Draft(folder, fd, mmap.mmap(fd, size))
                populate_read(memoryview(draft.mapping))
                yield draft
            finally:
                if draft is None or not draft.published:
                    if draft is not None:
                        with contextlib.suppress(BufferError):  # others are being fed out of it
                            draft.mapping.close()
                    fcntl.flock(fd, fcntl.LOCK_UN)  # a mapping that lives has a descriptor of its own
                    os.close(fd)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _reserved(self, folder: Path, size: int) -> int | None:
        """The memory that was set aside, as a draft in `folder`; None where it is too small, or not there."""
        try:
            fd = os.open(self._folder / RESERVE / "weights", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(fd).st_size < size:
                raise OSError(errno.ENOSPC, "too small")
            (self._folder / RESERVE).rename(folder)
            os.ftruncate(fd, size)
        except OSError:
            os.close(fd)
            return None
        return fd

    def _publish(self, draft: _Draft, content: str, form: str, result: str) -> Image | None:
        """Makes it an image that nobody may change, mapped; None where the same content, from another path,
        is there already."""
        os.fchmod(draft.fd, 0o400)
        final = self._folder / f"{content}-{form}"
        try:
            draft.folder.rename(final)
        except OSError:
            return None
        _write(final / "seal.json", asdict(_Seal.of(os.fstat(draft.fd))))
        protect(memoryview(draft.mapping))
        fcntl.flock(draft.fd, fcntl.LOCK_SH)  # whoever waited for the draft maps it now
        draft.published = True
        self._use(final)
        return Image(draft.mapping, draft.fd, len(draft.mapping), result)

    def _make_room(self, fd: int, size: int, *, evict: bool) -> None:
        """Evicts what is needed least, if it may, until `size` bytes fit the bound, and takes them. Raises
        NoRoom."""
        with _locked(self._folder / ".account", BUILD_SECONDS):
            held = self._held()
            now = self._clock()
            if size > self._max_bytes:
                raise NoRoom(f"{size} bytes exceed the cache's {self._max_bytes}")
            for folder in sorted(held, key=lambda folder: self._uses(folder, now)):
                if sum(held.values()) + size <= self._max_bytes or not evict:
                    break
                if self._remove_unused(folder):
                    EVICTIONS.inc()
                    del held[folder]
            if sum(held.values()) + size > self._max_bytes:
                raise NoRoom(f"{size} bytes do not fit the cache's {self._max_bytes}: the rest is in use")
            try:
                os.posix_fallocate(fd, 0, size)  # memory is taken now: writing later cannot fail
            except OSError as error:
                raise NoRoom(f"{size} bytes: {error.strerror}") from error
            HELD.set(sum(held.values()) + size)

    def _held(self) -> dict[Path, int]:
        """Bytes by folder, drafts of running conversions included; what dead ones left is removed."""
        held: dict[Path, int] = {}
        for folder in self._folder.iterdir():
            file = folder / "weights"
            try:
                held[folder] = file.stat().st_blocks * 512
            except OSError:
                continue
            if folder.name.startswith(".draft-") and self._remove_unused(folder):
                del held[folder]
        return held

    @staticmethod
    def _remove_unused(folder: Path) -> bool:
        """Removes an image that nobody has mapped, or a draft that nobody writes; whether it is gone."""
        try:
            fd = os.open(folder / "weights", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return True
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (folder / "weights").unlink()  # before the lock goes: who waited for it sees that it is gone
            shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            return False
        finally:
            os.close(fd)
        return True

    # -- sources ---------------------------------------------------------------------------------

    def noted(self, identity: str) -> dict[str, Any] | None:
        return _read(self._folder / "sources" / f"{identity}.json")

    def note(self, identity: str, value: dict[str, Any]) -> None:
        folder = self._folder / "sources"
        with contextlib.suppress(OSError):  # a full folder: the next start asks again
            notes = sorted(folder.glob("*.json"), key=lambda file: file.stat().st_mtime)
            for file in notes[: len(notes) + 1 - MAX_SOURCES]:
                file.unlink(missing_ok=True)
            _write(folder / f"{identity}.json", value)


@dataclass(slots=True)
class _Draft:
    folder: Path
    fd: int
    mapping: mmap.mmap
    published: bool = False  # both are an image's now


class CachedSource:
    """A weight source that knows the cache. The file is opened when a tensor is first asked for."""

    def __init__(self, cache: WeightCache, path: Path, feed: Feed | None = None) -> None:
        """Raises ModelNotFound, UnsupportedModel, BadWeights where nothing is noted of the file, and nobody
        feeds it."""
        self.path = path
        self.feed = feed
        self.named: Named | None = None
        """The image that is mapped; None while, or where, there is none."""
        self._cache = cache
        self._opened: WeightSource | None = None
        self._opening = threading.Lock()
        self._files = _files(path)
        self.identity = _identity(self._files)
        self.content: str | None = None
        """Digest of the content, None while nobody on the node has read it."""
        self.used: str | None = None
        """What `LOOKUPS` counted last: "hit" where the weights lay in the node's memory."""
        noted = cache.noted(self.identity)
        config = None if noted is None else _config(noted)
        if config is not None and noted is not None:
            self._config, self.content = config, noted["content"]
        elif feed is not None and (config := read_config(feed.config)) is not None:
            self._config = config
        else:
            self.feed = None
            self._config = self._source().config

    @property
    def config(self) -> ModelConfig:
        return self._config

    def tensor(self, name: str) -> torch.Tensor:
        return self._source().tensor(name)

    def image(self, form: str, size: int, fill: Callable[[int], None]) -> Image | None:
        """See `WeightCache.image`."""
        return self._cache.image(self, form, size, fill)

    def recalled(self) -> str | None:
        """The content's digest as far as anybody on the node, or who feeds it, knows by now."""
        if self.content is None and (noted := self._cache.noted(self.identity)) is not None:
            self.content = noted["content"] if _config(noted) is not None else None
        if self.content is None and self.feed is not None:
            return self.feed.content
        return self.content

    def know(self, content: str) -> None:
        """Notes the content's digest for later starts on this node."""
        self.content = content
        self._cache.note(
            self.identity, {"format": FORMAT, "content": content, "config": asdict(self._config)}
        )

    def profile(self, name: str) -> int | None:
        """What `keep_profile` noted under `name` of this content; None where nobody on the node has."""
        content = self.recalled()
        noted = None if content is None else self._cache.noted(_profile(content, name))
        value = None if noted is None else noted.get("bytes")
        return value if isinstance(value, int) and value >= 0 else None

    def keep_profile(self, name: str, value: int) -> None:
        """Bytes, for later starts on this node."""
        if (content := self.recalled()) is not None:
            self._cache.note(_profile(content, name), {"format": FORMAT, "bytes": value})

    def digest(self) -> str:
        """SHA-256 over the files' contents in the order of their names, 32 hex digits of it."""
        if self.content is not None:
            return self.content
        digest = hashlib.sha256()
        for file in self._files:
            with file.open("rb", buffering=0) as opened:
                while chunk := opened.read(HASH_CHUNK):
                    digest.update(chunk)
        return digest.hexdigest()[:32]

    def _source(self) -> WeightSource:
        with self._opening:
            if self._opened is None:
                self._opened = open_model(self.path)
            return self._opened


class _Background:
    """A function's result, computed on a thread of its own."""

    def __init__(self, function: Callable[[], str]) -> None:
        self._function = function
        self._value: str | OSError = ""
        self._thread = threading.Thread(target=self._run, name="weights-digest", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._value = self._function()
        except OSError as error:
            self._value = error

    def join(self) -> None:
        self._thread.join()

    def result(self) -> str:
        """Raises the OSError that the function raised."""
        self._thread.join()
        if isinstance(self._value, OSError):
            raise self._value
        return self._value


def _files(path: Path) -> list[Path]:
    """What weights and shape are read from; empty where nothing is there."""
    path = path.resolve()
    if not path.is_dir():
        return [path] if path.exists() else []
    wanted = (".gguf", ".safetensors", ".json")
    return sorted(file for file in path.iterdir() if file.suffix in wanted and file.is_file())


def _identity(files: list[Path]) -> str:
    digest = hashlib.sha256(str(FORMAT).encode())
    for file in files:
        stat = file.stat()
        line = f"{file}\0{stat.st_size}\0{stat.st_mtime_ns}\0{stat.st_ctime_ns}\0{stat.st_ino}\n"
        digest.update(line.encode())
    return digest.hexdigest()[:32]


def _profile(content: str, name: str) -> str:
    return hashlib.sha256(f"{FORMAT}\0{content}\0{name}".encode()).hexdigest()[:32]


def _config(noted: dict[str, Any]) -> ModelConfig | None:
    """The shape noted of a source; None for what another version wrote."""
    if noted.get("format") != FORMAT or not isinstance(noted.get("content"), str):
        return None
    return _shape(noted.get("config"))


def config_bytes(config: ModelConfig) -> bytes:
    """A model's shape for another executor."""
    return json.dumps({"format": FORMAT, "config": asdict(config)}).encode()


def read_config(data: bytes) -> ModelConfig | None:
    """What `config_bytes` wrote; None for what another version wrote."""
    try:
        value = json.loads(data)
    except ValueError:
        return None
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        return None
    return _shape(value.get("config"))


def _shape(found: Any) -> ModelConfig | None:
    try:
        value = dict(found)
        scaling = value.pop("rope_scaling")
        value["eos_token_ids"] = tuple(value["eos_token_ids"])
        return ModelConfig(rope_scaling=None if scaling is None else RopeScaling(**scaling), **value)
    except (KeyError, TypeError, ValueError):
        return None


def whole_blocks(size: int) -> int:
    """Bytes of the file of an image of `size`: it can be fed."""
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


def _address(mapping: mmap.mmap) -> int:
    """Where a mapping lies; it must stay open while the address is used."""
    return int(np.frombuffer(mapping, np.uint8).ctypes.data)


@contextlib.contextmanager
def _locked(path: Path, seconds: float) -> Iterator[None]:
    """Holds an exclusive lock; after `seconds` of waiting goes on without it. Raises OSError."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    log.warning("%s was held for %.0f s: going on without it", path, seconds)
                    break
                time.sleep(LOCK_POLL_SECONDS)
        yield
    finally:
        os.close(fd)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _write(path: Path, value: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    temporary.write_text(json.dumps(value))
    temporary.replace(path)
