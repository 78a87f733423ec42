"""Before a release goes: executors drained and gone, finalizers off, intent left, statuses true."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from deepflow.v1 import worker_pb2, worker_pb2_grpc
from kubernetes.aio import client as kubernetes_client

from controlplane.api.resources import names
from controlplane.kube.client import KubeApi
from controlplane.kube.resources import MODEL_SERVINGS, PODS, WARM_POOLS, Json
from controlplane.operator import uninstall as module
from controlplane.operator.uninstall import DEPLOYMENTS, drainer, uninstall
from tests.support.kube_api import KubeApiServer, kube_api

NAMESPACE = "models"
EXECUTOR = {names.LABEL_COMPONENT: names.COMPONENT_EXECUTOR, names.LABEL_PART_OF: names.PART_OF}


@pytest.fixture
async def server() -> AsyncIterator[KubeApiServer]:
    async with kube_api() as running:
        yield running


@pytest.fixture
async def api(server: KubeApiServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[KubeApi]:
    monkeypatch.setattr(module, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(module, "OPERATOR_SECONDS", 0.2)
    monkeypatch.setattr(module, "GONE_SECONDS", 0.2)
    async with KubeApi(kubernetes_client.Configuration(host=str(server.url).rstrip("/"))) as connected:
        yield connected


def meta(name: str, finalizers: tuple[str, ...] = (), **labels: str) -> Json:
    return {"namespace": NAMESPACE, "name": name, "finalizers": list(finalizers), "labels": labels}


async def executor(api: KubeApi, name: str, state: str, address: str = "10.0.0.1") -> None:
    labels = {**EXECUTOR, names.LABEL_STATE: state}
    finalizers = (names.FINALIZER_DRAIN,) if state != "warm" else ()
    await api.create(PODS, {"metadata": meta(name, finalizers, **labels)}, manager="t")
    status = {"status": {"phase": "Running", "podIP": address}}
    await api.patch(PODS, NAMESPACE, name, status, manager="t", subresource="status")


async def test_executors_go_and_intent_stays(server: KubeApiServer, api: KubeApi) -> None:
    spec: dict[str, Any] = {"replicas": 2, "selector": {"matchLabels": {"a": "operator"}}}
    await api.create(DEPLOYMENTS, {"metadata": meta("deepflow-operator"), "spec": spec}, manager="t")
    await executor(api, "warm", "warm")
    await executor(api, "serving", "serving", "10.0.0.2")
    await executor(api, "six", "draining", "fd00::1")
    await api.create(PODS, {"metadata": meta("stranger")}, manager="t")
    kept = ("example.org/theirs", names.FINALIZER_DRAIN)
    await api.create(MODEL_SERVINGS, {"metadata": meta("m", kept), "spec": {"a": 1}}, manager="t")
    await api.create(WARM_POOLS, {"metadata": meta("p"), "spec": {"size": 1}}, manager="t")
    condition = {"type": "Ready", "status": "True", "reason": "Serving"}
    other = {"type": "Accepted", "status": "True", "reason": "Valid"}
    await api.patch(
        MODEL_SERVINGS, NAMESPACE, "m", {"status": {"readyReplicas": 2, "conditions": [condition, other]}},
        manager="t", subresource="status",
    )  # fmt: skip
    asked: list[tuple[str, float]] = []

    async def drain(address: str, seconds: float) -> bool:
        asked.append((address, seconds))
        return address != "10.0.0.2:7400"

    for _ in range(2):  # a hook may run again
        outcome = await uninstall(api, NAMESPACE, operator="deepflow-operator", drain_seconds=9, drain=drain)
    assert sorted(asked) == [("10.0.0.2:7400", 9), ("[fd00::1]:7400", 9)]
    assert outcome.left == []
    assert [pod["metadata"]["name"] for pod in server.list_objects("pods")] == ["stranger"]
    assert server.list_objects("deployments")[0]["spec"]["replicas"] == 0
    (serving,) = server.list_objects("modelservings")
    assert serving["metadata"]["finalizers"] == ["example.org/theirs"]
    assert serving["spec"] == {"a": 1}
    assert serving["status"]["readyReplicas"] == 0
    assert {(c["type"], c["status"], c["reason"]) for c in serving["status"]["conditions"]} == {
        ("Ready", "False", "Uninstalled"), ("Accepted", "True", "Valid"),
    }  # fmt: skip
    assert server.list_objects("warmpools")[0]["spec"] == {"size": 1}


async def test_what_could_not_be_drained_or_does_not_go_is_named(server: KubeApiServer, api: KubeApi) -> None:
    await executor(api, "busy", "serving")
    theirs = {"metadata": {"finalizers": ["example.org/theirs", names.FINALIZER_DRAIN]}}
    await api.patch(PODS, NAMESPACE, "busy", theirs, manager="t")

    async def drain(address: str, seconds: float) -> bool:
        return False

    outcome = await uninstall(api, NAMESPACE, operator="none", drain_seconds=1, drain=drain)
    assert outcome.undrained == ["busy"]
    assert outcome.left == ["busy"]
    assert server.list_objects("pods")[0]["metadata"]["finalizers"] == ["example.org/theirs"]


async def test_draining_asks_the_executor_with_the_clusters_token() -> None:
    seen: list[tuple[int, bool, str]] = []

    class Executor(worker_pb2_grpc.TaskExecutorServicer):
        async def Drain(self, request: worker_pb2.DrainRequest, context: Any) -> worker_pb2.DrainResponse:
            metadata = dict(context.invocation_metadata())
            seen.append((request.timeout_ms, request.exit, str(metadata.get("authorization"))))
            return worker_pb2.DrainResponse(drained=True)

    server = grpc.aio.server()
    worker_pb2_grpc.add_TaskExecutorServicer_to_server(Executor(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    drain = drainer("secret")
    assert await drain(f"127.0.0.1:{port}", 2.5)
    await server.stop(None)
    assert seen == [(2500, False, "Bearer secret")]
    async with asyncio.timeout(30):
        assert not await drain(f"127.0.0.1:{port}", 0.1)
