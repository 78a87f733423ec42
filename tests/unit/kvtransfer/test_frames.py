"""Hand-made frames are the protobuf wire (needs nothing)."""

from __future__ import annotations

import zlib

import pytest
from deepflow.v1 import kvtransfer_pb2 as pb
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.frames import checksum_holds, decode_frame, encode_frame


@given(st.binary(max_size=300), st.booleans())
def test_protobuf_reads_what_is_written(data: bytes, checksum: bool) -> None:
    message = pb.ReadChunk.FromString(encode_frame([memoryview(data)], checksum))
    assert message.data == data
    assert message.crc32 == (zlib.crc32(data) if checksum else 0)


@given(st.binary(max_size=300), st.integers(0, 2**32 - 1))
def test_what_protobuf_writes_is_read(data: bytes, crc: int) -> None:
    frame = decode_frame(pb.ReadChunk(data=data, crc32=crc).SerializeToString())
    assert bytes(frame.data) == data
    assert (frame.crc32 or 0) == crc


@given(st.binary(min_size=1, max_size=60))
def test_any_bytes_decode_or_raise_value_error(buffer: bytes) -> None:
    try:
        decode_frame(buffer)
    except ValueError:
        return


def test_a_flipped_bit_fails_the_checksum() -> None:
    whole = bytearray(encode_frame([memoryview(b"some kv")], True))
    assert checksum_holds(decode_frame(bytes(whole)))
    whole[4] ^= 1
    assert not checksum_holds(decode_frame(bytes(whole)))


def test_a_cut_frame_is_refused() -> None:
    whole = encode_frame([memoryview(b"some kv")], False)
    with pytest.raises(ValueError):
        decode_frame(whole[:-1])
