"""`deepflow simulate` and `deepflow calibrate` as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from controlplane.cli import app
from controlplane.cli.output import CliError
from controlplane.twin.costs import load_profile

TRACES = Path(__file__).parents[3] / "traces"
RUNNER = CliRunner()


def run(*arguments: str) -> str:
    result = RUNNER.invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_trace_is_replayed_under_two_policies_with_plots(tmp_path: Path) -> None:
    trace = str(TRACES / "azure_llm_conv_2023.csv.xz")
    out = run("simulate", "--trace", trace, "--requests", "200", "-n", "4", "--plots", str(tmp_path / "p"))
    assert [line.split()[0] for line in out.splitlines()] == ["POLICY", "deepflow", "least-requests"]
    assert (tmp_path / "p" / "ttft.svg").read_text().startswith("<svg")
    assert (tmp_path / "p" / "roles-deepflow.svg").exists()


def test_json_says_what_was_simulated() -> None:
    out = run(
        "simulate", "--synthetic", "1k", "--requests", "100", "-n", "4", "--rate", "9",
        "--policy", "static-split", "--prefill-share", "0.5", "--json",
    )  # fmt: skip
    data = json.loads(out)
    assert (data["requests"], data["executors"], data["prefill_share"]) == (100, 4, {"static-split": 0.5})
    assert data["rate"] == pytest.approx(9.0)
    assert data["policies"][0]["ended"] == 100
    assert "not measured" in data["profile_source"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "one of --trace and --synthetic"),
        (["--synthetic", "2k"], "give 1k, 5k, 10k or phases"),
        (["--synthetic", "1k", "--policy", "luck"], "unknown policy luck"),
        (["--synthetic", "1k", "--policy", "static-split", "-n", "1"], "two executors"),
        (["--synthetic", "1k", "--profile", "absent.json"], "absent.json is no cost profile"),
        (["--trace", "absent.csv"], "absent.csv cannot be read"),
    ],
)
def test_bad_input_is_one_clear_line(arguments: list[str], words: str) -> None:
    with pytest.raises(CliError, match=words):
        RUNNER.invoke(app, ["simulate", *arguments], catch_exceptions=False)


@pytest.mark.slow
@pytest.mark.model
def test_a_calibrated_profile_simulates(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    out = run("calibrate", "--rounds", "1", "-o", str(path))
    assert "chunk of 512 at 0" in out
    profile = load_profile(path)
    assert profile.curve(512) > profile.curve(1) > 0
    heat = tmp_path / "heat.json"
    run("calibrate", "--profile", str(path), "--heat-map", str(heat))
    assert json.loads(heat.read_text())["prefills"][0] == 64
    run("simulate", "--synthetic", "1k", "--requests", "20", "-n", "2", "--profile", str(path))
