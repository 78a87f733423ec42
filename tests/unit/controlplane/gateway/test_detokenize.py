"""Incremental detokenization equals decoding at once, whatever the chunking. Needs the small model."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from controlplane.gateway.detokenize import TokenTable
from controlplane.gateway.modelcard import ModelCard

QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TOKENS = st.lists(st.integers(0, 49151), max_size=60)
CUTS = st.lists(st.integers(1, 7), min_size=1, max_size=60)


def in_chunks(tokens: list[int], cuts: list[int]) -> list[list[int]]:
    chunks, position, turn = [], 0, 0
    while position < len(tokens):
        size = cuts[turn % len(cuts)]
        chunks.append(tokens[position : position + size])
        position, turn = position + size, turn + 1
    return chunks


@QUICK
@given(tokens=TOKENS, cuts=CUTS)
def test_any_chunking_gives_the_full_decode(
    table: TokenTable, tokenizer: Tokenizer, tokens: list[int], cuts: list[int]
) -> None:
    detokenizer = table.detokenizer()
    pieces = [detokenizer.push(chunk) for chunk in in_chunks(tokens, cuts)]
    assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(tokens, skip_special_tokens=True)


@QUICK
@given(text=st.text(max_size=80))
def test_valid_text_never_shows_a_broken_character(
    table: TokenTable, tokenizer: Tokenizer, text: str
) -> None:
    tokens = tokenizer.encode(text).ids
    # A few bytes of planes without characters are not in this vocabulary: such text is lost on the way in.
    assume(tokenizer.decode(tokens, skip_special_tokens=False) == text)
    detokenizer = table.detokenizer()
    shown = ""
    for token in tokens:
        shown += detokenizer.push([token])
        assert text.startswith(shown)
    assert shown + detokenizer.flush() == text


def test_special_tokens_are_not_rendered(table: TokenTable, card: ModelCard) -> None:
    assert table.decode(card.special_ids) == ""
    assert table.raw(card.eos_ids[0]) == b"<|im_end|>"


def test_an_incomplete_character_is_replaced_only_at_the_end(table: TokenTable, tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("🌍").ids
    assert len(tokens) > 1
    detokenizer = table.detokenizer()
    assert detokenizer.push(tokens[:-1]) == ""
    assert detokenizer.flush() == "\ufffd"


@pytest.fixture(scope="module")
def byte_fallback() -> tuple[TokenTable, Tokenizer]:
    """A small tokenizer of the other kind: metaspace words, bytes for what the vocabulary lacks."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    for word in ("▁", "▁hello", "▁world", "a", "b", "c", "▁a", "ll", "o"):
        vocabulary[word] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    card = ModelCard(
        "", "llama", tokenizer.to_str().encode(), None, 128, len(vocabulary), None, (), (), "", ""
    )
    return TokenTable(tokenizer, card), tokenizer


@QUICK
@given(data=st.data())
def test_byte_fallback_decoders_stream_valid_text(
    byte_fallback: tuple[TokenTable, Tokenizer], data: st.DataObject
) -> None:
    table, tokenizer = byte_fallback
    size = tokenizer.get_vocab_size()
    parts = data.draw(
        st.lists(st.one_of(st.integers(256, size - 1).map(lambda i: [i]),
                           st.characters(codec="utf-8").map(lambda c: list(c.encode()))), max_size=30)
    )  # fmt: skip
    tokens = [token for part in parts for token in part]
    detokenizer = table.detokenizer()
    shown = "".join(detokenizer.push([token]) for token in tokens) + detokenizer.flush()
    assert shown == tokenizer.decode(tokens)


def test_the_byte_alphabet_is_the_one_of_tokenizers() -> None:
    from controlplane.gateway.detokenize import _ALPHABET

    assert set(_ALPHABET) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(_ALPHABET.values()) == list(range(256))
