"""Traces as published, superposed and stretched; drawn workloads follow their seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from controlplane.twin.workload import (
    Phase,
    WorkloadError,
    build,
    merge,
    phases,
    poisson,
    read_trace,
    superpose,
)

TRACES = Path(__file__).parents[3] / "traces"
AZURE = TRACES / "azure_llm_conv_2023.csv.xz"
MOONCAKE = TRACES / "mooncake_conversation.jsonl.xz"


def test_the_azure_trace_reads_as_published() -> None:
    trace = read_trace(AZURE)
    assert len(trace) == 19_366
    assert (trace.prompt[0], trace.output[0]) == (374, 44)
    assert trace.span == pytest.approx(3501.72, abs=0.01)
    assert len(trace.units) == 0


def test_the_mooncake_trace_reads_as_published() -> None:
    trace = read_trace(MOONCAKE)
    assert len(trace) == 12_031
    assert (trace.prompt[0], trace.output[0], trace.unit_tokens) == (6758, 500, 512)
    assert list(trace.units[trace.first[0] : trace.first[1]]) == list(range(14))
    assert len(np.unique(trace.units)) == 182_790


@pytest.mark.parametrize(
    "content", [b"", b"a,b\n1,2\n", b'{"timestamp": 1}\n', b"TIMESTAMP,ContextTokens\nx,1\n"]
)
def test_what_is_no_trace_is_refused_with_its_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "odd.csv"
    path.write_bytes(content)
    with pytest.raises(WorkloadError, match="odd"):
        read_trace(path)
    with pytest.raises(WorkloadError, match="cannot be read"):
        read_trace(tmp_path / "absent.csv.xz")


def test_superposed_copies_share_no_prefix_and_arrive_at_the_rate() -> None:
    trace = read_trace(MOONCAKE)
    made = superpose(trace, 30_000, 50.0, seed=1)
    assert len(made) == 30_000
    assert made.rate == pytest.approx(50.0)
    assert (np.diff(made.arrival) >= 0).all()
    # Unit 0 is the prompt start that every request of the trace shares: one of it a copy, so three here.
    starts = made.units[made.first[:-1]]
    values, counts = np.unique(starts, return_counts=True)
    assert (counts > 1000).sum() == 3
    assert np.isin(values[counts > 1000] % (int(trace.units.max()) + 1), [0]).all()


def test_equal_seeds_make_equal_workloads() -> None:
    trace = read_trace(AZURE)
    one, two, other = (superpose(trace, 500, 5.0, seed) for seed in (1, 1, 2))
    assert (one.prompt == two.prompt).all()
    assert not (one.prompt == other.prompt).all()
    assert (poisson(1000, 256, 2.0, 50, 3).arrival == poisson(1000, 256, 2.0, 50, 3).arrival).all()


def test_capped_requests_fit_a_context() -> None:
    capped = read_trace(MOONCAKE).capped(8192)
    assert (capped.prompt + capped.output < 8192).all()
    assert capped.prompt.min() >= 1
    assert capped.output.min() >= 1


def test_phases_follow_each_other_with_their_own_shapes() -> None:
    work = phases([Phase(60, 10, 4000, 32), Phase(60, 10, 200, 500)], seed=0)
    early, late = work.arrival < 60, work.arrival >= 60
    assert np.median(work.prompt[early]) == pytest.approx(4000, rel=0.1)
    assert np.median(work.output[late]) == pytest.approx(500, rel=0.1)
    assert len(work) == pytest.approx(1200, rel=0.15)


def test_merged_tenants_keep_their_prefixes_apart() -> None:
    part = build("p", [0.0, 1.0], [600, 700], [5, 5], units=[[0], [0]], tenant=[0, 0])
    both = merge([part, part], "both")
    assert both.arrival.tolist() == [0.0, 0.0, 1.0, 1.0]
    assert sorted(both.units.tolist()) == [0, 0, 1, 1]


def test_columns_of_different_length_are_refused() -> None:
    with pytest.raises(WorkloadError, match="length"):
        build("x", [0.0, 1.0], [5], [5, 5])
    with pytest.raises(WorkloadError, match="requests"):
        build("x", [], [], [])
