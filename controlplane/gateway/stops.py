"""Stop strings in text that arrives in pieces, wherever the pieces are cut.

Of the text seen, the stop string that is *completed first* ends it; where several are completed by the
same character, the one that began first. The answer is cut before it. What could still become a stop
string, and no more, is held back.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """The state of one choice. Costs O(new text x stops), plus the held-back tail."""

    __slots__ = ("_held", "_stops", "cut")

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.cut = False

    def push(self, piece: str) -> str:
        """The text that can be shown now. Sets `cut` when a stop string was found."""
        if self.cut:
            return ""
        text = self._held + piece
        # (end, start) of the first completed stop; `find` gives each stop's first, hence earliest end.
        first: tuple[int, int] | None = None
        for stop in self._stops:
            start = text.find(stop)
            if start >= 0 and (first is None or (start + len(stop), start) < first):
                first = (start + len(stop), start)
        if first is not None:
            self.cut = True
            self._held = ""
            return text[: first[1]]
        keep = self._hold(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The end came without a stop string: what was held back."""
        held, self._held = self._held, ""
        return held

    def _hold(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        longest = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:size]):
                    longest = size
                    break
        return longest
