"""Ids by words: whatever the text, what the tokenizer says of the whole. Needs the small model."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from controlplane.gateway import words as module
from controlplane.gateway.bpe import Vocabulary, build_tokenizer
from controlplane.gateway.modelcard import ModelCard
from controlplane.gateway.words import Words, cuts_before_words

WHITE = (" ", "  ", "\n", "\t", " \n", "\r\n", "\x1c", "\u00a0", "\u0085", "\u2028", "\u200b")
BLACK = ("a", "b's", "'s", "don't", "1", "23", "<|im_start|>", "<|im_end|>", "é", "e\u0301", "\u0301", "日本",
         "一二", "٣", "½", "_", "...", "😀", "The", "the")  # fmt: skip
TEXTS = st.lists(st.one_of(st.sampled_from(WHITE + BLACK), st.text(max_size=3)), max_size=12).map("".join)


@pytest.fixture(scope="session", params=["as it is", "qwen2", "llama3"])
def pair(request: pytest.FixtureRequest, card: ModelCard, tokenizer: Tokenizer) -> tuple[Tokenizer, Words]:
    """The model's own pipeline, and its vocabulary under the other families' expressions."""
    made = tokenizer
    if request.param != "as it is":
        model = orjson.loads(card.tokenizer_json)["model"]
        tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        types = [3 if token.startswith("<|") else 1 for token in tokens]
        made = build_tokenizer(
            Vocabulary("gpt2", request.param, tokens, types, merges, 1, request.param == "llama3")
        )
    return made, Words(made, made.to_str().encode())


@settings(max_examples=100)
@given(TEXTS)
def test_ids_are_those_of_the_whole_text(pair: tuple[Tokenizer, Words], text: str) -> None:
    tokenizer, words = pair
    assert words.exact
    try:
        expected = tokenizer.encode(text, add_special_tokens=False).ids
    except UnicodeEncodeError:
        with pytest.raises(UnicodeEncodeError):
            words.ids(text)
        return
    assert words.ids(text) == expected, "as it came"
    assert words.ids(text) == expected, "and of words known by now"
    assert words.ids(text, special=True) == tokenizer.encode(text).ids


def test_a_text_of_known_words_is_encoded_at_once_and_another_is_not(pair: tuple[Tokenizer, Words]) -> None:
    tokenizer, _ = pair
    words = Words(tokenizer, tokenizer.to_str().encode())
    text = "The river runs slowly under an old bridge, and people walk over it."
    assert words.ids(text, most_new=20) is None
    expected = tokenizer.encode(text, add_special_tokens=False).ids
    assert words.ids(text) == expected
    assert words.ids(text, most_new=0) == expected
    assert words.ids(text + " Stones.", most_new=0) is None
    assert words.ids(text + " Stones.", most_new=8) is not None


def test_what_is_remembered_is_bounded_and_what_is_used_stays(
    pair: tuple[Tokenizer, Words], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_WORDS", 50)
    tokenizer, _ = pair
    words = Words(tokenizer, tokenizer.to_str().encode())
    for number in range(400):
        words.ids(f"a bridge w{number}x over w{number}y")
        held = sum(map(len, (*words._tables, *words._old)))
        assert held <= 3 * 2 * 53
        assert number < 2 or words.ids("a bridge over", most_new=0) is not None
    long = " ".join(f"q{number}" for number in range(30_000))
    assert words.ids(long) == tokenizer.encode(long, add_special_tokens=False).ids
    assert words.ids("a bridge over", most_new=0) is not None, "a long text pushes nothing out"


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"truncation": {"max_length": 5}},
        {"added_tokens": [{"content": "a b"}]},
        {"added_tokens": [{"content": "<x>", "lstrip": True}]},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "Metaspace"}},
        {"pre_tokenizer": None},
        {"model": {"type": "Unigram"}},
        {"model": {"type": "BPE", "dropout": 0.1}},
    ],
)
def test_other_pipelines_are_not_taken_apart(card: ModelCard, change: dict[str, Any]) -> None:
    pipeline = orjson.loads(card.tokenizer_json)
    assert cuts_before_words(pipeline)
    assert not cuts_before_words({**pipeline, **change})
