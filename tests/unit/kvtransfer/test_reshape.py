"""Conversions of numbers against torch's, and pages placed between any two block sizes and rank slices."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer.errors import TransferError, TransferErrorCode
from kvtransfer.layout import DTYPE_BYTES, KVLayout
from kvtransfer.pool import BlockStore, HostPool
from kvtransfer.reshape import Reshaper, Staging, Targets, convert
from tests.support.kv import StagedStore

DTYPES = sorted(DTYPE_BYTES)
OURS = KVLayout("m", "float32", block_tokens=4, layers=2, kv_heads=4, head_dim=3)
INTEGERS = {2: torch.int16, 4: torch.int32}


def bits_of(values: torch.Tensor) -> np.ndarray:
    return values.view(INTEGERS[values.element_size()]).numpy().view(f"<u{values.element_size()}")


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
def test_numbers_are_converted_as_torch_does(source: str, target: str) -> None:
    generator = torch.Generator().manual_seed(1)
    numbers = torch.randn(20_000, generator=generator) * torch.logspace(-9, 4, 20_000)
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-40, 60000.0])
    given_ = torch.cat([numbers, special]).to(getattr(torch, source))
    expected = given_.to(getattr(torch, target))
    bits = torch.from_numpy(convert(bits_of(given_), source, target).copy())
    found = bits.view(getattr(torch, target))
    assert torch.equal(torch.isnan(found), torch.isnan(expected))
    numbers_only = ~torch.isnan(expected)
    assert torch.equal(found[numbers_only], expected[numbers_only])


@pytest.mark.parametrize(
    ("source", "target", "value"),
    [("bfloat16", "float16", 70000.0), ("float32", "float16", 65520.0), ("float32", "bfloat16", 3.4e38)],
)
def test_a_number_that_does_not_fit_fails_instead_of_becoming_infinite(
    source: str, target: str, value: float
) -> None:
    bits = bits_of(torch.tensor([1.0, value]).to(getattr(torch, source)))
    with pytest.raises(TransferError, match="does not fit") as raised:
        convert(bits, source, target)
    assert raised.value.code is TransferErrorCode.LAYOUT_MISMATCH


@given(
    theirs_tokens=st.integers(1, 9),
    ours_tokens=st.integers(1, 9),
    tokens=st.integers(1, 60),
    skip=st.integers(0, 5),
    ranks=st.sampled_from([(0, 4, 0, 4), (0, 2, 0, 4), (2, 2, 0, 4), (0, 4, 1, 2), (1, 3, 0, 2)]),
    dtype=st.sampled_from(DTYPES),
    device=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_every_token_lands_where_it_belongs_and_nothing_else_is_touched(
    theirs_tokens: int,
    ours_tokens: int,
    tokens: int,
    skip: int,
    ranks: tuple[int, int, int, int],
    dtype: str,
    device: bool,
) -> None:
    their_first, their_heads, our_first, our_heads = ranks
    theirs = dataclasses.replace(
        OURS, dtype=dtype, block_tokens=theirs_tokens, kv_heads=their_heads, first_head=their_first,
        total_heads=4,
    )  # fmt: skip
    ours = dataclasses.replace(
        OURS, block_tokens=ours_tokens, kv_heads=our_heads, first_head=our_first, total_heads=4
    )
    ours.check_compatible(theirs)
    reshaper = Reshaper(theirs, ours)
    needed = ours.blocks_for(tokens)
    first = min(skip, needed)
    pool = HostPool.create(ours, needed + 2, prefault=False)
    store: BlockStore = StagedStore(pool) if device else pool
    dst = list(np.random.default_rng(tokens).permutation(needed + 2)[:needed])
    # Each number says layer, K or V, head and token.
    groups = np.arange(2 * 2 * 4).reshape(2, 2, 4, 1, 1) * 8
    places = np.arange(theirs.blocks_for(tokens) * theirs_tokens).reshape(1, 1, 1, -1, 1) % 7
    kv = groups + places + np.zeros(3)
    wanted = reshaper.wanted(first, tokens)
    staging = Staging(reshaper.staged, max(1, len(wanted)))
    common = ours.common_heads(theirs)
    for at, index in enumerate(wanted):
        page = kv[:, :, common.start : common.stop, index * theirs_tokens : (index + 1) * theirs_tokens]
        tensor = torch.from_numpy(np.ascontiguousarray(page)).to(getattr(torch, dtype))
        staging.store(at, tensor.view(torch.uint8).numpy().tobytes())
    reshaper.place(staging, list(wanted), Targets(store, dst, first))
    found = np.frombuffer(bytes(pool.pages), np.float32).reshape(needed + 2, *ours.shape)
    covered = np.zeros(found.shape, bool)
    for index in range(first, needed):
        for at in range(ours_tokens):
            token = index * ours_tokens + at
            if token >= wanted.stop * theirs_tokens:
                continue
            for head in common:
                covered[dst[index], :, :, head - our_first, at] = True
                assert (found[dst[index], :, :, head - our_first, at] == kv[:, :, head, token]).all()
    assert not found[~covered].any()
    assert (wanted.stop * theirs_tokens >= tokens) or not wanted
    pool.close()
