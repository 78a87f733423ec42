"""The bytes of a `ReadChunk` message, built and parsed without protobuf's copies.

The wire is exactly that of protos/deepflow/v1/kvtransfer.proto; a peer with generated stubs reads
and writes the same. KV is copied once at each end instead of three times.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

_DATA_TAG = 0x0A  # field 1, length-delimited
_CRC_TAG = 0x10  # field 2, varint


@dataclass(frozen=True, slots=True)
class Frame:
    """One message of a Read: `data` lies in the received buffer."""

    data: memoryview
    crc32: int | None


def encode_frame(data: Sequence[memoryview], checksum: bool) -> bytes:
    """A serialized ReadChunk of the buffers' bytes: one copy, whose checksum is taken of that copy."""
    size = sum(map(len, data))
    frame = b"".join((bytes((_DATA_TAG,)), _varint(size), *data))
    if not checksum:
        return frame
    crc = zlib.crc32(memoryview(frame)[len(frame) - size :])
    return frame + bytes((_CRC_TAG,)) + _varint(crc) if crc else frame


def decode_frame(buffer: bytes) -> Frame:
    """Raises ValueError for bytes that are no ReadChunk. Unknown fields are skipped."""
    view = memoryview(buffer)
    data, crc = view[:0], None
    offset = 0
    try:
        while offset < len(view):
            tag, offset = _read_varint(view, offset)
            match tag & 7:
                case 0:
                    value, offset = _read_varint(view, offset)
                    if tag == _CRC_TAG:
                        crc = value
                case 2:
                    size, offset = _read_varint(view, offset)
                    if offset + size > len(view):
                        raise ValueError("a field is longer than its message")
                    if tag == _DATA_TAG:
                        data = view[offset : offset + size]
                    offset += size
                case 1:
                    offset += 8
                case 5:
                    offset += 4
                case wire:
                    raise ValueError(f"wire type {wire} is unknown")
    except IndexError as error:
        raise ValueError("the message is cut short") from error
    return Frame(data, crc)


def checksum_holds(frame: Frame) -> bool:
    """Whether the data is what the sender copied; a checksum of 0 is not on the wire (proto3)."""
    return zlib.crc32(frame.data) == (frame.crc32 or 0)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(view: memoryview, offset: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = view[offset]
        offset += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, offset
        shift += 7
        if shift > 63:
            raise ValueError("a varint is too long")
