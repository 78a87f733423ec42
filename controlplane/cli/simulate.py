"""`deepflow simulate`: policies side by side on the digital twin."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from controlplane.cli.output import CliError, note, print_json, progress_bar, table

if TYPE_CHECKING:
    from controlplane.twin.cluster import Cluster
    from controlplane.twin.costs import CostProfile
    from controlplane.twin.workload import Workload

SYNTHETIC = {"1k": 1000, "5k": 5000, "10k": 10_000}
SYNTHETIC_OUTPUT = 256  # FlowKV's simulated data
PHASE_SECONDS = 120.0


def simulate(  # noqa: PLR0917  # options of a command
    trace: Annotated[
        Path | None,
        typer.Option("--trace", help="Azure CSV or Mooncake JSON lines, plain or .xz.", show_default=False),
    ] = None,
    synthetic: Annotated[
        str | None,
        typer.Option(
            "--synthetic",
            help="Poisson: 1k, 5k or 10k prompt tokens, 256 out; or `phases`.",
            show_default=False,
        ),
    ] = None,
    profile: Annotated[
        str, typer.Option("--profile", help="A file of `deepflow calibrate`, or 8b-roofline (not measured).")
    ] = "8b-roofline",
    executors: Annotated[int, typer.Option("--executors", "-n", min=1, max=20_000)] = 16,
    requests: Annotated[int, typer.Option("--requests", min=1, max=4_000_000)] = 4000,
    load: Annotated[float, typer.Option("--load", min=0.01, help="Arrivals as a share of capacity.")] = 0.8,
    rate: Annotated[
        float | None,
        typer.Option("--rate", min=0.001, help="Requests per second instead of --load.", show_default=False),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            help="One or more; `all` for each.  [default: deepflow, least-requests]",
            show_default=False,
        ),
    ] = None,
    prefill_share: Annotated[
        float | None,
        typer.Option(
            "--prefill-share",
            min=0.01,
            max=0.99,
            help="Of fixed roles; none: the best of eighths.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    heat_map: Annotated[
        Path | None,
        typer.Option("--heat-map", help="Of `deepflow calibrate`, for our policy.", show_default=False),
    ] = None,
    slo_ttft: Annotated[float, typer.Option("--slo-ttft", min=0.001, help="Seconds.")] = 2.0,
    slo_tpot: Annotated[float, typer.Option("--slo-tpot", min=0.0001, help="Seconds per token.")] = 0.1,
    slo_ttft_per_token: Annotated[
        float, typer.Option("--slo-ttft-per-token", min=0, help="Added for each prompt token.")
    ] = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    plots: Annotated[
        Path | None, typer.Option("--plots", help="Folder for SVG plots.", show_default=False)
    ] = None,
) -> None:
    """Replay traffic on a simulated cluster under one or more policies.

    Placement and role control are the code that gateways run; executors take the time their profile says.
    """
    from dataclasses import asdict

    from controlplane.twin.costs import ProfileError
    from controlplane.twin.heatmap import read as read_heat_map
    from controlplane.twin.results import Slo, summarize
    from controlplane.twin.scenario import OURS, POLICIES, SPLIT, UnknownPolicy, best_share
    from controlplane.twin.scenario import simulate as run
    from controlplane.twin.workload import WorkloadError

    slo = Slo(slo_ttft, slo_tpot, slo_ttft_per_token)
    names = list(POLICIES) if policy == ["all"] else policy or [OURS, "least-requests"]
    unknown = sorted(set(names) - set(POLICIES))
    if unknown:
        raise CliError(f"unknown policy {', '.join(unknown)}; there are {', '.join(POLICIES)}")
    if executors == 1 and set(names) & set(SPLIT):
        raise CliError("a split needs two executors")
    try:
        costs = _profile(profile)
        heat = read_heat_map(heat_map) if heat_map is not None else None
        work, whole = _workload(trace, synthetic, costs, executors, requests, load, rate, seed)
        clusters: dict[str, Cluster] = {}
        shares: dict[str, float] = {}
        for name in names:
            share = prefill_share
            if name in SPLIT and share is None:
                note(f"  {name}: looking for its best ratio")
                share, _ = best_share(work, costs, name, executors, slo, seed=seed)
            if name in SPLIT and share is not None:
                shares[name] = share
            with progress_bar(f"simulating {name}") as progress:
                clusters[name] = run(
                    work,
                    costs,
                    name,
                    executors,
                    seed=seed,
                    prefill_share=share,
                    slo=slo,
                    heat_map=heat,
                    progress=progress,
                )
    except (ProfileError, WorkloadError, UnknownPolicy) as error:
        raise CliError(str(error)) from None
    summaries = {name: summarize(cluster, slo) for name, cluster in clusters.items()}
    if plots is not None:
        _plot(plots, clusters)
    if as_json:
        print_json(
            {
                "workload": work.name, "requests": len(work), "rate": work.rate, "seed": seed,
                "profile": costs.name, "profile_source": costs.source, "executors": executors,
                "capacity": whole, "slo": asdict(slo), "prefill_share": shares,
                "policies": [summary.to_json() for summary in summaries.values()],
            }
        )  # fmt: skip
        return
    against = f", {work.rate / whole:.2f} of capacity" if whole else ""
    note(
        f"{work.name}: {len(work)} requests at {work.rate:.3g}/s{against}; "
        f"{executors} executors, {costs.name} ({costs.source})"
    )
    table(
        ("POLICY", "TTFT", "P99", "TPOT", "P99", "GOODPUT", "IN SLO", "CACHED", "SPLIT", "DROPPED"),
        [
            (
                name + (f" {shares[name]:.0%} prefill" if name in shares else ""),
                f"{s.ttft_mean:.3f} s", f"{s.ttft_p99:.3f} s", f"{1e3 * s.tpot_mean:.1f} ms",
                f"{1e3 * s.tpot_p99:.1f} ms", f"{s.goodput:.3g}/s", f"{s.attained:.1%}", f"{s.cached:.1%}",
                f"{s.split:.0%}", s.dropped,
            )
            for name, s in summaries.items()
        ],
    )  # fmt: skip


def _profile(name: str) -> CostProfile:
    from controlplane.twin.costs import load_profile, roofline_profile

    return roofline_profile() if name == "8b-roofline" else load_profile(name)


def _workload(  # noqa: PLR0917  # the command's options
    trace: Path | None,
    synthetic: str | None,
    profile: CostProfile,
    executors: int,
    requests: int,
    load: float,
    rate: float | None,
    seed: int,
) -> tuple[Workload, float | None]:
    """(the requests at their rate, capacity in requests per second if it was looked for)."""
    from controlplane.twin.scenario import capacity
    from controlplane.twin.workload import Phase, phases, poisson, read_trace, superpose

    if (trace is None) == (synthetic is None):
        raise CliError("give one of --trace and --synthetic")
    if trace is not None:
        made = superpose(read_trace(trace), requests, 1.0, seed)
    elif synthetic == "phases":
        heavy, light = (
            Phase(PHASE_SECONDS, requests / 3 / PHASE_SECONDS, *shape) for shape in ((4000, 32), (256, 512))
        )
        made = phases([heavy, light, heavy], seed)
    elif synthetic in SYNTHETIC:
        made = poisson(SYNTHETIC[synthetic], SYNTHETIC_OUTPUT, 1.0, requests, seed)
    else:
        raise CliError(f"--synthetic {synthetic}: give {', '.join(SYNTHETIC)} or phases")
    made = made.capped(min(profile.max_model_len, profile.kv_tokens))
    if rate is not None:
        return made.at_rate(rate), None
    whole = capacity(made, profile, executors, seed=seed)
    return made.at_rate(load * whole), whole


def _plot(folder: Path, clusters: dict[str, Cluster]) -> None:
    from controlplane.twin.plots import distribution, roles, utilisation
    from controlplane.twin.results import tpot, ttft

    first = {name: ttft(cluster) for name, cluster in clusters.items()}
    per_token = {name: tpot(cluster) for name, cluster in clusters.items()}
    files = {
        "ttft.svg": distribution("Time to first token", "seconds", first),
        "tpot.svg": distribution("Time per output token", "seconds", per_token),
    }
    for name, cluster in clusters.items():
        files[f"roles-{name}.svg"] = roles(f"Roles, {name}", cluster.timeline)
        files[f"utilisation-{name}.svg"] = utilisation(f"Utilisation, {name}", cluster.timeline)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            (folder / file).write_text(text)
    except OSError as error:
        raise CliError(f"plots cannot be written: {error}") from None
    note(f"plots: {', '.join(files)} in {folder}")
