"""`deepflow models`: what can be served, what lies in the cache, fetching more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from controlplane.cli.output import (
    ApiKey,
    AsJson,
    CliError,
    StateDir,
    Url,
    gateway_url,
    get_json,
    is_terminal,
    note,
    print_json,
    table,
)

if TYPE_CHECKING:
    from controlplane.nodeagent.sources import FetchedModel, Progress

app = typer.Typer(help="Models: fetch them, list them.", no_args_is_help=True)


@app.command()
def pull(
    uri: Annotated[
        list[str] | None,
        typer.Argument(metavar="[URI]...", help="Model URIs; none = the default model.", show_default=False),
    ] = None,
) -> None:
    """Fetch models into the cache ($DEEPFLOW_CACHE, else ~/.cache/deepflow) and verify them."""
    from controlplane.nodeagent.uri import DEFAULT_MODEL_URI

    for each in uri or [DEFAULT_MODEL_URI]:
        fetched = fetch_with_bar(each)
        print(f"{fetched.path}  sha256:{fetched.sha256}")


@app.command("list")
def list_models(
    as_json: AsJson = False, url: Url = None, api_key: ApiKey = None, state_dir: StateDir = None
) -> None:
    """List cached models, and those that the gateway serves if one runs."""
    from controlplane.nodeagent.sources import cached_models

    cached = cached_models()
    try:
        served = [
            entry["id"] for entry in get_json(gateway_url(url, state_dir), api_key, "/v1/models")["data"]
        ]
    except CliError:
        if url:
            raise
        served = []
    if as_json:
        print_json({"served": served, "cached": [_row(model) for model in cached]})
        return
    table(("SERVED",), [(name,) for name in served] or [("(no gateway runs here)",)])
    print()
    table(
        ("CACHED", "SIZE", "SHA256"),
        [(model.uri, f"{model.bytes / 1e6:.0f} MB", model.sha256[:12]) for model in cached],
    )


def _row(model: FetchedModel) -> dict[str, object]:
    return {"uri": model.uri, "path": str(model.path), "bytes": model.bytes, "sha256": model.sha256}


def fetch_with_bar(uri: str) -> FetchedModel:
    """`sources.fetch` with a progress bar on a terminal, and with a line per phase elsewhere."""
    from controlplane.nodeagent.sources import fetch

    if not is_terminal():
        said: set[str] = set()

        def say(progress: Progress) -> None:
            if progress.phase not in said and progress.phase in ("waiting", "downloading"):
                said.add(progress.phase)
                note(f"  {progress.phase} {uri}")

        return fetch(uri, progress=say)

    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("  {task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        name = uri.rsplit("/", 1)[-1]
        task = bar.add_task(name, total=None)

        def show(progress: Progress) -> None:
            bar.update(
                task, completed=progress.done, total=progress.total, description=f"{progress.phase} {name}"
            )

        return fetch(uri, progress=show)
