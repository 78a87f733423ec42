"""`deepflow jobs` and `explain`: requests as jobs with their tasks, executors and times, from the gateway of
this machine, of a URL, or of a cluster."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from controlplane.cli.cluster import Cluster, Context, Kubeconfig, Namespace, Where, ask_gateway
from controlplane.cli.output import (
    ApiKey,
    AsJson,
    CliError,
    StateDir,
    Url,
    gateway_url,
    get_json,
    print_json,
    table,
)

LongNamespace = Annotated[
    str, typer.Option("--namespace", help="Namespace.  [default: the context's]", show_default=False)
]  # -n is the limit of a list

app = typer.Typer(help="Jobs: what requests became and where they ran.", no_args_is_help=True)


@app.command("list")
def list_jobs(
    *,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=100, help="How many, newest first.")] = 20,
    as_json: AsJson = False,
    url: Url = None,
    api_key: ApiKey = None,
    state_dir: StateDir = None,
    cluster: Cluster = False,
    kubeconfig: Kubeconfig = "",
    context: Context = "",
    namespace: LongNamespace = "",
) -> None:
    """List the newest jobs."""
    where = Where(cluster, kubeconfig, context, namespace)
    if where.given:
        answer = ask_gateway(where, ("jobs", "list", "--limit", str(limit)))
    else:
        answer = get_json(gateway_url(url, state_dir), api_key, "/deepflow/v1/jobs", limit=limit)
    if as_json:
        print_json(answer)
        return
    table(
        ("JOB", "STATE", "MODEL", "TENANT", "EXECUTORS", "TOKENS", "FIRST TOKEN", "TOOK", "CREATED"),
        [_row(job) for job in answer["data"]],
    )


def _row(job: dict[str, Any]) -> tuple[object, ...]:
    tasks = job.get("tasks", [])
    begun = job.get("created_at")
    return (
        job["id"],
        job.get("state", "-"),
        job.get("model", "-"),
        job.get("tenant", "-"),
        ", ".join(dict.fromkeys(te for task in tasks for te in _executors(task))) or "-",
        sum(task.get("output_tokens", 0) for task in tasks),
        _seconds(begun, job.get("first_token_at")),
        _seconds(begun, job.get("ended_at")),
        time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(begun)) if begun else "-",
    )


def _executors(task: dict[str, Any]) -> list[str]:
    found = [attempt["te_id"] for attempt in task.get("attempts", []) if attempt.get("te_id")]
    return found or [task["te_id"]] if task.get("te_id") else found


@app.command()
def show(
    *,
    job_id: Annotated[str, typer.Argument(metavar="ID", help="Job id, as `deepflow jobs list` shows it.")],
    as_json: AsJson = False,
    url: Url = None,
    api_key: ApiKey = None,
    state_dir: StateDir = None,
    cluster: Cluster = False,
    kubeconfig: Kubeconfig = "",
    context: Context = "",
    namespace: Namespace = "",
) -> None:
    """Show one job: its tasks, their attempts, executors and times."""
    where = Where(cluster, kubeconfig, context, namespace)
    job = _job(job_id, where, url=url, api_key=api_key, state_dir=state_dir)
    if as_json:
        print_json(job)
        return
    for name in ("id", "kind", "state", "request_id", "tenant", "model", "model_revision", "error"):
        if job.get(name):
            print(f"{name:16}{job[name]}")
    print(f"{'first token':16}{_seconds(job.get('created_at'), job.get('first_token_at'))}")
    print(f"{'took':16}{_seconds(job.get('created_at'), job.get('ended_at'))}\n")
    table(
        (
            "TASK",
            "ATTEMPT",
            "KIND",
            "EXECUTOR",
            "WHY",
            "QUEUED",
            "TRANSFER",
            "COMPUTE",
            "TOKENS",
            "CACHED",
            "END",
        ),
        [
            _attempt_row(task, attempt)
            for task in job.get("tasks", [])
            for attempt in task.get("attempts", [])
        ],
    )


def _job(
    job_id: str, where: Where, *, url: str | None, api_key: str | None, state_dir: Path | None
) -> dict[str, Any]:
    """The job's record. Raises CliError."""
    from urllib.parse import quote

    if where.given:
        if job_id.startswith("-"):
            raise CliError(f"{job_id!r} is no job id")
        found: dict[str, Any] = ask_gateway(where, ("jobs", "show", job_id))
    else:
        path = f"/deepflow/v1/jobs/{quote(job_id, safe='')}"
        found = get_json(gateway_url(url, state_dir), api_key, path)
    return found


def _attempt_row(task: dict[str, Any], attempt: dict[str, Any]) -> tuple[object, ...]:
    return (
        task.get("index", "-"),
        attempt.get("attempt", "-"),
        attempt.get("kind", "-"),
        attempt.get("te_id", "-"),
        attempt.get("reason") or "-",
        *(_seconds(0.0, attempt.get(f"{name}_seconds")) for name in ("queued", "transfer", "compute")),
        attempt.get("tokens", "-"),
        "-" if attempt.get("cached_tokens") is None else attempt["cached_tokens"],
        attempt.get("outcome") or "runs",
    )


def _seconds(begun: float | None, ended: float | None) -> str:
    return "-" if begun is None or ended is None else f"{ended - begun:.2f} s"


def explain(
    *,
    job_id: Annotated[str, typer.Argument(metavar="JOB", help="Job id, as `deepflow jobs list` shows it.")],
    as_json: AsJson = False,
    url: Url = None,
    api_key: ApiKey = None,
    state_dir: StateDir = None,
    cluster: Cluster = False,
    kubeconfig: Kubeconfig = "",
    context: Context = "",
    namespace: Namespace = "",
) -> None:
    """Explain each placement of a job: who was a candidate, what it would have cost, why others were not."""
    where = Where(cluster, kubeconfig, context, namespace)
    job = _job(job_id, where, url=url, api_key=api_key, state_dir=state_dir)
    attempts = [(task, attempt) for task in job.get("tasks", []) for attempt in task.get("attempts", [])]
    if as_json:
        print_json([{"task": task["index"], **attempt} for task, attempt in attempts])
        return
    if not attempts:
        print(f"{job['id']} was not placed: {job.get('error') or job.get('state')}")
    for task, attempt in attempts:
        decision = attempt.get("decision")
        print(
            f"task {task['index']} attempt {attempt['attempt']}: {attempt['kind']} on {attempt['te_id']}"
            f" ({attempt['reason']}), ended: {attempt.get('outcome') or 'runs'}"
        )
        if not decision:
            continue
        if decision["heat"] is not None:
            print(f"heat map {decision['heat']:+.2f} (above 0: split)")
        print(f"{decision['candidates']} candidates")
        table(
            ("EXECUTOR", "QUEUE", "PREFILL", "PRESSURE", "CACHED", "TOTAL", ""),
            [_score_row(te_id, scores, attempt["te_id"]) for te_id, scores in decision["scores"].items()],
        )
        for te_id, why in decision["dropped"].items():
            print(f"not {te_id}: {why}")
        print()


def _score_row(te_id: str, scores: dict[str, float], chosen: str) -> tuple[object, ...]:
    seconds = [scores[name] for name in ("queue", "prefill", "pressure")]
    shown = (f"{value:.3f} s" for value in seconds)
    return (te_id, *shown, scores["cached_tokens"], f"{sum(seconds):.3f} s", "<" if te_id == chosen else "")
