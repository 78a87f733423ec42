"""`deepflow bench`: what this machine does, measured here and now."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from controlplane.cli.output import CliError, note, table

if TYPE_CHECKING:
    from controlplane.local.starts import Node

app = typer.Typer(no_args_is_help=True, help="Measure this machine.")

WIDTH = 60  # of the drawn waterfall, characters
KV_BYTES = 16 << 20  # small pools: what is measured is the start
LETTERS = {"scaler_pre": "p", "te_pre_load": "i", "te_load": "l", "te_post_load": "o", "rest": "r"}
MEANINGS = (
    "p: until its process was there · i: imports · l: weights · o: pool, engine, dummy step · "
    "r: polls, calls, the request"
)


@app.callback()
def bench() -> None:
    """Keeps `scale` a command of its own."""


@app.command("scale")
def scale(
    executors: Annotated[
        int, typer.Option("--executors", "-n", min=1, max=256, help="How many from zero at once.")
    ] = 8,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Model URI.  [default: the default model]", show_default=False),
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16 or float32.")] = "auto",
) -> None:
    """From a decision to the first token: one executor by each path, then many at once.

    Starts executors of its own on the CPU, without a gateway, and ends them. Needs no running stack and
    disturbs one: use an idle machine.
    """
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # else it tells of every program we start
    from controlplane.local.starts import StartFailed
    from controlplane.nodeagent.errors import SourceError
    from controlplane.nodeagent.sources import fetch
    from controlplane.nodeagent.uri import DEFAULT_MODEL_URI

    try:
        path = fetch(model or DEFAULT_MODEL_URI).path
        asyncio.run(_scale(path, dtype, executors))
    except (StartFailed, SourceError) as error:
        raise CliError(str(error)) from None


async def _scale(model: Path, dtype: str, executors: int) -> None:
    from controlplane.local import starts

    note("waiting for the template process")
    async with starts.node(model, dtype) as node:
        waterfalls: list[tuple[str, float, dict[str, float]]] = []
        for path in ("cold", "warm", "hot"):
            note(f"{path}: one executor")
            waterfalls.append((path, *await _one(node, path)))
        draw(waterfalls)
        note(f"{executors} at once, weights in the node's memory")
        started = time.perf_counter()
        made = [node.add(forked=True) for _ in range(executors)]
        ends = await asyncio.gather(*(node.first_token(one, KV_BYTES) for one in made))
        seconds = sorted(end - started for end in ends)
        rows = [["first", f"{seconds[0]:.2f}"], ["half", f"{seconds[len(seconds) // 2]:.2f}"]]
        table(["ANSWERED", "SECONDS"], [*rows, ["all", f"{seconds[-1]:.2f}"]])
        await asyncio.gather(*(node.remove(one) for one in made))


async def _one(node: Node, path: str) -> tuple[float, dict[str, float]]:
    """Seconds until the first token, and the steps on the way."""
    from controlplane.local import starts

    if path != "hot":
        node.forget_weights()
    if path == "cold":
        started = time.perf_counter()
        executor = node.add(forked=False)
    else:
        executor = node.add(forked=True)
        await node.waits(executor)
        started = time.perf_counter()
    seconds = await node.first_token(executor, KV_BYTES) - started
    steps = starts.steps(executor)
    await node.remove(executor)
    return seconds, steps


def draw(waterfalls: list[tuple[str, float, dict[str, float]]]) -> None:
    """A table of steps and a bar for each path, all on one scale."""
    longest = max(seconds for _, seconds, _ in waterfalls)
    rows = []
    for path, seconds, steps in waterfalls:
        shown = {**steps, "rest": max(0.0, seconds - sum(steps.values()))}
        values = [f"{shown.get(name, 0.0):.3f}" for name in LETTERS]
        rows.append([path, f"{seconds:.3f}", *values])
    table(["PATH", "FIRST TOKEN S", *(name.upper() for name in LETTERS)], rows)
    for path, seconds, steps in waterfalls:
        shown = {**steps, "rest": max(0.0, seconds - sum(steps.values()))}
        typer.echo(f"{path:5s} {bar(shown, longest)}")
    typer.echo(MEANINGS)


def bar(steps: dict[str, float], longest: float, width: int = WIDTH) -> str:
    """The steps one after another, as letters; `longest` seconds fill `width`."""
    text, at = "", 0.0
    for name, letter in LETTERS.items():
        at += steps.get(name, 0.0)
        text += letter * (round(width * at / longest) - len(text))
    return text
