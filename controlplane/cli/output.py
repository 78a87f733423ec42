"""What commands share: errors, tables, where the gateway and the state folder are."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    import httpx

REQUEST_SECONDS = 30.0

StateDir = Annotated[
    Path | None,
    typer.Option(
        "--state-dir",
        envvar="DEEPFLOW_HOME",
        help="Folder of the stack's data, logs and sockets.  [default: ~/.local/state/deepflow]",
        show_default=False,
    ),
]
Url = Annotated[
    str | None,
    typer.Option(
        "--url",
        envvar="DEEPFLOW_URL",
        help="The gateway to talk to.  [default: the stack on this machine]",
        show_default=False,
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option("--api-key", envvar="DEEPFLOW_API_KEY", help="API key; none is needed on loopback."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


class CliError(Exception):
    """A command cannot do what was asked; `str()` is the line for the user."""


def fail(message: str) -> NoReturn:
    sys.stderr.write(f"error: {message}\n")
    sys.exit(1)


def note(message: str) -> None:
    """Progress and remarks: on stderr, so that stdout holds results alone."""
    sys.stderr.write(f"{message}\n")
    sys.stderr.flush()


def print_json(value: Any) -> None:
    import json

    sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints aligned columns without ornament, so that they can be cut and grepped."""
    cells = [list(columns), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    for row in cells:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        sys.stdout.write(line.rstrip() + "\n")


def state_paths(state_dir: Path | None) -> Any:
    """The StatePaths of the chosen state folder."""
    from controlplane.local.settings import StatePaths, default_state_dir

    return StatePaths(state_dir.expanduser().absolute() if state_dir else default_state_dir())


def stack_status(state_dir: Path | None) -> dict[str, Any]:
    """What the supervisor says. Raises NotRunning."""
    from controlplane.local.control import ask

    return ask(state_paths(state_dir).control, {"command": "status"})


def gateway_url(url: str | None, state_dir: Path | None) -> str:
    """The given URL, else the running stack's, else the default address."""
    from controlplane.local.errors import NotRunning

    if url:
        return url.rstrip("/").removesuffix("/v1")
    try:
        return str(stack_status(state_dir)["url"])
    except NotRunning:
        from controlplane.local.settings import DEFAULT_HOST, DEFAULT_PORT

        return f"http://{DEFAULT_HOST}:{DEFAULT_PORT}"


def client(base_url: str, api_key: str | None) -> httpx.Client:
    """An HTTP client of the gateway; proxies of the environment are not for loopback."""
    import httpx

    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    loopback = any(base_url.startswith(f"http://{host}") for host in ("127.", "localhost", "[::1]"))
    return httpx.Client(base_url=base_url, headers=headers, timeout=REQUEST_SECONDS, trust_env=not loopback)


def get_json(base_url: str, api_key: str | None, path: str, **params: object) -> Any:
    """GETs JSON. Raises CliError with the gateway's own words."""
    import httpx

    wanted = {key: str(value) for key, value in params.items() if value is not None}
    try:
        with client(base_url, api_key) as http:
            answer = http.get(path, params=wanted)
            if answer.status_code >= 400:
                raise CliError(error_text(answer))
            return answer.json()
    except httpx.TransportError as error:
        raise CliError(unreachable(base_url, error)) from None
    except ValueError:
        raise CliError(f"{base_url}{path} answered something that is no JSON") from None


def program() -> str:
    """What the user typed: `./dev` keeps a stack of its own, which `deepflow` alone would not find."""
    return os.environ.get("DEEPFLOW_PROGRAM") or "deepflow"


def unreachable(base_url: str, error: Exception) -> str:
    return f"no gateway answers at {base_url} ({error or type(error).__name__}); is `{program()} up` running?"


def error_text(answer: httpx.Response) -> str:
    """The message of an OpenAI-shaped error, else the status."""
    try:
        return f"{answer.json()['error']['message']} (HTTP {answer.status_code})"
    except (ValueError, KeyError, TypeError):
        return f"the gateway answered HTTP {answer.status_code}"


def is_terminal() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """Yields `show(done, total)`: a bar on a terminal, one line on stderr elsewhere."""
    if not is_terminal():
        note(f"  {what}")
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def ago(seconds: float) -> str:
    """A duration in its two largest units."""
    whole = max(0, int(seconds))
    units = ((86400, "d"), (3600, "h"), (60, "m"), (1, "s"))
    parts = [
        (whole // size % bound, name) for (size, name), bound in zip(units, (10**9, 24, 60, 60), strict=True)
    ]
    shown = [f"{count}{name}" for count, name in parts if count][:2]
    return " ".join(shown) or "0s"
