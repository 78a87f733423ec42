"""The operator at scale: 1,000 ModelServings and 10,000 pods; how soon a change is acted on, at what memory.

A process beside it is the API server (the tests' emulator on kmock, which keeps versions and watches) and all
executors (one fake gRPC server that answers for each by name). A change is a RoleScaler's count raised by
one; the operator's answer is the claim of a warm pod, seen at the API server. The ceiling is the same way
without the operator: a watch that patches a pod as soon as it sees the change.

    python -m tests.bench.operator [--quick] [--json PATH]
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import time
from typing import Any

import grpc.aio
import psutil
from deepflow.v1 import common_pb2, worker_pb2, worker_pb2_grpc

from controlplane.api.resources.modelserving import ModelServing
from controlplane.api.resources.names import (
    ANNOTATION_LOAD_HASH,
    ANNOTATION_ROLE_EPOCH,
    ANNOTATION_SERVING_UID,
    ANNOTATION_TEMPLATE_HASH,
    FINALIZER_DRAIN,
    LABEL_ACCELERATOR,
    LABEL_COMPONENT,
    LABEL_MANAGED_BY,
    LABEL_POOL,
    LABEL_ROLE,
    LABEL_SERVING,
    LABEL_STATE,
    MANAGED_BY,
    PORT_GRPC,
)
from controlplane.kube.client import KubeApi
from controlplane.kube.resources import PODS, ROLE_SCALERS, Json
from controlplane.operator.executors import TE_METADATA
from controlplane.operator.pods import EXECUTOR_SELECTOR, hash_of, load_hash, pod_spec
from controlplane.operator.run import Operator
from controlplane.operator.scalers import read_pool
from controlplane.operator.settings import OperatorSettings
from tests.bench.common import Report, parser, percentile, run
from tests.support.kube_api import KubeApiServer, kube_api
from tests.support.kube_world import ADDRESSES, connect

NAMESPACE, POOL = "bench", "pool"
SERVINGS, PODS_EACH, WARM = 1000, 9, 1000
SETTLE_SECONDS = 240.0
IDLE_SECONDS = 10.0
GAP_SECONDS = 0.1  # between two changes
AIM_SECONDS = 1.0
WORLD = "--world"


class Executors(worker_pb2_grpc.TaskExecutorServicer):
    """All executors: each is ready, with the role it was given."""

    async def GetStatus(self, request: Any, context: Any) -> worker_pb2.ExecutorStatus:
        te_id = dict(context.invocation_metadata())[TE_METADATA]
        role = common_pb2.ROLE_COLOCATED
        record = worker_pb2.ExecutorRecord(
            te_id=te_id, state=worker_pb2.EXECUTOR_STATE_READY, model_revision="m@1", role=role, role_epoch=1,
            device="fake",
        )  # fmt: skip
        load = common_pb2.LoadReport(role=role, role_epoch=1, kv_blocks_total=100, kv_blocks_free=100)
        return worker_pb2.ExecutorStatus(record=record, load=load)


def fill(server: KubeApiServer, host: str, servings: int) -> None:
    """Puts the objects into the server, as they are once everything serves."""
    server.track_owners = False

    def put(plural: str, body: Json, status: Json | None = None) -> Json:
        made = server._create(plural, NAMESPACE, body, "bench")
        if status is not None:
            key = (plural, NAMESPACE, made["metadata"]["name"])
            made = server._store("patch", key, made, {**made, "status": status}, "status", "bench")
        return made

    pool = put("warmpools", {
        "apiVersion": "deepflow.dev/v1alpha1", "kind": "WarmPool", "metadata": {"name": POOL},
        "spec": {"accelerator": "cpu", "size": WARM * servings // SERVINGS, "image": "deepflow/worker:1"},
    })  # fmt: skip
    template = hash_of(pod_spec(read_pool(pool), token_secret="", redis_secret=""))
    ready = {
        "phase": "Running", "podIP": host,
        "conditions": [{"type": "PodScheduled", "status": "True"}, {"type": "Ready", "status": "True"}],
        "containerStatuses": [{"name": "executor", "ready": True, "restartCount": 0}],
    }  # fmt: skip

    def pod(name: str, state: str, **more: Any) -> None:
        labels = {
            LABEL_COMPONENT: "executor", LABEL_MANAGED_BY: MANAGED_BY, LABEL_POOL: POOL,
            LABEL_ACCELERATOR: "cpu", LABEL_STATE: state, **more.get("labels", {}),
        }  # fmt: skip
        notes = {ANNOTATION_TEMPLATE_HASH: template, **more.get("notes", {})}
        body = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "labels": labels, "annotations": notes},
        }
        put("pods", body, ready)

    for number in range(servings):
        name = f"m{number:04}"
        serving = put("modelservings", {
            "apiVersion": "deepflow.dev/v1alpha1", "kind": "ModelServing",
            "metadata": {"name": name, "finalizers": [FINALIZER_DRAIN]},
            "spec": {
                "model": {"uri": "file:///models/m.gguf"}, "accelerator": "cpu",
                "roles": {"colocated": {"min": 0, "max": 100}}, "scaling": {"mode": "Manual"},
            },
        })  # fmt: skip
        uid = serving["metadata"]["uid"]
        put("rolescalers", {
            "apiVersion": "deepflow.dev/v1alpha1", "kind": "RoleScaler",
            "metadata": {"name": f"{name}-colocated", "labels": {LABEL_SERVING: name}},
            "spec": {"modelServing": name, "role": "colocated", "replicas": PODS_EACH},
        })  # fmt: skip
        digest = load_hash(ModelServing.model_validate(serving))
        for copy in range(PODS_EACH):
            labels = {LABEL_SERVING: name, LABEL_ROLE: "colocated"}
            notes = {ANNOTATION_SERVING_UID: uid, ANNOTATION_ROLE_EPOCH: "1", ANNOTATION_LOAD_HASH: digest}
            pod(f"{name}-{copy}", "serving", labels=labels, notes=notes)
    for number in range(WARM * servings // SERVINGS):
        pod(f"warm-{number:04}", "warm")


async def world(servings: int) -> None:
    """The process beside: prints where the API is, and serves until its input ends."""
    host = ADDRESSES.next()
    async with kube_api() as server:
        fill(server, host, servings)
        executors = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        worker_pb2_grpc.add_TaskExecutorServicer_to_server(Executors(), executors)
        executors.add_insecure_port(f"{host}:{PORT_GRPC}")
        await executors.start()
        print(json.dumps({"url": str(server.url)}), flush=True)
        await asyncio.to_thread(sys.stdin.read)
        await executors.stop(0)


async def answers(
    api: KubeApi, count: int, servings: int, rand: random.Random, gap: float, first: int
) -> list[float]:
    """Seconds from a raised count to the claim, for `count` different ModelServings."""
    version = (await api.list(PODS, NAMESPACE, label_selector=EXECUTOR_SELECTOR))[1]
    began: dict[str, float] = {}
    took: dict[str, float] = {}
    done = asyncio.Event()

    async def follow() -> None:
        async for kind, obj in api.watch(PODS, NAMESPACE, label_selector=EXECUTOR_SELECTOR, version=version):
            name = (obj["metadata"].get("labels") or {}).get(LABEL_SERVING)
            if kind == "MODIFIED" and name in began and name not in took:
                took[name] = time.perf_counter() - began[name]
                if len(took) == count:
                    done.set()

    task = asyncio.create_task(follow())
    await asyncio.sleep(0.2)
    for number in rand.sample(range(servings), count):
        name = f"m{number:04}"
        began[name] = time.perf_counter()
        patch = {"spec": {"replicas": first}}
        await api.patch(ROLE_SCALERS, NAMESPACE, f"{name}-colocated", patch, manager="bench")
        await asyncio.sleep(gap)
    async with asyncio.timeout(60):
        await done.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return list(took.values())


async def ceiling(api: KubeApi, count: int) -> list[float]:
    """The way without an operator: a watch that patches a pod when a RoleScaler changes."""
    version = (await api.list(ROLE_SCALERS, NAMESPACE))[1]
    took: list[float] = []
    began = 0.0
    seen = asyncio.Event()

    async def follow() -> None:
        async for kind, _ in api.watch(ROLE_SCALERS, NAMESPACE, version=version):
            if kind == "MODIFIED":
                note = {"metadata": {"annotations": {"bench": str(len(took))}}}
                await api.patch(PODS, NAMESPACE, "m0000-0", note, manager="bench")
                took.append(time.perf_counter() - began)
                seen.set()

    task = asyncio.create_task(follow())
    await asyncio.sleep(0.2)
    for number in range(count):
        seen.clear()
        began = time.perf_counter()
        note = {"metadata": {"annotations": {"bench": str(number)}}}
        await api.patch(ROLE_SCALERS, NAMESPACE, "m0000-colocated", note, manager="bench")
        await asyncio.wait_for(seen.wait(), 30)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return took


async def measure(report: Report, url: str, servings: int, changes: int) -> None:
    process = psutil.Process()
    rand = random.Random(1)
    async with connect(url) as api, connect(url) as client:
        floor = await ceiling(client, 30)
        empty = process.memory_info().rss
        settings = OperatorSettings(namespace=NAMESPACE, identity="bench", scale_seconds=2.0)
        operator = Operator(api, settings, None)
        started = time.perf_counter()
        task = asyncio.create_task(operator.run())

        async def quiet() -> None:
            """Until every queue is empty and every executor was asked."""
            calm = 0
            async with asyncio.timeout(SETTLE_SECONDS):
                while calm < 20:
                    await asyncio.sleep(0.05)
                    busy = (
                        len(operator.servings.queue)
                        + operator.servings.queue.busy
                        + operator.pools.queue.busy
                    )
                    asked = len(operator.cluster.executors) >= servings * PODS_EACH
                    calm = calm + 1 if operator.ready and not busy and asked else 0

        await quiet()
        settled = time.perf_counter() - started
        print(f"settled after {settled:.1f} s", file=sys.stderr, flush=True)
        writes, cpu = api.writes, process.cpu_times()
        await asyncio.sleep(IDLE_SECONDS)
        used = process.cpu_times()
        idle_cpu = (used.user + used.system - cpu.user - cpu.system) / IDLE_SECONDS
        idle_writes = api.writes - writes
        took = sorted(await answers(client, changes, servings, rand, gap=GAP_SECONDS, first=PODS_EACH + 1))
        memory = process.memory_info().rss
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    pods = servings * PODS_EACH + WARM * servings // SERVINGS
    full = servings == SERVINGS
    for what, values in (
        ("change to claim, seen at the API server", took),
        ("ceiling: a watch that patches, no operator", floor),
    ):
        report.add(
            what=what, servings=servings, pods=pods, changes=len(values), p50_ms=1e3 * percentile(values, 50),
            p99_ms=1e3 * percentile(values, 99), max_ms=1e3 * max(values),
        )  # fmt: skip
    report.add(
        servings=servings, pods=pods, start_s=settled, memory_mib=memory / 2**20,
        memory_of_objects_mib=(memory - empty) / 2**20, idle_cores=idle_cpu, idle_writes=idle_writes,
    )  # fmt: skip
    p99 = percentile(took, 99)
    report.check("change to claim p99", p99, "s", f"< {AIM_SECONDS:g}", p99 < AIM_SECONDS if full else None)
    report.check("memory", memory / 2**20, "MiB", "stated", None)
    report.check("writes of 10 idle seconds", float(idle_writes), "", "0", idle_writes == 0)


async def main() -> int:
    args = parser(__doc__.split("\n", 1)[0]).parse_args()
    report = Report("The operator at scale")
    servings = SERVINGS // 4 if args.quick else SERVINGS
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.bench.operator", WORLD, str(servings)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = await asyncio.to_thread(process.stdout.readline)
        await measure(report, json.loads(line)["url"], servings, 50 if args.quick else 100)
    finally:
        process.kill()
        process.wait()
    return report.finish(args.json)


if __name__ == "__main__":
    if sys.argv[1:2] == [WORLD]:
        asyncio.run(world(int(sys.argv[2])))
    else:
        run(main())
