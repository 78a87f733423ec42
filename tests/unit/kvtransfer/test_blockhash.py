"""Block identities (needs nothing)."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.blockhash import HASH_BYTES, block_hashes, chain_seed

tokens = st.lists(st.integers(0, 2**32 - 1), max_size=80)
SEED = chain_seed("m@1")


@given(tokens, st.integers(1, 20))
def test_every_full_block_has_an_identity_and_no_other(ids: list[int], block_tokens: int) -> None:
    hashes = block_hashes(ids, SEED, block_tokens)
    assert len(hashes) == len(ids) // block_tokens
    assert all(len(value) == HASH_BYTES for value in hashes)


@given(tokens, tokens, st.integers(1, 8))
def test_equal_prefixes_share_identities_up_to_the_first_difference(
    left: list[int], right: list[int], size: int
) -> None:
    common = 0
    while common < min(len(left), len(right)) and left[common] == right[common]:
        common += 1
    a, b = block_hashes(left, SEED, size), block_hashes(right, SEED, size)
    assert a[: common // size] == b[: common // size]
    assert not set(a[common // size :]) & set(b[common // size :])


@given(tokens, st.integers(1, 8), st.integers(0, 10))
def test_a_chain_continues_from_a_parent(ids: list[int], size: int, split: int) -> None:
    whole = block_hashes(ids, SEED, size)
    cut = min(split, len(whole))
    parent = whole[cut - 1] if cut else None
    assert whole[cut:] == block_hashes(ids[cut * size :], SEED, size, parent)


def test_model_adapter_and_salt_separate_identities() -> None:
    seeds = {
        chain_seed("m@1"),
        chain_seed("m@2"),
        chain_seed("m@1", "a"),
        chain_seed("m@1a"),
        chain_seed("m@1", "", b"tenant"),
    }
    assert len(seeds) == 5
    assert len({block_hashes(range(16), seed)[0] for seed in seeds}) == 5
