"""A choice's text and logprobs over tokens, ends and stop strings. Needs the small model's tokenizer."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from controlplane.gateway.answer import Choice, Entry
from controlplane.gateway.detokenize import TokenTable
from controlplane.jobs.serving import TokenLogprobs
from tests.unit.controlplane.gateway.test_stops import naive

EOS = 2
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def logprobs(tokens: list[int]) -> list[TokenLogprobs]:
    return [TokenLogprobs(token, -1.0, 1) for token in tokens]


@QUICK
@given(
    text=st.text(alphabet="abc é🌍", min_size=1, max_size=30),
    stops=st.lists(st.text(alphabet="abc é🌍", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(1, 5), min_size=1, max_size=10),
    with_logprobs=st.booleans(),
)
def test_text_is_the_naive_cut_and_logprobs_belong_to_it(
    table: TokenTable, tokenizer: Tokenizer, text: str, stops: list[str], cuts: list[int], with_logprobs: bool
) -> None:
    tokens = [*tokenizer.encode(text).ids, EOS]
    expected, cut = naive(text, stops)
    choice = Choice(table, stops=stops, end_ids=frozenset([EOS]), with_logprobs=with_logprobs)
    shown, position, turn = "", 0, 0
    entries: list[Entry] = []
    while choice.finish is None:
        chunk = tokens[position : position + cuts[turn % len(cuts)]]
        position, turn = position + len(chunk), turn + 1
        finish = "stop" if position >= len(tokens) else None
        piece = choice.push(chunk, logprobs(chunk) if with_logprobs else None, finish)
        shown += piece.text
        entries += piece.entries
    assert shown == expected and choice.finish == "stop"
    if not cut:
        assert choice.completion_tokens == len(tokens)
    if with_logprobs:
        ids = [entry.logprobs.token for entry in entries]
        assert ids == tokens[: len(ids)] and EOS not in ids
        joined = b"".join(table.raw(token) for token in ids).decode(errors="ignore")
        assert joined.startswith(shown) or shown.startswith(joined)
        assert all(entry.offset < max(len(shown), 1) for entry in entries)
    assert choice.push([5], None, None).text == "", "nothing follows the end"


def test_a_stop_string_ends_a_running_task(table: TokenTable, tokenizer: Tokenizer) -> None:
    choice = Choice(table, stops=["two"])
    piece = choice.push(tokenizer.encode("one two three").ids, None, None)
    assert (piece.text, piece.finish, piece.stopped) == ("one ", "stop", True)
    assert choice.completion_tokens == 2, "tokens after the stop are not counted"


def test_stop_strings_wait_for_min_tokens(table: TokenTable, tokenizer: Tokenizer) -> None:
    choice = Choice(table, stops=["one", "three"], min_tokens=1)
    piece = choice.push(tokenizer.encode("one two three").ids, None, None)
    assert (piece.text, piece.finish) == ("one two ", "stop")


def test_end_tokens_are_counted_and_not_shown(table: TokenTable, tokenizer: Tokenizer) -> None:
    stop = tokenizer.encode(" there").ids[0]
    choice = Choice(table, end_ids=frozenset([EOS, stop]))
    piece = choice.push([*tokenizer.encode("hi").ids, stop], None, "stop")
    assert (piece.text, piece.finish, choice.completion_tokens) == ("hi", "stop", 2)
    limited = Choice(table, end_ids=frozenset([EOS, stop]))
    assert limited.push([stop], None, "length").text == " there", "it did not end the answer"
