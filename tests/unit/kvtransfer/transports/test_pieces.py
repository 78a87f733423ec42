"""How blocks are cut: frames, messages, head slices."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.errors import TransferError, TransferErrorCode
from kvtransfer.layout import KVLayout
from kvtransfer.native import Stop, copy_pieces
from kvtransfer.pool import HostPool
from kvtransfer.runs import blocks_of, runs_of
from kvtransfer.transports.base import frames_of
from kvtransfer.transports.grpc_serve import cut
from kvtransfer.transports.shm import head_pieces
from kvtransfer.transports.source import check_heads, pages_of
from tests.support.kv import fill_random

LAYOUT = KVLayout("m", "float16", block_tokens=4, layers=3, kv_heads=4, head_dim=8)


@given(st.lists(st.integers(0, 60), max_size=80), st.integers(1, 20))
def test_frames_hold_the_blocks_in_order_and_are_full(blocks: list[int], size: int) -> None:
    frames = list(frames_of(((run.start, run.count) for run in runs_of(blocks)), size))
    spelled = [[b for start, count in frame for b in range(start, start + count)] for frame in frames]
    assert [block for frame in spelled for block in frame] == blocks
    assert all(len(frame) == size for frame in spelled[:-1])
    assert all(spelled)


@given(st.lists(st.binary(max_size=40), max_size=20), st.integers(1, 50))
def test_messages_hold_the_bytes_in_order_and_are_full(buffers: list[bytes], size: int) -> None:
    pieces = [b"".join(piece) for piece in cut([memoryview(b) for b in buffers], size)]
    assert b"".join(pieces) == b"".join(buffers)
    assert all(len(piece) == size for piece in pieces[:-1])
    assert all(pieces)


@given(st.lists(st.integers(0, 11), min_size=1, max_size=12, unique=True), st.data())
def test_both_ways_to_slice_heads_take_the_same_bytes(blocks: list[int], data: st.DataObject) -> None:
    first = data.draw(st.integers(0, 3))
    count = data.draw(st.integers(1, 4 - first))
    pool = HostPool.create(LAYOUT, 12)
    fill_random(pool, 2)
    runs = runs_of(blocks)
    sent = b"".join(page for run in runs for page in pages_of(pool, run.start, run.count, (first, count)))
    array = np.frombuffer(pool.pages, np.float16).reshape(12, 3, 2, 4, 4, 8)
    assert sent == array[blocks_of(runs)][:, :, :, first : first + count].tobytes()
    at = np.cumsum([0, *(run.count for run in runs)])[:-1]
    moves = np.array([(run.start, to, run.count) for run, to in zip(runs, at, strict=True)], np.int64)
    copied = np.zeros(len(sent), np.uint8)
    copy_pieces(copied.data, pool.pages, head_pieces(moves, LAYOUT, (first, count)), Stop())
    assert copied.tobytes() == sent
    del array
    pool.close()


def test_heads_beyond_the_layout_are_refused() -> None:
    assert check_heads(LAYOUT, 0, 4) == check_heads(LAYOUT, 0, 0) == (0, 0)
    assert check_heads(LAYOUT, 2, 2) == (2, 2)
    with pytest.raises(TransferError, match="heads 2 to 5") as raised:
        check_heads(LAYOUT, 2, 3)
    assert raised.value.code is TransferErrorCode.LAYOUT_MISMATCH
