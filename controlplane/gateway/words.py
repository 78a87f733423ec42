"""Token ids of a text from the ids of its words: what a tokenizer said of a word before is not asked again.

Byte-level BPE cuts a text into pieces by a regular expression before it looks at any token, and every such
expression known here begins a new piece at a single space between two characters that are not white. So the
ids of a text are the ids of its words, each with the space before it, one after the other, whatever the words
are. Words are remembered, and a prompt of known words costs a look-up a word, a tenth of the tokenizer's time
and little enough to be done on the event loop; where most words are new the text is encoded as a whole.

A tokenizer whose pipeline is not one of these is never asked piecemeal (`Words.exact` is false). Property-
tested: the ids equal those of the tokenizer for the whole text. Called by `tokenizing.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any, cast

import orjson
from tokenizers import Tokenizer

from controlplane.gateway import metrics
from controlplane.gateway.bpe import SPLITS_BEFORE_WORDS

MAX_WORDS = 16_384
"""Words in each of two generations (ours: 97 % of running English; some 4 MiB a generation at most)."""
MAX_WORD_CHARS = 64
"""Longer ones (numbers, addresses, code without spaces) seldom come again."""
WHOLE_FROM = 1 / 3
"""Share of a text in new words from which it is encoded as a whole (measured: a word encoded by itself costs
two to three times what it costs in its text)."""
LEARNT_CHARS = 65_536
"""A longer text is not learnt from: it would push out everything else (ours)."""

_Ids = tuple[int, ...]
_Table = dict[str, _Ids]
_Tables = tuple[_Table, _Table, _Table]
"""Words after a space; what texts begin with, which has none; what texts end with, where that is white: what
comes after such a word, if anything did, might belong to its last piece."""
_WORD, _FIRST, _LAST = 0, 1, 2
_Piece = tuple[str, int, _Ids | None]
"""As the tokenizer is asked for it, its table, and its ids where they are known."""


class Words:
    """One per model. Used from the loop and from threads: every step is one operation on a dictionary."""

    __slots__ = ("_after", "_before", "_old", "_tables", "_tokenizer", "exact")

    def __init__(self, tokenizer: Tokenizer, tokenizer_json: bytes) -> None:
        self._tokenizer = tokenizer
        self.exact = cuts_before_words(orjson.loads(tokenizer_json))
        self._tables: _Tables = ({}, {}, {})
        self._old: _Tables = ({}, {}, {})
        self._before, self._after = self._around()

    def ids(self, text: str, *, special: bool = False, most_new: int | None = None) -> list[int] | None:
        """The ids of `text`, with the tokens that the tokenizer puts around it if `special`.

        `most_new`: None is returned where more characters than that would have to be encoded, at once and
        without any of the work. Raises UnicodeEncodeError for a text that is not valid Unicode.
        """
        if not self.exact:
            return None if most_new is not None else self._whole(text, special)
        parts = text.split(" ")
        words, first, last = self._tables
        found = [words.get(part) for part in parts]
        found[0] = first.get(parts[0])
        if found[-1] is None and len(parts) > 1:
            found[-1] = last.get(parts[-1])
        if None not in found:
            metrics.WORDS.labels("known").inc(len(found))
            return self._joined(found, special)
        missing = [index for index, ids in enumerate(found) if ids is None]
        if all(_stands_alone(parts[index], index, len(parts)) for index in missing):
            # What is known stands alone as well: only the missing ones have to be looked at again.
            pieces = [self._piece(parts[index], index == 0) for index in missing]
        else:
            pieces, found = self._cut(parts), []
        new = [(piece, kind) for piece, kind, ids in pieces if ids is None]
        if most_new is not None and sum(len(piece) for piece, _ in new) > most_new:
            return None
        metrics.WORDS.labels("known").inc(len(found or pieces) - len(new))
        metrics.WORDS.labels("new").inc(len(new))
        if sum(len(piece) for piece, _ in new) > len(text) * WHOLE_FROM:
            return self._enclosed(self._learn_from(text, self._cut(parts)), special)
        made = iter(self._learn(new))
        looked = [next(made) if ids is None else ids for _, _, ids in pieces]
        if not found:
            return self._joined(looked, special)
        for index, ids in zip(missing, looked, strict=True):
            found[index] = ids
        return self._joined(found, special)

    def _joined(self, found: Iterable[_Ids | None], special: bool) -> list[int]:
        return self._enclosed(list(chain.from_iterable(cast("Iterable[_Ids]", found))), special)

    def _enclosed(self, ids: list[int], special: bool) -> list[int]:
        return [*self._before, *ids, *self._after] if special else ids

    def _cut(self, parts: list[str]) -> list[_Piece]:
        """The pieces of a text. Where several spaces, or white at a word's edge, leave open where a piece
        begins, the words around it are one."""
        pieces: list[_Piece] = []
        position, end = 0, len(parts)
        while position < end:
            begin = position
            position += 1
            while position < end and not (
                _ends_black(parts[position - 1]) and _begins_black(parts[position])
            ):
                position += 1
            pieces.append(self._piece(" ".join(parts[begin:position]), begin == 0))
        return pieces

    def _piece(self, text: str, begins: bool) -> _Piece:
        kind = _FIRST if begins else _WORD if _ends_black(text) else _LAST
        ids = self._tables[kind].get(text)
        if ids is None and (ids := self._old[kind].get(text)) is not None:
            self._tables[kind][text] = ids  # in use: it stays when the older generation goes
        return (text if begins else " " + text, kind, ids)

    def _learn(self, new: list[tuple[str, int]]) -> list[_Ids]:
        encoded = self._tokenizer.encode_batch_fast([piece for piece, _ in new], add_special_tokens=False)
        made = [tuple(encoding.ids) for encoding in encoded]
        for (piece, kind), ids in zip(new, made, strict=True):
            self._keep(piece, kind, ids)
        self._turn()
        return made

    def _learn_from(self, text: str, pieces: list[_Piece]) -> list[int]:
        """The ids of a whole text, shared out among its pieces by where each token lies."""
        # Not the fast call: it leaves out where tokens lie.
        encoding = self._tokenizer.encode_batch([text], add_special_tokens=False)[0]
        ids: list[int] = encoding.ids
        if len(text) > LEARNT_CHARS:
            return ids
        offsets: list[tuple[int, int]] = encoding.offsets
        end = token = 0
        for piece, kind, known in pieces:
            end += len(piece)
            first = token
            while token < len(ids) and offsets[token][0] < end:
                token += 1
            if known is None and token > first:
                self._keep(piece, kind, tuple(ids[first:token]))
        self._turn()
        return ids

    def _keep(self, piece: str, kind: int, ids: _Ids) -> None:
        # A first piece that is white at its end is one only where it is the whole text.
        if len(piece) <= MAX_WORD_CHARS and (kind != _FIRST or _ends_black(piece)):
            self._tables[kind][piece if kind == _FIRST else piece[1:]] = ids

    def _turn(self) -> None:
        """A full generation becomes the older one, of which what is asked for comes back."""
        if any(len(table) > MAX_WORDS for table in self._tables):
            self._old, self._tables = self._tables, ({}, {}, {})
        metrics.WORDS_HELD.set(sum(map(len, (*self._tables, *self._old))))

    def _whole(self, text: str, special: bool) -> list[int]:
        ids: list[int] = self._tokenizer.encode_batch_fast([text], add_special_tokens=special)[0].ids
        return ids

    def _around(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and after a text when special tokens are asked for."""
        plain, around = self._whole("a", False), self._whole("a", True)
        for start in range(len(around) - len(plain) + 1):
            if around[start : start + len(plain)] == plain:
                return around[:start], around[start + len(plain) :]
        self.exact = False
        return [], []


def _stands_alone(part: str, index: int, count: int) -> bool:
    """Pieces begin before and after it, if its neighbours stand alone too."""
    begins = index == 0 or _begins_black(part)
    return begins and ((index == count - 1 and index > 0) or _ends_black(part))


def _ends_black(part: str) -> bool:
    return bool(part) and not part[-1].isspace()


def _begins_black(part: str) -> bool:
    return bool(part) and not part[0].isspace()


def cuts_before_words(pipeline: dict[str, Any]) -> bool:
    """Whether a tokenizer.json's pipeline keeps to this module's assumption.

    BPE without chance; no normalizer but NFC (no character is composed with the space before it); added
    tokens that lie within words and look at nothing around them; an expression of `bpe.py` to cut by.
    """
    if (pipeline.get("model") or {}).get("type") != "BPE" or pipeline["model"].get("dropout"):
        return False
    if pipeline.get("truncation") or pipeline.get("padding"):
        return False
    if (pipeline.get("normalizer") or {"type": "NFC"})["type"] != "NFC":
        return False
    for token in pipeline.get("added_tokens") or ():
        looks = token.get("lstrip") or token.get("rstrip") or token.get("single_word")
        if looks or any(char.isspace() for char in token["content"]):
            return False
    pre = pipeline.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers") or [] if pre.get("type") == "Sequence" else [pre]
    cuts = False
    for step in steps:
        kind = step.get("type")
        if kind == "ByteLevel":
            if step.get("add_prefix_space"):
                return False
            cuts = cuts or bool(step.get("use_regex", True))
        elif kind == "Split":
            if step.get("behavior") != "Isolated" or step.get("invert"):
                return False
            if (step.get("pattern") or {}).get("Regex") not in SPLITS_BEFORE_WORDS:
                return False
            cuts = True
        elif kind != "Digits":
            return False
    return cuts
