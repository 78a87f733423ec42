"""What a held request waits for: a model at zero, asked through the gateway, by what there is to start from.

Real: gateway and operator as processes of their own, Valkey, executors, fetcher. Not real: the API server
(the emulator of the tests) and the kubelet, which starts processes here, so what a container runtime adds to
a cold start is not in it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import orjson
import yaml
from aiohttp import web
from deepflow.v1 import worker_pb2, worker_pb2_grpc

from controlplane.api.resources.names import (
    PORT_FETCH,
    PORT_GRPC,
    PORT_TASKS,
)
from controlplane.kube.resources import MODEL_SERVINGS, WARM_POOLS
from controlplane.local.starts import TOKEN, Node
from controlplane.local.valkey import ValkeyServer
from controlplane.nodeagent.fetcher import Fetcher, application
from kvtransfer.auth import call_metadata
from kvtransfer.channel import open_channel
from tests.bench import common
from tests.support.kube_api import kube_api
from tests.support.kube_world import ADDRESSES, World, connect

PATHS = ("wake", "hot", "ahead", "warm", "cold")
NAMESPACE = "held"
KV_CACHE = "256Mi"
START_SECONDS = 60.0
SLEEP_SECONDS = 3600


class Pod:
    """One executor's process and a fetcher, at an address of their own."""

    def __init__(self, made: Node, name: str, redis_url: str, cache: Path, path: str) -> None:
        self.host = ADDRESSES.next()
        own = made.paths.weights.with_name(f"{made.paths.weights.name}-{name}")
        weights, self._own = (made.paths.weights, None) if path == "hot" else (own, own)
        self._child = made.child(
            f"{NAMESPACE}.{name}",
            forked=path != "cold",
            options=(
                *("--listen", f"{self.host}:{PORT_GRPC}", "--advertise-host", self.host),
                *("--tasks-listen", f"{self.host}:{PORT_TASKS}", "--redis-url", redis_url),
                *("--weights-dir", str(weights), "--drain-seconds", "1"),
            ),
        )
        self._cache = cache
        self._runner: web.AppRunner | None = None
        self._run: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._runner = web.AppRunner(application(Fetcher(self._cache), TOKEN), access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, self.host, PORT_FETCH).start()
        self._run = asyncio.create_task(self._child.run())
        async with asyncio.timeout(START_SECONDS):
            while not _answers(self.host, PORT_GRPC):
                await asyncio.sleep(0.01)

    async def stop(self) -> None:
        await self._child.stop()
        if self._run is not None:
            await asyncio.gather(self._run, return_exceptions=True)
        if self._runner is not None:
            await self._runner.cleanup()
        if self._own is not None:
            await asyncio.to_thread(shutil.rmtree, self._own, ignore_errors=True)


class Rig:
    """The namespace and its gateway. `path` decides what pods that are made from now on start from."""

    def __init__(self, world: World, port: int) -> None:
        self.world = world
        self.path = PATHS[0]
        self._http = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=START_SECONDS)
        self._numbers = itertools.count()

    async def close(self) -> None:
        await self._http.aclose()

    async def offered(self) -> bool:
        """The gateway answers, and knows the model."""
        try:
            models = (await self._http.get("/v1/models")).json()["data"]
        except (httpx.HTTPError, KeyError, ValueError):
            return False
        return any(one["id"] == "m" for one in models)

    async def first_token(self) -> float:
        """Seconds from a request to its first token."""
        text = f"Request {next(self._numbers)}: tell me about lighthouses, storms and the sea."
        body = {"model": "m", "prompt": text, "max_tokens": 4, "stream": True, "temperature": 0}
        began = time.perf_counter()
        seconds = 0.0
        async with self._http.stream("POST", "/v1/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = orjson.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(event["error"]["message"])
                if event["choices"] and not seconds:
                    seconds = time.perf_counter() - began
        if not seconds:
            raise RuntimeError(f"HTTP {answer.status_code}: no token came")
        return seconds

    async def at_zero(self, path: str) -> None:
        """Nobody serves, and what there is to start from is what `path` says."""
        world = self.world
        if path == "wake":  # what sleeps must have served
            await self._serving(sleepSeconds=SLEEP_SECONDS)
            await self.first_token()
        else:
            await self._serving(sleepSeconds=0)
        await world.scale("m", "colocated", 0)
        if path == "wake":
            await world.until(self._asleep, why="the executor sleeps")
            return
        await world.until(self._nobody, why="nobody serves")
        if self.path != path:
            await self._pool(0)
            await world.until_warm(0)
            self.path = path
        await self._pool(0 if path == "cold" else 1)
        await world.until_warm(0 if path == "cold" else 1)
        await asyncio.sleep(1.0)  # its libraries, if it was forked: WARM_SECONDS twice
        if path == "ahead":
            await world.until(self._put, why="the warm pod holds the model's weights")

    async def _asleep(self) -> bool:
        roles = (await self.world.get_serving()).get("status", {}).get("roles", [])
        pods = await self.world.pods(model_serving="m")
        return sum(role["asleep"] for role in roles) == len(pods) == 1 and not sum(
            role["ready"] for role in roles
        )

    async def _put(self) -> bool:
        (pod,) = await self.world.pods(state="warm")
        host = self.world.kubelet.pods[pod["metadata"]["name"]].host
        async with open_channel(f"{host}:{PORT_GRPC}", None) as channel:
            status = await worker_pb2_grpc.TaskExecutorStub(channel).GetStatus(
                worker_pb2.GetStatusRequest(), metadata=call_metadata(TOKEN), timeout=10
            )
        return bool(status.record.preloaded)

    async def _nobody(self) -> bool:
        return not await self.world.pods(model_serving="m")

    async def _serving(self, **scaling: Any) -> None:
        patch = {"spec": {"scaling": scaling}}
        await self.world.api.patch(MODEL_SERVINGS, NAMESPACE, "m", patch, manager="test")

    async def _pool(self, size: int) -> None:
        spec = {"size": size, "weights": {"ahead": self.path == "ahead"}}
        await self.world.api.patch(WARM_POOLS, NAMESPACE, "cpu", {"spec": spec}, manager="test")


async def held(made: Node, report: common.Report, rounds: int, model: Path) -> dict[str, float]:
    """Adds a row for each path; medians of what being held added, in seconds."""
    added: dict[str, list[float]] = {path: [] for path in PATHS}
    async with _rig(made, model) as rig:
        await rig.first_token()  # the first of all: fetches, hashes, publishes the card
        awake = []
        for _ in range(rounds):
            for path in PATHS:
                await rig.at_zero(path)
                added[path].append(await rig.first_token())
                awake.append(await rig.first_token())
                print(".", end="", flush=True)
        print()
    base = common.median(awake)
    medians = {}
    for path, seconds in added.items():
        over = sorted(one - base for one in seconds)
        medians[path] = common.median(over)
        report.add(
            held=path,
            added_p50_s=medians[path],
            added_p99_s=over[min(len(over) - 1, int(0.99 * len(over)))],
            awake_s=base,
            rounds=rounds,
        )
    return medians


@contextlib.asynccontextmanager
async def _rig(made: Node, model: Path) -> AsyncIterator[Rig]:
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="deepflow-held-")))
        valkey = ValkeyServer(folder / "valkey")
        valkey.start()
        stack.callback(valkey.stop)
        server = await stack.enter_async_context(kube_api())
        world = World(await stack.enter_async_context(connect(str(server.url))), NAMESPACE, folder, server)
        world.model = model
        kubeconfig = folder / "kubeconfig"
        kubeconfig.write_text(yaml.safe_dump(_kubeconfig(str(server.url).rstrip("/"))))
        port = common.free_port()
        rig = Rig(world, port)
        stack.push_async_callback(rig.close)
        world.kubelet.make = lambda name: Pod(made, name, valkey.url, folder / "cache", rig.path)
        await _start(stack, rig, folder, kubeconfig, valkey.url, port)
        yield rig
        await world.scale("m", "colocated", 0)
        await rig._pool(0)
        await world.until_warm(0)


async def _start(
    stack: contextlib.AsyncExitStack, rig: Rig, folder: Path, kubeconfig: Path, redis_url: str, port: int
) -> None:
    """Kubelet, operator, gateway, and the model's objects, until the gateway answers."""
    kubelet = asyncio.create_task(rig.world.kubelet.run())

    async def end() -> None:
        kubelet.cancel()
        await asyncio.gather(kubelet, return_exceptions=True)

    stack.push_async_callback(end)
    env = {
        **os.environ,
        "KUBECONFIG": str(kubeconfig),
        "REDIS_URL": redis_url,
        "DEEPFLOW_CLUSTER_TOKEN": TOKEN,
    }
    ports = ("--metrics-port", "0", "--health-port", str(common.free_port()), "--host", "127.0.0.1")
    programs = (
        ("operator", ("controlplane.cli", "operator", "--namespace", NAMESPACE, *ports)),
        (
            "gateway",
            ("controlplane.gateway", "--port", str(port), "--kubernetes", "--kube-namespace", NAMESPACE),
        ),
    )
    for name, arguments in programs:
        log = stack.enter_context((folder / f"{name}.log").open("wb"))
        process = subprocess.Popen([sys.executable, "-m", *arguments], env=env, stdout=log, stderr=log)
        stack.callback(process.wait, 30)
        stack.callback(process.terminate)
    await rig.world.pool(size=1, maxPods=4)
    await rig.world.serving(
        roles={"colocated": {"min": 0, "max": 1}},
        scaling={"mode": "Manual"},
        options={"dtype": "bfloat16", "kvCacheBytes": KV_CACHE},
    )
    async with asyncio.timeout(START_SECONDS):
        while not await rig.offered():
            await asyncio.sleep(0.05)
    await rig.world.until_warm(1)


def _answers(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.2)
        return probe.connect_ex((host, port)) == 0


def _kubeconfig(server: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "held",
        "clusters": [{"name": "held", "cluster": {"server": server}}],
        "users": [{"name": "held", "user": {}}],
        "contexts": [
            {"name": "held", "context": {"cluster": "held", "user": "held", "namespace": NAMESPACE}}
        ],
    }
