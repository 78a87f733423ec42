"""Cards from GGUF files and from folders; the tokenizer is the upstream one. Needs the small model."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from controlplane.gateway.bpe import UnsupportedTokenizer, Vocabulary, build_tokenizer
from controlplane.gateway.modelcard import CardError, ModelCard, build_card

TEXTS = [
    "Hello, world!",
    "The year 2024 and 3.14159 or 1,000,000",
    "  leading and   inner   spaces  ",
    "tabs\tand\nnew\n\nlines\r\n",
    "don't can't I'll we've",
    "naïve café Ωmega ß ﬁ",
    "漢字かな交じり文 한국어 العربية עברית हिन्दी",
    "🌍🇩🇪👩‍👩‍👧 emoji",
    "def f(x):\n    return x ** 2  # comment",
    "<|im_start|>user\nhi<|im_end|>\n",
    "a" * 500,
    "MiXeD CaSe_with-dashes/and\\slashes",
    "\u200b\u00a0 odd spaces",
    "",
]


def test_smollm_splits_digits_and_keeps_special_tokens(tokenizer: Tokenizer) -> None:
    """Upstream tokenizer.json: Sequence[Digits(individual_digits), ByteLevel]."""
    assert tokenizer.encode("in 2024, 3.14").tokens == [
        "in",
        "Ġ",
        "2",
        "0",
        "2",
        "4",
        ",",
        "Ġ",
        "3",
        ".",
        "1",
        "4",
    ]
    assert tokenizer.encode("<|im_start|>user").ids == [1, tokenizer.token_to_id("user")]


def test_every_text_survives_the_round_trip(tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_transformers_agrees_where_it_keeps_the_pre_tokenizer(
    tokenizer: Tokenizer, small_model_path: Path
) -> None:
    """transformers reads vocabulary and merges of the same file; its generic converter does not know
    that SmolLM splits digits, so texts are compared with digits already apart."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(small_model_path.parent), gguf_file=small_model_path.name)
    for text in TEXTS:
        for part in filter(None, _apart(text)):
            assert tokenizer.encode(part).ids == theirs.encode(part, add_special_tokens=False), part


def _apart(text: str) -> list[str]:
    """Without digits: they are what the two differ in."""
    parts, current = [], ""
    for char in text:
        if char.isdigit():
            parts.append(current)
            current = ""
        else:
            current += char
    return [*parts, current]


def test_card_of_the_small_model(card: ModelCard) -> None:
    assert card.architecture == "llama" and card.context_length == 8192 and card.vocab_size == 49152
    assert card.eos_ids == (2,) and card.bos_id == 1 and len(card.special_ids) == 17
    assert card.chat_template is not None and "im_start" in card.chat_template


def test_a_cached_card_loads_fast(card: ModelCard, small_model_path: Path) -> None:
    started = time.perf_counter()
    assert build_card(small_model_path) == card
    assert time.perf_counter() - started < 0.5


def test_card_of_a_folder(tmp_path: Path, card: ModelCard) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(card.tokenizer_json)
    (folder / "config.json").write_text(
        json.dumps(
            {"model_type": "llama", "max_position_embeddings": 512, "vocab_size": 49152, "eos_token_id": 2}
        )
    )
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    (folder / "tokenizer_config.json").write_text(
        '{"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}, "chat_template": "old"}'
    )
    made = build_card(folder, cache_dir=tmp_path / "cache")
    assert made.context_length == 512 and made.eos_ids == (2, 0) and made.bos_id == 1
    assert made.chat_template == "old" and set(made.special_ids) == set(card.special_ids)
    for cached in (tmp_path / "cache").glob("*.json"):
        cached.write_text('{"version": 1, "half')
    assert build_card(folder, cache_dir=tmp_path / "cache") == made, "a broken cache is made anew"
    (folder / "chat_template.jinja").write_text("new")
    assert build_card(folder, cache_dir=tmp_path / "cache").chat_template == "new", (
        "another content, another card"
    )


def test_what_cannot_be_a_card_says_why(tmp_path: Path) -> None:
    broken = tmp_path / "x.gguf"
    broken.write_bytes(b"not a model" * 100)
    with pytest.raises(CardError, match="GGUF"):
        build_card(broken, cache_dir=tmp_path / "cache")
    with pytest.raises(CardError, match=r"config\.json"):
        build_card(tmp_path, cache_dir=tmp_path / "cache")
    with pytest.raises(OSError):
        build_card(tmp_path / "absent.gguf", cache_dir=tmp_path / "cache")
    assert os.listdir(tmp_path / "cache") != []


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("llama-bpe", "ab 12345!\n\n x", ["ab", " ", "123", "45", "!\n\n", " x"]),
        ("qwen2", "ab 12345!\n\n x", ["ab", " ", "1", "2", "3", "4", "5", "!\n\n", " x"]),
        ("gpt-2", "ab 12345!", ["ab", " 12345", "!"]),
        ("smollm", "ab 12!", ["ab", " ", "1", "2", "!"]),
    ],
)
def test_known_pre_tokenizers_split_as_upstream(pre: str, text: str, pieces: list[str]) -> None:
    vocabulary = Vocabulary("gpt2", pre, ["a", "b"], [1, 1], [], None, False)
    splits = build_tokenizer(vocabulary).pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in splits] == pieces


def test_unknown_tokenizers_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedTokenizer, match="'weird'"):
        build_tokenizer(Vocabulary("gpt2", "weird", ["a"], [1], [], None, False))
    with pytest.raises(UnsupportedTokenizer, match="'llama'"):
        build_tokenizer(Vocabulary("llama", "default", ["a"], [1], [], None, False))
