"""Stop strings equal a naive, character-by-character cut, however the text is chunked."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.gateway.stops import StopMatcher

LETTERS = st.text(alphabet="abA ", max_size=40)
STOPS = st.lists(st.text(alphabet="abA ", min_size=1, max_size=5), min_size=1, max_size=4)


def naive(text: str, stops: list[str]) -> tuple[str, bool]:
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


@settings(max_examples=400, deadline=None)
@given(text=LETTERS, stops=STOPS, cuts=st.lists(st.integers(1, 6), min_size=1, max_size=40))
def test_any_chunking_cuts_where_the_naive_cut_does(text: str, stops: list[str], cuts: list[int]) -> None:
    expected, cut = naive(text, stops)
    matcher = StopMatcher(stops)
    shown, position, turn = "", 0, 0
    while position < len(text) and not matcher.cut:
        size = cuts[turn % len(cuts)]
        shown += matcher.push(text[position : position + size])
        position, turn = position + size, turn + 1
        assert expected.startswith(shown), "nothing of a stop string is shown before it is known"
    shown += matcher.flush()
    assert (shown, matcher.cut) == (expected, cut)


def test_only_the_longest_possible_beginning_is_held_back() -> None:
    matcher = StopMatcher(["STOP", "TOPS"])
    assert matcher.push("hello ST") == "hello "
    assert matcher.push("A") == "STA"
    assert matcher.push("xTO") == "x"
    assert matcher.flush() == "TO"
    assert not matcher.cut


def test_nothing_comes_after_the_cut() -> None:
    matcher = StopMatcher(["b"])
    assert matcher.push("abc") == "a" and matcher.cut
    assert matcher.push("more") == "" and matcher.flush() == ""
