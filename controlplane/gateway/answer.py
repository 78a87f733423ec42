"""One choice on its way to text: token deltas in, text pieces and logprob entries out.

Called by `generation.py` once per delta. A choice ends at an end token, a length, or a stop string; end
tokens are counted, never rendered. Entries of logprobs are given out with the text they belong to, so that
nothing of a stop string leaks through them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from controlplane.gateway.detokenize import TokenTable
from controlplane.gateway.stops import StopMatcher
from controlplane.jobs.serving import TokenLogprobs


@dataclass(frozen=True, slots=True)
class Entry:
    """A token with its logprobs and where its text begins, in characters from the start of the choice."""

    logprobs: TokenLogprobs
    offset: int


@dataclass(slots=True)
class Piece:
    """What one delta adds to the answer. `finish` is set once, on the last piece."""

    text: str = ""
    entries: list[Entry] = field(default_factory=list)
    finish: str | None = None  # "stop" | "length"
    stopped: bool = False  # by a stop string: the task is still running


class Choice:
    """State of one choice."""

    __slots__ = (
        "_base",
        "_decoded",
        "_detokenizer",
        "_end_ids",
        "_min_tokens",
        "_pending",
        "_shown",
        "_stops",
        "_with_logprobs",
        "completion_tokens",
        "finish",
        "first_token_at",
        "last_token_at",
    )

    def __init__(
        self,
        table: TokenTable,
        *,
        stops: Sequence[str] = (),
        end_ids: frozenset[int] = frozenset(),
        min_tokens: int = 0,
        with_logprobs: bool = False,
        offset: int = 0,
    ) -> None:
        self._base = offset  # characters of an echoed prompt before the output
        self._detokenizer = table.detokenizer()
        self._stops = StopMatcher(stops) if stops else None
        self._end_ids = end_ids
        self._min_tokens = min_tokens
        self._with_logprobs = with_logprobs
        self._decoded = 0  # characters decoded
        self._shown = 0  # characters given out
        self._pending: deque[tuple[int, Entry]] = deque()  # (character where the token ends, entry)
        self.completion_tokens = 0
        self.finish: str | None = None
        self.first_token_at = 0.0
        self.last_token_at = 0.0

    def push(
        self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs] | None, finish: str | None
    ) -> Piece:
        """Adds tokens; `finish` is the executor's, with the last ones. Nothing after the end has effect."""
        piece = Piece()
        if self.finish is not None:
            return piece
        if self._stops is None and not self._with_logprobs:
            self.completion_tokens += len(tokens)
            piece.text = self._detokenizer.push(self._visible(tokens, finish))
            if finish is not None:
                piece.text += self._detokenizer.flush()
                piece.finish = self.finish = finish
            return piece
        self._push_each(piece, tokens, logprobs, finish)
        return piece

    def _visible(self, tokens: Sequence[int], finish: str | None) -> Sequence[int]:
        """Without the token that ended the answer."""
        if finish == "stop" and tokens and tokens[-1] in self._end_ids:
            return tokens[:-1]
        return tokens

    def _push_each(
        self,
        piece: Piece,
        tokens: Sequence[int],
        logprobs: Sequence[TokenLogprobs] | None,
        finish: str | None,
    ) -> None:
        visible = len(self._visible(tokens, finish))
        texts: list[str] = []
        for position, token in enumerate(tokens):
            self.completion_tokens += 1
            if position >= visible:
                break
            text = self._detokenizer.push((token,))
            start, self._decoded = self._decoded, self._decoded + len(text)
            if self._with_logprobs and logprobs is not None and position < len(logprobs):
                # A token without text of its own waits for the character that it is part of.
                self._pending.append(
                    (max(self._decoded, start + 1), Entry(logprobs[position], self._base + start))
                )
            texts.append(self._check(text))
            if self._stops is not None and self._stops.cut:
                piece.stopped = True
                finish = "stop"
                break
        if finish is not None:
            if not piece.stopped:
                tail = self._detokenizer.flush()
                self._decoded += len(tail)
                texts.append(self._check(tail))
                if self._stops is not None:
                    if self._stops.cut:
                        finish = "stop"
                    else:
                        texts.append(self._stops.flush())
            piece.finish = self.finish = finish
        piece.text = "".join(texts)
        self._shown += len(piece.text)
        piece.entries = self._ready()

    def _check(self, text: str) -> str:
        if self._stops is None:
            return text
        if self.completion_tokens <= self._min_tokens:
            return text  # stop strings count after min_tokens only
        return self._stops.push(text)

    def _ready(self) -> list[Entry]:
        ready: list[Entry] = []
        ended = self.finish is not None
        cut = ended and self._stops is not None and self._stops.cut
        while self._pending:
            end, entry = self._pending[0]
            if not (end <= self._shown or (ended and (not cut or entry.offset - self._base < self._shown))):
                break
            ready.append(entry)
            self._pending.popleft()
        if ended:
            self._pending.clear()
        return ready
