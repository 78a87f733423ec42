"""What is said on a data socket, unix or TCP: a few fixed-size messages around plain bytes.

    sender   -> MAGIC, version, nonce                                  (37 bytes)
    receiver -> HMAC of the nonce, length, incarnation of the sender   (at most 290 bytes)
    sender   -> status, message
    then, as often as the receiver likes:
    receiver -> length, ReadRequest
    sender   -> status, message;  if it is OK, for each frame: its blocks' bytes, status, message

A frame is `frame_blocks` blocks, the last one fewer: both ends know every length beforehand, and the
bytes go from pool to pool without a copy between. The status behind a frame says whether its bytes
count: the sender compares generations after they left the pool. The cluster token itself never
travels. Every length that is read has a bound.
"""

from __future__ import annotations

import hashlib
import hmac
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

from kvtransfer.errors import TransferError, TransferErrorCode, code_of

MAGIC = b"DFKS"
STREAM_VERSION = 2
NONCE_BYTES = 32
GREETING = struct.Struct(f"<4sB{NONCE_BYTES}s")
HELLO = struct.Struct("<32sH")  # mac, bytes of the incarnation
STATUS = struct.Struct("<HHII52x")  # code (0 = OK), reserved, crc32 of the frame, bytes of the message
"""64 bytes, a whole cache line: what follows one of 12 lies askew in every page of the kernel's, and copying
it there costs the sender half as much again (0.37 CPU s/GiB beside 0.26)."""
LENGTH = struct.Struct("<I")
MAX_INCARNATION_BYTES = 256
MAX_MESSAGE_BYTES = 2048
MAX_REQUEST_BYTES = 8 << 20
"""A ReadRequest of 100,000 scattered blocks has about 2 MB."""
FRAME_BYTES = 4 << 20
"""Bytes between two statuses: below 2 ms of a loopback, so an end is seen soon; costs 64 bytes each."""
SOCKET_BUFFER_BYTES = 4 << 20
"""Of both directions, where the system allows as much: measured fastest over loopback."""


@dataclass(frozen=True, slots=True)
class Status:
    """End of one message: `code` None is OK. `crc32` is the frame's where the request asked for one."""

    code: TransferErrorCode | None = None
    message: str = ""
    crc32: int = 0

    def pack(self) -> bytes:
        message = self.message.encode()[:MAX_MESSAGE_BYTES]
        code = 0 if self.code is None else self.code.value
        return STATUS.pack(code, 0, self.crc32, len(message)) + message


def unpack_status(data: bytes | bytearray) -> tuple[Status, int]:
    """A status without its message, and the message's length. Raises ValueError beyond its bound."""
    number, _, crc, size = STATUS.unpack(data)
    if size > MAX_MESSAGE_BYTES:
        raise ValueError(f"a message of {size} bytes, {MAX_MESSAGE_BYTES} are the bound")
    return Status(code_of(number) if number else None, "", crc), size


def mac(token: str, nonce: bytes, incarnation: bytes) -> bytes:
    """Proof of the cluster token for one connection to one incarnation."""
    return hmac.digest(token.encode(), b"deepflow-kv-stream" + nonce + incarnation, hashlib.sha256)


def check_greeting(data: bytes) -> bytes:
    """The nonce of a greeting. Raises ValueError for another protocol or version."""
    magic, version, nonce = GREETING.unpack(data)
    if magic != MAGIC:
        raise ValueError("no KV sender answers there")
    if version != STREAM_VERSION:
        raise ValueError(f"version {version} is spoken there, {STREAM_VERSION} here")
    return bytes(nonce)


def frame_blocks(block_bytes: int) -> int:
    """Blocks of one frame."""
    return max(1, FRAME_BYTES // block_bytes)


def raise_for(status: Status) -> None:
    """Raises the TransferError that a status carries."""
    if status.code is not None:
        raise TransferError(status.code, status.message)


def tune(connection: socket.socket) -> None:
    """Buffers and delays of a data socket.

    A buffer that is set is not tuned by the kernel any more, so it is set only where it can be large.
    """
    if connection.family != socket.AF_UNIX:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, limit in ((socket.SO_SNDBUF, "wmem_max"), (socket.SO_RCVBUF, "rmem_max")):
        try:
            allowed = int(Path(f"/proc/sys/net/core/{limit}").read_text())
        except (OSError, ValueError):
            continue
        if allowed >= SOCKET_BUFFER_BYTES:
            connection.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)
