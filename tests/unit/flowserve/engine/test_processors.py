"""Logit processors: their state travels as bytes, and bytes that are not theirs are refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowserve.engine.processors import (
    MAX_STATE_BYTES,
    LogitProcessor,
    TokenChoices,
    pack_state,
    register,
    restore,
)

END = 9
sequences = st.lists(st.integers(0, 8), min_size=1, max_size=5)


def allowed(processor: LogitProcessor) -> list[int]:
    logits = processor.apply(torch.zeros(10), [1], [])
    return torch.nonzero(torch.isfinite(logits))[:, 0].tolist()


@given(st.lists(sequences, min_size=1, max_size=5), st.data())
def test_choices_are_written_to_the_end_and_a_handover_changes_nothing(
    choices: list[list[int]], data: st.DataObject
) -> None:
    """At any token the state may move to another executor: both allow the same from there on."""
    processor: LogitProcessor = TokenChoices(choices, END)
    written: list[int] = []
    for _ in range(8):
        moved = restore(processor.state())
        assert moved is not None and moved.state() == processor.state()
        options = allowed(processor)
        assert allowed(moved) == options and options
        token = data.draw(st.sampled_from(options))
        processor.advance(token)
        processor = moved if data.draw(st.booleans()) else processor
        if processor is moved:
            processor.advance(token)
        if token == END:
            break
        written.append(token)
    assert token == END and written in choices


def test_after_the_end_only_the_end_is_left() -> None:
    processor = TokenChoices([[3]], END, written=[3, END])
    assert allowed(processor) == [END]


def test_kept_logits_are_unchanged() -> None:
    logits = TokenChoices([[2], [4, 5]], END).apply(torch.arange(10.0), [], [])
    assert logits[[2, 4]].tolist() == [2.0, 4.0]
    assert torch.isinf(logits).sum() == 8


def test_no_state_is_no_processor() -> None:
    assert restore(b"") is None


GOOD = TokenChoices([[1, 2], [3]], END, written=[1]).state()


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (b"x", "torn"),
        (GOOD[:-1], "torn"),
        (GOOD + b"\0", "torn"),
        (b"XXXX" + GOOD[4:], "another format"),
        (b"\0" * (MAX_STATE_BYTES + 1), "exceeds"),
        (pack_state("regex", 1, b""), "'regex' is not known here; known are .*token_choices"),
        (pack_state("token_choices", 2, b""), "version 2; this executor reads 1"),
        (pack_state("token_choices", 1, b"\1\0\0\0"), "torn"),
        (pack_state("token_choices", 1, b"\1\0\0\0\2\0\0\0\x09\0\0\0\0\0\0\0"), "torn"),
        (pack_state("token_choices", 1, b"\1\0\0\0\0\0\0\0"), "0 groups"),
        (pack_state("token_choices", 1, b"\1\0\0\0" + b"\xff" * 4), "groups"),
    ],
)
def test_states_that_cannot_be_read_are_refused(state: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        restore(state)


@given(st.binary(max_size=200))
def test_any_payload_is_a_processor_or_a_value_error(payload: bytes) -> None:
    try:
        processor = restore(pack_state("token_choices", 1, payload))
    except ValueError:
        return
    assert processor is not None and restore(processor.state()) is not None


@pytest.mark.parametrize("choices", [[], [[1], []], [[1] * 70_000]])
def test_choices_that_say_nothing_or_too_much_are_refused(choices: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="choices"):
        TokenChoices(choices, END)


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="registered already"):
        register(TokenChoices.NAME, TokenChoices.restore)
