"""Token ids to text, incrementally: only complete characters come out, and never a special token.

For byte-level BPE (GPT-2's family: every model served here from GGUF) each id is a fixed run of bytes, so
an incremental UTF-8 decoder does it exactly and in constant time per token. For other decoders (byte
fallback, metaspace) a short window of ids is decoded again with each token, as text-generation servers do.

Guarantee, property-tested: whatever the chunking, the pieces joined and flushed equal the tokenizer's
decode of all ids at once.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import Protocol

import orjson
from tokenizers import Tokenizer

from controlplane.gateway.modelcard import ModelCard

REPLACEMENT = "\ufffd"


class Detokenizer(Protocol):
    """The state of one choice."""

    def push(self, tokens: Iterable[int]) -> str:
        """The text that these tokens complete."""
        ...

    def flush(self) -> str:
        """At the end: what an incomplete character decodes to (U+FFFD), or nothing."""
        ...


class TokenTable:
    """Everything about single tokens of one model. Built once per card, shared by all requests."""

    def __init__(self, tokenizer: Tokenizer, card: ModelCard) -> None:
        self.tokenizer = tokenizer
        self.specials = frozenset(card.special_ids)
        self.size = max(card.vocab_size, tokenizer.get_vocab_size())
        decoder = (orjson.loads(card.tokenizer_json).get("decoder") or {}).get("type")
        self._pieces = tokenizer.get_vocab(with_added_tokens=True)
        self._bytes: list[bytes] | None = None
        if decoder == "ByteLevel":
            table = [b""] * self.size
            for piece, index in self._pieces.items():
                table[index] = _byte_level(piece)
            self._bytes = table
            self.longest = max((len(data) for data in table), default=1)
        else:
            self.longest = max((len(piece.encode()) for piece in self._pieces), default=1)

    def detokenizer(self) -> Detokenizer:
        if self._bytes is not None:
            return _ByteDetokenizer(self._bytes, self.specials)
        return _WindowDetokenizer(self.tokenizer)

    def decode(self, tokens: Sequence[int]) -> str:
        """All at once, special tokens left out."""
        detokenizer = self.detokenizer()
        return detokenizer.push(tokens) + detokenizer.flush()

    def raw(self, token: int) -> bytes:
        """The bytes of one token as logprobs show it: special tokens by their name."""
        if self._bytes is not None:
            return self._bytes[token] if token < len(self._bytes) else b""
        text: str = self.tokenizer.decode([token], skip_special_tokens=False)
        return text.encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    alphabet = {chr(byte): byte for byte in printable}
    shifted = 0
    for byte in range(256):
        if byte not in printable:
            alphabet[chr(256 + shifted)] = byte
            shifted += 1
    return alphabet


_ALPHABET = _byte_alphabet()


def _byte_level(piece: str) -> bytes:
    """As `tokenizers`' ByteLevel decoder: a piece with a character outside the alphabet is plain text."""
    try:
        return bytes([_ALPHABET[char] for char in piece])
    except KeyError:
        return piece.encode()


class _ByteDetokenizer:
    __slots__ = ("_bytes", "_decoder", "_specials")

    def __init__(self, table: list[bytes], specials: frozenset[int]) -> None:
        self._bytes = table
        self._specials = specials
        # "replace" substitutes maximal subparts, exactly as Rust's from_utf8_lossy does.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, tokens: Iterable[int]) -> str:
        table, specials, size = self._bytes, self._specials, len(self._bytes)
        data = b"".join([table[token] for token in tokens if token not in specials and token < size])
        return self._decoder.decode(data)

    def flush(self) -> str:
        return self._decoder.decode(b"", True)


class _WindowDetokenizer:
    """Decodes `ids[start:]` again and emits what grew; the window moves on at complete characters."""

    __slots__ = ("_emitted", "_ids", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._emitted = ""  # the decode of the window's ids that was emitted already

    def push(self, tokens: Iterable[int]) -> str:
        return "".join(self._step(token) for token in tokens)

    def _step(self, token: int) -> str:
        self._ids.append(token)
        text = self._decode(self._ids)
        if text.endswith(REPLACEMENT) or not text.startswith(self._emitted):
            return ""
        new = text[len(self._emitted) :]
        self._emitted = text
        if new and len(self._ids) > 8:
            # Decoders look at the token before (a leading space): keep a few as context.
            context = self._ids[-4:]
            shown = self._decode(context)
            if text.endswith(shown) and not shown.startswith(REPLACEMENT):
                self._ids, self._emitted = context, shown
        return new

    def flush(self) -> str:
        text = self._decode(self._ids)
        new = text[len(self._emitted) :] if text.startswith(self._emitted) else ""
        self._emitted = text
        return new

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text
