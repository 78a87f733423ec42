"""The `deepflow` command: starts and stops a stack on this machine, and talks to any gateway.

Commands live in `stack` (up, down, status, roles), `models`, `jobs` (with `explain`), `chat`, `keys`,
`calibrate`, `simulate`, and for clusters `crds` and `uninstall`; `output` holds what they share. Heavy
imports happen inside commands, so that `deepflow --help` answers at once.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from controlplane.cli import (
    bench,
    calibrate,
    chat,
    cluster,
    crds,
    jobs,
    keys,
    models,
    operator,
    simulate,
    stack,
    uninstall,
)
from controlplane.cli.output import CliError, fail, program
from controlplane.local.errors import AlreadyRunning, NotRunning, StackError
from controlplane.local.topology import TopologyError
from controlplane.nodeagent.errors import SourceError

INTERRUPTED = 130  # 128 + SIGINT, as shells count

app = typer.Typer(
    name="deepflow",
    help="Serve language models on this machine, and look at what runs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("up")(stack.up)
app.command("down")(stack.down)
app.command("status")(stack.status)
app.command("top")(cluster.top)
app.command("chat")(chat.chat)
app.command("explain")(jobs.explain)
app.command("calibrate")(calibrate.calibrate)
app.command("operator")(operator.operator)
app.command("simulate")(simulate.simulate)
app.command("uninstall")(uninstall.uninstall)
app.add_typer(bench.app, name="bench")
app.add_typer(crds.app, name="crds")
app.add_typer(models.app, name="models")
app.add_typer(jobs.app, name="jobs")
app.add_typer(keys.app, name="keys")
app.add_typer(stack.roles_app, name="roles")


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"deepflow {version('deepflow')}")
        raise typer.Exit


@app.callback()
def _root(
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point. Expected failures are one clear line on stderr and exit code 1."""
    try:
        app()
    except (CliError, StackError, SourceError, TopologyError) as error:
        fail(str(error))
    except NotRunning:
        fail(f"no stack runs here; start one with `{program()} up`")
    except AlreadyRunning as error:
        fail(f"another supervisor is using {error}; see `{program()} status`")
    except KeyboardInterrupt:
        sys.stderr.write("\n")
        sys.exit(INTERRUPTED)
