"""A cluster seen through its kubeconfig: what `deepflow status`, `top`, `jobs` and `explain` show of it.

Status and top read custom resources and pods as they are. Jobs are the gateways' to tell: the same command
runs in a gateway's pod, as `kubectl exec` would run it, where no API key is needed. So all of it works from
wherever kubectl does, and whoever may exec there sees the jobs of all tenants.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from controlplane.cli.output import CliError, ago, print_json, table

if TYPE_CHECKING:
    from controlplane.kube.resources import Json, ResourceType

REFRESH_SECONDS = 2.0

Cluster = Annotated[
    bool, typer.Option("--cluster", help="The cluster of the kubeconfig instead of this machine's stack.")
]
Kubeconfig = Annotated[
    str, typer.Option(help="Configuration of the cluster.  [default: $KUBECONFIG]", show_default=False)
]
Context = Annotated[str, typer.Option(help="Context of the kubeconfig.", show_default=False)]
Namespace = Annotated[
    str, typer.Option("--namespace", "-n", help="Namespace.  [default: the context's]", show_default=False)
]


@dataclass(frozen=True, slots=True)
class Seen:
    """One look at a namespace."""

    namespace: str
    servings: list[Json]
    scalers: list[Json]
    pools: list[Json]
    pods: list[Json]


@dataclass(frozen=True, slots=True)
class Where:
    """Which cluster, as options say it."""

    cluster: bool = False
    kubeconfig: str = ""
    context: str = ""
    namespace: str = ""

    @property
    def given(self) -> bool:
        return bool(self.cluster or self.kubeconfig or self.context)


GATEWAYS = "app.kubernetes.io/name=deepflow,app.kubernetes.io/component=gateway"
GATEWAY = "gateway"  # its container, and the name of its port is "http"


def ask_gateway(where: Where, command: Sequence[str]) -> Any:
    """JSON that `deepflow COMMAND --json` says in a gateway's pod. Raises CliError."""
    import asyncio
    import json

    from controlplane.kube.client import Forbidden, KubeError, connect
    from controlplane.kube.execute import Executed, execute
    from controlplane.kube.resources import PODS

    async def ask() -> Executed:
        async with await connect(kubeconfig=where.kubeconfig, context=where.context) as api:
            namespace = where.namespace or api.namespace
            pods, _ = await api.list(PODS, namespace, label_selector=GATEWAYS)
            pods = [pod for pod in pods if _condition(pod).get("status") == "True"]
            pods.sort(key=lambda pod: bool(pod["metadata"].get("deletionTimestamp")))
            if not pods:
                raise CliError(f"no gateway is ready in namespace {namespace}")
            words = ["deepflow", *command, "--json", "--url", f"http://127.0.0.1:{_port(pods[0])}"]
            return await execute(api, namespace, pods[0]["metadata"]["name"], GATEWAY, words)

    try:
        done = asyncio.run(ask())
    except Forbidden as error:
        raise CliError(f"the cluster refuses: {error} (this needs create and get of pods/exec)") from None
    except KubeError as error:
        raise CliError(f"the cluster cannot be asked: {error}") from None
    if done.code != 0:
        words = done.errors.strip().removeprefix("error: ")
        raise CliError(words or f"the gateway's pod ended with {done.code}")
    try:
        return json.loads(done.output)
    except ValueError:
        raise CliError("the gateway's pod answered something that is no JSON") from None


def _port(pod: Json) -> int:
    ports = [port for box in pod["spec"]["containers"] for port in box.get("ports") or []]
    return next((int(port["containerPort"]) for port in ports if port.get("name") == "http"), 8000)


def look(kubeconfig: str, context: str, namespace: str) -> Seen:
    """Reads everything once. Raises CliError with the reason."""
    import asyncio

    from controlplane.kube.client import Forbidden, KubeError, NotFound, connect
    from controlplane.kube.resources import MODEL_SERVINGS, PODS, ROLE_SCALERS, WARM_POOLS
    from controlplane.operator.pods import EXECUTOR_SELECTOR

    async def read() -> Seen:
        async with await connect(kubeconfig=kubeconfig, context=context) as api:
            where = namespace or api.namespace

            async def items(resource: ResourceType, selector: str = "") -> list[Json]:
                found, _ = await api.list(resource, where, label_selector=selector)
                return sorted(found, key=lambda obj: str(obj["metadata"]["name"]))

            return Seen(
                where,
                await items(MODEL_SERVINGS),
                await items(ROLE_SCALERS),
                await items(WARM_POOLS),
                await items(PODS, EXECUTOR_SELECTOR),
            )

    try:
        return asyncio.run(read())
    except NotFound:
        raise CliError("the cluster does not know our kinds: is the chart installed?") from None
    except Forbidden as error:
        raise CliError(f"the cluster refuses: {error}") from None
    except KubeError as error:
        raise CliError(f"the cluster cannot be read: {error}") from None


Row = tuple[object, ...]


def tables(seen: Seen, now: float) -> list[tuple[Row, list[Row]]]:
    """Columns and rows: models, roles, pools, executors."""
    return [
        (
            ("MODEL", "READY", "REASON", "REPLICAS", "NAME", "REVISION", "LAST CHANGE"),
            [_serving(obj, now) for obj in seen.servings],
        ),
        (
            ("ROLE OF", "ROLE", "WANTED", "SERVE", "RECOMMENDED", "OVERRIDE"),
            [_scaler(obj) for obj in seen.scalers],
        ),
        (
            ("POOL", "PROFILE", "SIZE", "WARM", "STARTING", "CLAIMED", "REASON"),
            [_pool(obj) for obj in seen.pools],
        ),
        (
            ("EXECUTOR", "STATE", "MODEL", "ROLE", "EPOCH", "POOL", "NODE READY", "AGE"),
            [_pod(obj, now) for obj in seen.pods],
        ),
    ]


def _condition(obj: Json, kind: str = "Ready") -> Json:
    found = (obj.get("status") or {}).get("conditions") or []
    return next((condition for condition in found if condition.get("type") == kind), {})


def _serving(obj: Json, now: float) -> Row:
    status = obj.get("status") or {}
    ready = _condition(obj)
    history = status.get("scalingHistory") or []
    last = "-"
    if history:
        entry = history[0]
        advised = " (advice)" if entry.get("advisory") else ""
        when = ago(now - _seconds(entry.get("time"), now))
        last = f"{entry['role']} {entry['from']}->{entry['to']} {entry['reason']}{advised}, {when} ago"
    return (
        status.get("modelId") or obj["spec"]["model"].get("id") or obj["metadata"]["name"],
        ready.get("status", "-"),
        ready.get("reason", "-"),
        status.get("replicas") or "-",
        obj["metadata"]["name"],
        status.get("revision") or "-",
        last,
    )


def _scaler(obj: Json) -> Row:
    status, spec = obj.get("status") or {}, obj["spec"]
    override = status.get("override") or {}
    return (
        spec["modelServing"],
        spec["role"],
        spec.get("replicas", 0),
        status.get("readyReplicas", 0),
        status.get("recommended", "-"),
        f"{override['by']} ({override['replicas']})" if override else "-",
    )


def _pool(obj: Json) -> Row:
    status, spec = obj.get("status") or {}, obj["spec"]
    return (
        obj["metadata"]["name"],
        spec["accelerator"],
        spec.get("size", 1),
        status.get("ready", 0),
        status.get("starting", 0),
        status.get("claimed", 0),
        _condition(obj).get("reason", "-"),
    )


def _pod(obj: Json, now: float) -> Row:
    from controlplane.operator.pods import read_pod

    pod = read_pod(obj)
    labels = obj["metadata"].get("labels") or {}
    if pod is None:
        return (obj["metadata"]["name"], *["-"] * 7)
    state = f"{pod.state.value}: {pod.problem.value}" if pod.problem else pod.state.value
    return (
        pod.key[1],
        "ending" if pod.deleting else state,
        labels.get("deepflow.dev/model-serving", "-"),
        pod.role.value if pod.role else "-",
        pod.epoch or "-",
        pod.pool or "-",
        "yes" if pod.ready else "no",
        ago(now - pod.created),
    )


def _seconds(text: Any, default: float) -> float:
    from controlplane.operator.pods import parse_time

    found = parse_time(text)
    return default if found is None else found


def show_status(kubeconfig: str, context: str, namespace: str, *, as_json: bool) -> None:
    """`deepflow status --cluster`."""
    seen = look(kubeconfig, context, namespace)
    if as_json:
        names = ("servings", "scalers", "pools", "pods")
        print_json({"namespace": seen.namespace, **{name: getattr(seen, name) for name in names}})
        return
    ready = sum(_condition(obj).get("status") == "True" for obj in seen.servings)
    counts = f"{ready} of {len(seen.servings)} models ready, {len(seen.pods)} executors"
    print(f"namespace {seen.namespace}: {counts}\n")
    for columns, rows in tables(seen, time.time()):
        if rows:
            table([str(column) for column in columns], rows)
            print()


def top(
    *,
    cluster: Cluster = False,
    kubeconfig: Kubeconfig = "",
    context: Context = "",
    namespace: Namespace = "",
    every: Annotated[float, typer.Option(min=0.5, help="Seconds between two looks.")] = REFRESH_SECONDS,
    count: Annotated[int, typer.Option(min=0, help="Looks until it ends; 0: until Ctrl-C.")] = 0,
) -> None:
    """Live view of models and executors, of the stack here or of a cluster."""
    if cluster or kubeconfig or context:
        follow(lambda: tables(look(kubeconfig, context, namespace), time.time()), every, count)
        return
    from controlplane.cli.output import stack_status
    from controlplane.cli.stack import status_tables

    follow(lambda: status_tables(stack_status(None)), every, count)


def follow(read: Callable[[], list[tuple[Row, list[Row]]]], every: float, count: int) -> None:
    """Shows what `read` gives, again and again; while it cannot be read the last look stays."""
    from rich.console import Console, Group, RenderableType
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    def draw(found: list[tuple[Row, list[Row]]]) -> list[RenderableType]:
        parts: list[RenderableType] = []
        for columns, rows in found:
            shown = Table(box=None, pad_edge=False)
            for column in columns:
                shown.add_column(str(column))
            for row in rows:
                shown.add_row(*(str(cell) for cell in row))
            if rows:
                parts += [shown, Text("")]
        return parts

    parts = draw(read())  # the first failure is told, and ends it
    looks = 1
    with Live(Group(*parts), console=Console(), screen=False, auto_refresh=False) as live:
        live.refresh()
        while count == 0 or looks < count:
            time.sleep(every)
            looks += 1
            try:
                parts = draw(read())
            except CliError as error:
                live.update(Group(*parts, Text(f"{error}; trying again")), refresh=True)
                continue
            live.update(Group(*parts), refresh=True)
