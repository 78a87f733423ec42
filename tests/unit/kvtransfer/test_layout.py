"""Layouts: what is compared, and what a mismatch says (needs nothing)."""

from __future__ import annotations

import dataclasses

import pytest

from kvtransfer.layout import KVLayout, KVSpec, LayoutMismatch

LAYOUT = KVLayout("m@1", "bfloat16", block_tokens=16, layers=30, kv_heads=3, head_dim=64)


def test_page_size_follows_the_shape() -> None:
    assert LAYOUT.shape == (30, 2, 3, 16, 64)
    assert LAYOUT.block_bytes == 30 * 2 * 3 * 16 * 64 * 2


def test_a_partly_filled_block_counts() -> None:
    assert [LAYOUT.blocks_for(n) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]


def test_survives_the_wire() -> None:
    assert KVLayout.from_proto(LAYOUT.to_proto()) == LAYOUT


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_revision", "m@2"),
        ("layers", 24),
        ("total_heads", 4),
        ("head_dim", 128),
        ("order", "layer,block,kv,head,token,dim"),
        ("version", 2),
        ("specs", (KVSpec("window", 0, 30),)),
    ],
)
def test_every_difference_is_refused_and_named(field: str, value: object) -> None:
    other = dataclasses.replace(LAYOUT, **{"specs": (), field: value})
    assert other.digest() != LAYOUT.digest()
    with pytest.raises(LayoutMismatch) as raised:
        LAYOUT.check_compatible(other)
    assert f"{field} {getattr(LAYOUT, field)!r} here, {getattr(other, field)!r} there" in raised.value.reason


def test_layouts_that_can_be_converted_are_compatible() -> None:
    LAYOUT.check_compatible(dataclasses.replace(LAYOUT))
    for change in ({"dtype": "float32"}, {"dtype": "float16"}, {"block_tokens": 24}):
        other = dataclasses.replace(LAYOUT, **change)
        assert other.digest() != LAYOUT.digest()
        LAYOUT.check_compatible(other)
    LAYOUT.check_compatible(dataclasses.replace(LAYOUT, kv_heads=1, first_head=2, total_heads=3))


def test_ranks_without_a_head_in_common_are_refused_with_their_heads() -> None:
    first = dataclasses.replace(LAYOUT, kv_heads=1, first_head=0, total_heads=3)
    rest = dataclasses.replace(LAYOUT, kv_heads=2, first_head=1, total_heads=3)
    with pytest.raises(LayoutMismatch, match="heads 0-0 here, 1-2 there"):
        first.check_compatible(rest)
    with pytest.raises(ValueError, match="heads 2-4 of 3"):
        dataclasses.replace(LAYOUT, first_head=2, total_heads=3)


def test_nonsense_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="dtype"):
        dataclasses.replace(LAYOUT, dtype="int3")
    with pytest.raises(ValueError, match="layers"):
        dataclasses.replace(LAYOUT, layers=0)
    with pytest.raises(LayoutMismatch, match="not understood"):
        KVLayout.from_proto(type(LAYOUT.to_proto())())
