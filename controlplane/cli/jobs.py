"""`deepflow jobs`: requests as jobs with their tasks, executors and times, from the gateway."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from controlplane.cli.output import ApiKey, AsJson, StateDir, Url, gateway_url, get_json, print_json, table

app = typer.Typer(help="Jobs: what requests became and where they ran.", no_args_is_help=True)


@app.command("list")
def list_jobs(
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=100, help="How many, newest first.")] = 20,
    as_json: AsJson = False,
    url: Url = None,
    api_key: ApiKey = None,
    state_dir: StateDir = None,
) -> None:
    """List the newest jobs."""
    answer = get_json(gateway_url(url, state_dir), api_key, "/deepflow/v1/jobs", limit=limit)
    if as_json:
        print_json(answer)
        return
    jobs = answer.get("data", answer) if isinstance(answer, dict) else answer
    columns = ("id", "kind", "state", "model", "tenant", "created")
    table(
        [column.upper() for column in columns], [[_cell(job, column) for column in columns] for job in jobs]
    )


@app.command()
def show(
    job_id: Annotated[str, typer.Argument(metavar="ID", help="Job id, as `deepflow jobs list` shows it.")],
    url: Url = None,
    api_key: ApiKey = None,
    state_dir: StateDir = None,
) -> None:
    """Show one job: its tasks, their attempts, executors and times."""
    from urllib.parse import quote

    path = f"/deepflow/v1/jobs/{quote(job_id, safe='')}"
    print_json(get_json(gateway_url(url, state_dir), api_key, path))


def _cell(job: dict[str, Any], name: str) -> object:
    value = job.get(name)
    if value is None:  # the record may say it more precisely: model_id, created_at
        value = next((job[key] for key in job if key.startswith(f"{name}_")), "-")
    if name == "created" and isinstance(value, int | float):
        import time

        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(value))
    return value
