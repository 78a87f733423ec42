"""A Hugging Face tokenizer from a GGUF file's vocabulary. Called by `modelcard.py` only.

GGUF keeps vocabulary, merges, token types and the *name* of the pre-tokenizer (`tokenizer.ggml.pre`);
what a name means is fixed by llama.cpp's converter and by the tokenizer.json of the model it was taken
from. Each name below gives the upstream tokenizer.json's pipeline. (Reading the vocabulary alone, as
generic converters do, loses it: SmolLM splits numbers into single digits before anything else.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

# GGUF token types (gguf.constants.TokenType).
CONTROL = 3
USER_DEFINED = 4

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

SPLITS_BEFORE_WORDS = frozenset({_LLAMA3_SPLIT, _QWEN2_SPLIT})
"""Expressions that begin a piece at every single space between two characters that are not white, and look at
nothing before it (ByteLevel's own does too)."""

# Names in `tokenizer.ggml.pre` by the pipeline they share.
_GPT2 = {"gpt-2", "gpt2", "default", "phi-2", "olmo", "jina-v2-code"}
_DIGITS_GPT2 = {"smollm", "starcoder", "refact", "command-r", "codeshell"}
_LLAMA3 = {"llama-bpe", "llama3", "llama-v3", "smaug-bpe", "dbrx", "pixtral"}
_QWEN2 = {"qwen2", "stablelm2", "deepseek-r1-qwen", "hunyuan", "megrez"}
# Whose words that are in the vocabulary as a whole skip the merges (tokenizer.json: ignore_merges).
_WHOLE_WORDS = {"llama-bpe", "llama3", "llama-v3"}
# Where the file does not say, these put the begin token in front (llama.cpp's default for them).
ADDS_BOS = {"llama-bpe", "llama3", "llama-v3"}


class UnsupportedTokenizer(ValueError):
    """The file's tokenizer is of a kind that is not known here."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokenizer fields of a GGUF file."""

    model: str  # tokenizer.ggml.model
    pre: str
    tokens: Sequence[str]
    types: Sequence[int]
    merges: Sequence[str]
    bos_id: int | None
    add_bos: bool


def build_tokenizer(vocabulary: Vocabulary) -> Tokenizer:
    """Raises UnsupportedTokenizer, naming what is not known."""
    if vocabulary.model != "gpt2":
        raise UnsupportedTokenizer(
            f"tokenizer model {vocabulary.model!r} in a GGUF file is not supported (only byte-level BPE, "
            "'gpt2'): serve this model from a folder with tokenizer.json"
        )
    pre = vocabulary.pre
    bpe: Any = models.BPE(
        vocab={token: index for index, token in enumerate(vocabulary.tokens)},
        merges=[_pair(merge) for merge in vocabulary.merges],
        fuse_unk=False,
        ignore_merges=pre in _WHOLE_WORDS,
    )
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = _pre_tokenizer(pre)
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    added = [
        AddedToken(token, special=kind == CONTROL, normalized=False)
        for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=False)
        if kind in (CONTROL, USER_DEFINED)
    ]
    tokenizer.add_tokens(added)
    if vocabulary.add_bos and vocabulary.bos_id is not None:
        bos = vocabulary.tokens[vocabulary.bos_id]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, vocabulary.bos_id)],
        )
    return tokenizer


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _pre_tokenizer(pre: str) -> Any:
    if pre in _GPT2:
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre in _DIGITS_GPT2:
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    if pre in _LLAMA3 or pre in _QWEN2:
        split = _LLAMA3_SPLIT if pre in _LLAMA3 else _QWEN2_SPLIT
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(split), behavior="isolated", invert=False),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    raise UnsupportedTokenizer(
        f"pre-tokenizer {pre!r} of this GGUF file is not known: serve this model from a folder "
        "with tokenizer.json"
    )
