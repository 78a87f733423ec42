"""A cluster for tests of the operator: an API (emulated or real), a fake kubelet and fake executors.

The kubelet watches pods as a real one does, serves a fake executor and a real fetcher at an address of
127.0.0.0/8 for each, and reports what a real one would. It works against any API server.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from kubernetes.aio import client as kubernetes_client

from controlplane.api.resources.names import LABEL_SERVING, LABEL_STATE
from controlplane.kube.client import Conflict, KubeApi, NotFound
from controlplane.kube.reflector import Reflector, Store
from controlplane.kube.resources import (
    MODEL_SERVINGS,
    PODS,
    ROLE_SCALERS,
    WARM_POOLS,
    Json,
    ResourceType,
    uid_of,
)
from controlplane.operator.plan.values import Timing
from controlplane.operator.pods import EXECUTOR_SELECTOR
from controlplane.operator.run import Operator
from controlplane.operator.settings import OperatorSettings
from kvtransfer.tls import Tls
from tests.support.fake_te import FakePod, FakeTe
from tests.support.kube_api import KubeApiServer

TOKEN = "operator-test-token"
NAMESPACES = ResourceType("", "v1", "Namespace", "namespaces", namespaced=False)
FAST = Timing(silent_seconds=1.0, start_seconds=2.0, drain_silent_seconds=0.5)


class Addresses:
    """Loopback addresses that no other test run on this machine uses at the same time, most likely."""

    def __init__(self) -> None:
        self._base = random.Random(os.getpid() * 7919).randrange(1 << 14)
        self._next = 0

    def next(self) -> str:
        self._next += 1
        number = (self._base << 8) + self._next
        return f"127.{64 + (number >> 16) % 128}.{(number >> 8) & 255}.{number & 255}"


ADDRESSES = Addresses()


class Kubelet:
    """Runs pods until cancelled."""

    def __init__(self, api: KubeApi, namespace: str, cache: Path) -> None:
        self.pods: dict[str, Any] = {}  # what runs, by the pod's name
        self.make: Callable[[str], Any] = self._fake  # with `start`, `stop` and `host`
        self.configure: Callable[[str, FakeTe], None] = lambda name, te: None
        self.start_seconds = 0.0
        self.tls: Tls | None = None
        self.hold = asyncio.Event()  # cleared: new pods stay Pending
        self.hold.set()
        self._api, self._namespace, self._cache = api, namespace, cache
        self._store = Store(PODS)
        self._queue: asyncio.Queue[tuple[Json | None, Json | None]] = asyncio.Queue()
        self._store.on_change(lambda old, new: self._queue.put_nowait((old, new)))
        self._known: set[str] = set()

    async def run(self) -> None:
        follower = Reflector(
            self._api, self._store, namespace=self._namespace, label_selector=EXECUTOR_SELECTOR
        )
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(follower.run())
                while True:
                    old, new = await self._queue.get()
                    if new is None and old is not None:
                        await self._stop(old)
                    elif new is not None and uid_of(new) not in self._known:
                        self._known.add(uid_of(new))
                        group.create_task(self._start(new))
        finally:
            for pod in self.pods.values():
                await pod.stop()

    async def _start(self, obj: Json) -> None:
        await self.hold.wait()
        name = obj["metadata"]["name"]
        pod = self.pods[name] = self.make(name)
        await pod.start()
        await asyncio.sleep(self.start_seconds)
        await self.report(name, ready=True, ip=pod.host)

    def _fake(self, name: str) -> FakePod:
        te = FakeTe(f"{self._namespace}.{name}", TOKEN)
        self.configure(name, te)
        return FakePod(te, ADDRESSES.next(), self._cache, self.tls)

    async def report(
        self, name: str, *, ready: bool, ip: str = "", phase: str = "Running", reason: str = ""
    ) -> None:
        """What a kubelet writes into the pod's status."""
        state: Json = (
            {"running": {}} if not reason else {"waiting": {"reason": reason, "message": "said the test"}}
        )
        status: Json = {
            "phase": phase,
            "conditions": [
                {"type": "PodScheduled", "status": "True"},
                {"type": "Ready", "status": "True" if ready else "False"},
            ],
            "containerStatuses": [
                {
                    "name": "executor",
                    "ready": ready,
                    "restartCount": 0,
                    "state": state,
                    "image": "i",
                    "imageID": "",
                }
            ],
        }
        if ip:
            status |= {"podIP": ip, "podIPs": [{"ip": ip}]}
        with contextlib.suppress(NotFound):
            await self._api.patch(
                PODS, self._namespace, name, {"status": status}, manager="kubelet", subresource="status"
            )

    async def _stop(self, obj: Json) -> None:
        pod = self.pods.pop(obj["metadata"]["name"], None)
        if pod is not None:
            await pod.stop()


class World:
    """One namespace with a kubelet; operators are started and stopped by the test."""

    def __init__(self, api: KubeApi, namespace: str, folder: Path, server: KubeApiServer | None) -> None:
        self.api, self.namespace, self.folder, self.server = api, namespace, folder, server
        self.kubelet = Kubelet(api, namespace, folder / "cache")
        self.model = folder / "model.gguf"
        self.model.write_bytes(b"not a model: nothing here reads it")

    # -- objects -----------------------------------------------------------------------------------------

    async def pool(self, name: str = "cpu", size: int = 2, **spec: Any) -> Json:
        body = {
            "apiVersion": WARM_POOLS.api_version, "kind": "WarmPool",
            "metadata": {"namespace": self.namespace, "name": name},
            "spec": {"accelerator": "cpu", "size": size, "image": "deepflow/worker:1", **spec},
        }  # fmt: skip
        return await self.api.create(WARM_POOLS, body, manager="test")

    async def serving(self, name: str = "m", roles: Json | None = None, **spec: Any) -> Json:
        body = {
            "apiVersion": MODEL_SERVINGS.api_version, "kind": "ModelServing",
            "metadata": {"namespace": self.namespace, "name": name},
            "spec": {
                "model": {"uri": f"file://{self.model}"}, "accelerator": "cpu", "engine": "flowserve",
                "roles": roles or {"colocated": {"min": 1, "max": 4}}, "drainSeconds": 5, **spec,
            },
        }  # fmt: skip
        return await self.api.create(MODEL_SERVINGS, body, manager="test")

    async def get_serving(self, name: str = "m") -> Json:
        return await self.api.get(MODEL_SERVINGS, self.namespace, name)

    async def scale(self, name: str, role: str, replicas: int, manager: str = "kubectl") -> None:
        await self.api.patch(
            ROLE_SCALERS, self.namespace, f"{name}-{role}", {"spec": {"replicas": replicas}},
            manager=manager, subresource="scale",
        )  # fmt: skip

    async def pods(self, **labels: str) -> list[Json]:
        selector = ",".join(
            [EXECUTOR_SELECTOR, *(f"deepflow.dev/{k.replace('_', '-')}={v}" for k, v in labels.items())]
        )
        items, _ = await self.api.list(PODS, self.namespace, label_selector=selector)
        return items

    async def serving_pods(self, name: str = "m") -> list[Json]:
        """Pods that serve it, by their labels."""
        items = await self.pods(model_serving=name, state="serving")
        return [item for item in items if not item["metadata"].get("deletionTimestamp")]

    async def condition(self, kind: str, name: str = "m") -> tuple[str, str]:
        """(status, reason)."""
        obj = await self.get_serving(name)
        for condition in (obj.get("status") or {}).get("conditions") or []:
            if condition["type"] == kind:
                return condition["status"], condition["reason"]
        return "", ""

    def te(self, pod: Json) -> FakeTe:
        return self.kubelet.pods[pod["metadata"]["name"]].te

    # -- waiting -----------------------------------------------------------------------------------------

    async def until(self, condition: Callable[[], Any], seconds: float = 60.0, why: str = "") -> None:
        """Polls a coroutine function until it is true."""
        try:
            async with asyncio.timeout(seconds):
                while not await condition():
                    await asyncio.sleep(0.03)
        except TimeoutError:
            raise AssertionError(f"not within {seconds:g} s: {why}\n{await self.describe()}") from None

    async def until_serving(self, count: int, name: str = "m", seconds: float = 60.0) -> list[Json]:
        async def there() -> bool:
            return (
                len(await self.serving_pods(name)) == count
                and len(await self.pods(model_serving=name)) == count
            )

        await self.until(there, seconds, f"{count} pods serve {name}")
        return await self.serving_pods(name)

    async def until_ready(self, reason: str, name: str = "m", seconds: float = 60.0) -> None:
        async def there() -> bool:
            return (await self.condition("Ready", name))[1] == reason

        await self.until(there, seconds, f"{name} is {reason}")

    async def until_warm(self, count: int, seconds: float = 60.0) -> None:
        async def there() -> bool:
            warm = await self.pods(state="warm")
            ready = [p for p in warm if any(c["type"] == "Ready" and c["status"] == "True"
                                            for c in p["status"].get("conditions", []))]  # fmt: skip
            return len(ready) == len(warm) == count

        await self.until(there, seconds, f"{count} warm pods")

    async def describe(self) -> str:
        lines = []
        for obj in (await self.api.list(MODEL_SERVINGS, self.namespace))[0]:
            lines.append(f"serving {obj['metadata']['name']}: {obj.get('status')}")
        for obj in (await self.api.list(ROLE_SCALERS, self.namespace))[0]:
            lines.append(f"scaler {obj['metadata']['name']}: {obj['spec']} {obj.get('status')}")
        for obj in await self.pods():
            labels = obj["metadata"]["labels"]
            te = self.kubelet.pods.get(obj["metadata"]["name"])
            shown = (labels.get(LABEL_STATE), labels.get(LABEL_SERVING), obj["status"].get("phase"))
            lines.append(f"pod {obj['metadata']['name']}: {shown} te={te.te if te else None}")
        return "\n".join(lines)

    def settings(self, **given: Any) -> OperatorSettings:
        values = {
            "namespace": self.namespace, "token": TOKEN, "identity": "op-1", "timing": FAST,
            "scale_seconds": 0.2, "demand_seconds": 0.1, **given,
        }  # fmt: skip
        return OperatorSettings(**values)

    @contextlib.asynccontextmanager
    async def operator(
        self, redis: Any = None, api: KubeApi | None = None, **given: Any
    ) -> AsyncIterator[Operator]:
        """A leader, until the end of the block; then it is gone as if killed."""
        running = Operator(api or self.api, self.settings(**given), redis)
        task = asyncio.create_task(running.run())
        try:
            yield running
        finally:
            task.cancel()
            results = await asyncio.gather(task, return_exceptions=True)
            errors = [
                r
                for r in results
                if isinstance(r, BaseException) and not isinstance(r, asyncio.CancelledError)
            ]
            if errors:
                raise errors[0]

    async def clean(self) -> None:
        """Removes what the test made (a real API server outlives it)."""
        for resource in (MODEL_SERVINGS, ROLE_SCALERS, WARM_POOLS, PODS):
            for obj in (await self.api.list(resource, self.namespace))[0]:
                name = obj["metadata"]["name"]
                with contextlib.suppress(NotFound, Conflict):
                    if obj["metadata"].get("finalizers"):
                        await self.api.patch(
                            resource, self.namespace, name, {"metadata": {"finalizers": None}}, manager="test"
                        )
                    await self.api.delete(resource, self.namespace, name, grace_seconds=0)


def connect(url: str) -> KubeApi:
    return KubeApi(kubernetes_client.Configuration(host=url.rstrip("/")))
