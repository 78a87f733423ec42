"""Topologies: what parses, and that everything else is refused with a reason."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.local.topology import (
    MAX_EXECUTORS,
    RoleName,
    TopologyError,
    assign,
    parse_topology,
    split_model,
)

C, P, D = RoleName.COLOCATED, RoleName.PREFILL, RoleName.DECODE


@pytest.mark.parametrize(
    ("text", "roles"),
    [
        ("1C", (C,)),
        ("2C", (C, C)),
        ("1P1D", (P, D)),
        ("2p2d", (P, P, D, D)),
        ("1C1P1D", (C, P, D)),
        ("1P1C", (P, C)),
    ],
)
def test_topologies_name_roles_in_order(text: str, roles: tuple[RoleName, ...]) -> None:
    assert parse_topology(text).roles == roles


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no topology"),
        ("C", "no topology"),
        ("1", "no topology"),
        ("1P 1D", "no topology"),
        ("1P1Dx", "no topology"),
        ("-1C", "no topology"),
        ("1X", "unknown role 'X'"),
        ("1C1C", "names C twice"),
        ("0C", "count of 0"),
        ("1P", "nobody to decode"),
        ("2D", "nobody to prefill"),
        ("9999C", "more than"),
        ("1P64D", "more than"),
    ],
)
def test_what_is_no_topology_is_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(TopologyError, match=reason):
        parse_topology(text)


@given(st.lists(st.sampled_from("CPD"), unique=True, min_size=1), st.data())
def test_every_topology_reads_back_as_itself(letters: list[str], data: st.DataObject) -> None:
    counts = [data.draw(st.integers(1, MAX_EXECUTORS // 3)) for _ in letters]
    text = "".join(f"{count}{letter}" for count, letter in zip(counts, letters, strict=True))
    if letters in (["P"], ["D"]):
        with pytest.raises(TopologyError):
            parse_topology(text)
        return
    topology = parse_topology(text)
    assert str(topology) == text
    assert len(topology.roles) == sum(counts)


@given(st.text(max_size=12))
def test_any_text_parses_or_is_refused(text: str) -> None:
    try:
        assert 1 <= len(parse_topology(text).roles) <= MAX_EXECUTORS
    except TopologyError as error:
        assert text in str(error)


def test_models_may_have_topologies_of_their_own() -> None:
    assert assign(["a", "b"], ["2C", "b=1P1D"], "1C") == {
        "a": parse_topology("2C"),
        "b": parse_topology("1P1D"),
    }
    assert assign(["a"], [], "1P1D") == {"a": parse_topology("1P1D")}
    with pytest.raises(TopologyError, match="no model 'c'"):
        assign(["a"], ["c=1C"], "1C")
    with pytest.raises(TopologyError, match="several topologies"):
        assign(["a"], ["1C", "2C"], "1C")


@pytest.mark.parametrize(
    ("text", "uri", "model_id"),
    [
        ("file:///a.gguf=mine", "file:///a.gguf", "mine"),
        ("file:///a.gguf", "file:///a.gguf", None),
        ("pypi://p==1.0/a.gguf", "pypi://p==1.0/a.gguf", None),
        ("pypi://p==1.0/a.gguf=mine", "pypi://p==1.0/a.gguf", "mine"),
        ("hf://o/n@v1=my.model:1", "hf://o/n@v1", "my.model:1"),
        (f"file:///a#sha256={'0' * 64}", f"file:///a#sha256={'0' * 64}", None),
        (f"file:///a#sha256={'0' * 64}=mine", f"file:///a#sha256={'0' * 64}", "mine"),
    ],
)
def test_an_id_after_the_uri_is_told_from_a_version(text: str, uri: str, model_id: str | None) -> None:
    assert split_model(text) == (uri, model_id)
