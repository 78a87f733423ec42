"""One KV page as a file: named by what it holds, believed only if its checksum says so.

Called by `flowserve.rtc.folder` alone. A file is written beside its place and renamed into it, so a
reader sees all of it or nothing; what a crash of the machine tears, or what somebody else wrote, does not
match the checksum and is no page. Not synced: a page that is lost costs a recompute, a sync costs more.

File:  magic | version | page bytes | namespace | identity | checksum | page
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import struct
from dataclasses import dataclass
from pathlib import Path

from kvtransfer.layout import KVLayout

Page = bytes | bytearray | memoryview

MAGIC = b"DFKVPAGE"
VERSION = 1
NAMESPACE_BYTES = 16
CHECKSUM_BYTES = 32
_HEADER = struct.Struct(f"<8sIQ{NAMESPACE_BYTES}s16s")  # magic, version, page bytes, namespace, identity
HEADER_BYTES = _HEADER.size + CHECKSUM_BYTES
MODE = 0o600
"""KV is made of prompts: nobody but the executor's user reads it."""


class PageLost(Exception):
    """There is no such page; `bad` = there was a file, which did not hold what its name says."""

    def __init__(self, message: str, *, bad: bool = False) -> None:
        super().__init__(message)
        self.bad = bad


@dataclass(frozen=True, slots=True)
class Seal:
    """What pages of one pool's layout are signed with: layout and model revision, and a secret.

    With the cluster's token as `key`, who can write files but does not know it can plant no KV.
    """

    namespace: bytes
    page_bytes: int
    key: bytes = b""

    @classmethod
    def of(cls, layout: KVLayout, token: str = "") -> Seal:
        key = hashlib.blake2b(token.encode(), digest_size=32, person=b"deepflow.page").digest()
        name = hashlib.blake2b(layout.digest(), digest_size=NAMESPACE_BYTES, key=key)
        return cls(name.digest(), layout.block_bytes, key)

    @property
    def folder(self) -> str:
        """Pages of another layout, revision or token are elsewhere: nobody takes them for broken."""
        return self.namespace.hex()

    def header(self, identity: bytes) -> bytes:
        return _HEADER.pack(MAGIC, VERSION, self.page_bytes, self.namespace, identity)

    def checksum(self, identity: bytes, page: Page) -> bytes:
        digest = hashlib.blake2b(self.header(identity), digest_size=CHECKSUM_BYTES, key=self.key)
        digest.update(page)
        return digest.digest()


def write_page(path: Path, temporary: Path, seal: Seal, identity: bytes, page: Page) -> None:
    """Raises OSError, ValueError for a page of the wrong size; then nothing is left but what was there."""
    if len(page) != seal.page_bytes:
        raise ValueError(f"a page has {seal.page_bytes} bytes, not {len(page)}")
    parts = [seal.header(identity), seal.checksum(identity, page), page]
    size = sum(map(len, parts))
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, MODE)
    try:
        try:
            written = os.writev(descriptor, parts)
        finally:
            os.close(descriptor)
        if written != size:  # a full disk writes a part before it refuses
            raise OSError(f"{written} of {size} bytes were written to {temporary}")
        temporary.rename(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def read_page(path: Path, seal: Seal, identity: bytes) -> bytearray:
    """The page, and its recency renewed. Raises PageLost."""
    page = bytearray(seal.page_bytes)
    head = bytearray(HEADER_BYTES)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise PageLost(f"{path}: {error}") from error
    try:
        if os.fstat(descriptor).st_size != HEADER_BYTES + seal.page_bytes:
            raise PageLost(f"{path} is torn", bad=True)
        if os.readv(descriptor, [head, page]) != HEADER_BYTES + seal.page_bytes:
            raise PageLost(f"{path} became shorter", bad=True)
        header, checksum = bytes(head[: _HEADER.size]), bytes(head[_HEADER.size :])
        if header != seal.header(identity):
            raise PageLost(f"{path} holds another page", bad=True)
        if not hmac.compare_digest(checksum, seal.checksum(identity, page)):
            raise PageLost(f"{path}: the checksum does not match", bad=True)
        with contextlib.suppress(OSError):
            os.utime(descriptor)
    except OSError as error:
        raise PageLost(f"{path}: {error}") from error
    finally:
        os.close(descriptor)
    return page
