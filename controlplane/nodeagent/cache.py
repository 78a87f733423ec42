"""The node's model cache: one folder per URI, published by one rename, described by a manifest.

    <cache>/models/<key>/manifest.json    what lies here: digest, sizes, times
    <cache>/models/<key>/content/...      the files
    <cache>/models/<key>.partial/         a fetch under way, or what is left of a torn one
    <cache>/models/<key>.lock             held while a process fetches (single-flight)

An entry exists only once it is whole and verified. Afterwards a file whose size and modification
time still equal the manifest's is trusted; any other is hashed again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

HASH_CHUNK = 4 << 20  # bytes; large enough that hashing is bound by the hash, not by calls
LOCK_POLL_SECONDS = 0.1


def cache_root() -> Path:
    """$DEEPFLOW_CACHE, or the user's cache folder."""
    configured = os.environ.get("DEEPFLOW_CACHE")
    if configured:
        return Path(configured).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "deepflow"


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file as it was when it was verified."""

    size: int
    mtime_ns: int
    sha256: str


@dataclass(slots=True)
class Manifest:
    """What a cache entry holds. `primary` is what `fetch` returns, relative to `base`."""

    uri: str
    sha256: str
    bytes: int
    primary: str  # "" = the folder itself
    files: dict[str, FileEntry] = field(default_factory=dict)

    def dump(self) -> str:
        files = {name: [entry.size, entry.mtime_ns, entry.sha256] for name, entry in self.files.items()}
        value = {"uri": self.uri, "sha256": self.sha256, "bytes": self.bytes, "primary": self.primary}
        return json.dumps({**value, "files": files}, indent=1, sort_keys=True)

    @classmethod
    def load(cls, path: Path) -> Manifest | None:
        """The manifest at `path`, or None when absent or unreadable (then the entry is refetched)."""
        try:
            raw = json.loads(path.read_text())
            files = {name: FileEntry(*entry) for name, entry in raw["files"].items()}
            return cls(raw["uri"], raw["sha256"], int(raw["bytes"]), raw["primary"], files)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None


def hash_file(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file, hex. `on_bytes` is told the bytes read so far."""
    digest, done = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(HASH_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            if on_bytes is not None:
                on_bytes(done)
    return digest.hexdigest()


def describe(base: Path, uri: str, primary: str, on_bytes: Callable[[int], None] | None = None) -> Manifest:
    """Hashes everything under `base` (or `base` itself when it is a file).

    The digest of a folder is the SHA-256 over its sorted `sha256  relative/path` lines.
    """
    if base.is_file():
        entry = _entry(base, hash_file(base, on_bytes))
        return Manifest(uri, entry.sha256, entry.size, primary, {"": entry})
    files: dict[str, FileEntry] = {}
    done = 0
    for path in sorted(path for path in base.rglob("*") if path.is_file()):
        entry = _entry(path, hash_file(path, on_bytes and partial(_add, on_bytes, done)))
        files[path.relative_to(base).as_posix()] = entry
        done += entry.size
    if primary:
        chosen = files[primary]
        return Manifest(uri, chosen.sha256, chosen.size, primary, files)
    lines = "".join(f"{entry.sha256}  {name}\n" for name, entry in sorted(files.items()))
    return Manifest(uri, hashlib.sha256(lines.encode()).hexdigest(), done, "", files)


def _add(on_bytes: Callable[[int], None], before: int, now: int) -> None:
    on_bytes(before + now)


def unchanged(base: Path, manifest: Manifest) -> bool:
    """Whether every file under `base` still is what the manifest says (cheap for untouched files)."""
    for name, entry in manifest.files.items():
        path = base / name if name else base
        try:
            stat = path.stat()
        except OSError:
            return False
        if stat.st_size != entry.size:
            return False
        if stat.st_mtime_ns != entry.mtime_ns and hash_file(path) != entry.sha256:
            return False
    return bool(manifest.files)


def _entry(path: Path, sha256: str) -> FileEntry:
    stat = path.stat()
    return FileEntry(stat.st_size, stat.st_mtime_ns, sha256)


@dataclass(frozen=True, slots=True)
class CacheSlot:
    """The paths of one URI's entry."""

    root: Path
    key: str

    @property
    def entry(self) -> Path:
        return self.root / "models" / self.key

    @property
    def manifest_path(self) -> Path:
        return self.entry / "manifest.json"

    @property
    def content(self) -> Path:
        return self.entry / "content"

    @property
    def partial(self) -> Path:
        return self.root / "models" / f"{self.key}.partial"

    @property
    def lock_path(self) -> Path:
        return self.root / "models" / f"{self.key}.lock"

    def prepare(self) -> None:
        self.entry.parent.mkdir(parents=True, exist_ok=True)

    def publish(self, manifest: Manifest) -> None:
        """Makes `partial` (holding `content/`) the entry. Readers see the old entry, none, or the new one."""
        path = self.partial / "manifest.json"
        with path.open("w") as file:
            file.write(manifest.dump())
            file.flush()
            os.fsync(file.fileno())
        self.discard()
        self.partial.rename(self.entry)

    def discard(self) -> None:
        shutil.rmtree(self.entry, ignore_errors=True)

    @contextlib.contextmanager
    def locked(self, timeout: float, on_wait: Callable[[], None]) -> Iterator[None]:
        """Holds the entry's lock across processes. Raises TimeoutError after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        with self.lock_path.open("a") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        raise TimeoutError(f"another process holds {self.lock_path}") from None
                    on_wait()
                    time.sleep(LOCK_POLL_SECONDS)
            yield  # closing the file gives the lock back
