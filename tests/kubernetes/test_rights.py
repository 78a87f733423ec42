"""The chart's rights are enough: operator, gateway and hooks against a real API server that enforces them.

Needs etcd and kube-apiserver (tests/support/kube_server.py); a cluster of KUBECONFIG is not taken: whoever
starts the server says which token is which account.
"""

from __future__ import annotations

import asyncio
import contextlib
import warnings
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from controlplane.cli import crds
from controlplane.kube import metrics
from controlplane.kube.client import Forbidden, KubeApi, connect
from controlplane.kube.resources import (
    EVENTS,
    MODEL_CACHES,
    MODEL_SERVINGS,
    PODS,
    ROLE_SCALERS,
    WARM_POOLS,
    Json,
    ResourceType,
)
from controlplane.operator.run import Process
from controlplane.operator.uninstall import DEPLOYMENTS, uninstall
from tests.kubernetes.conftest import Render
from tests.support import kube_server
from tests.support.kube_server import NAMESPACE
from tests.support.kube_world import World

RBAC = "rbac.authorization.k8s.io"
KINDS = {
    "ServiceAccount": ResourceType("", "v1", "ServiceAccount", "serviceaccounts"),
    "Role": ResourceType(RBAC, "v1", "Role", "roles"),
    "RoleBinding": ResourceType(RBAC, "v1", "RoleBinding", "rolebindings"),
    "ClusterRole": ResourceType(RBAC, "v1", "ClusterRole", "clusterroles", namespaced=False),
    "ClusterRoleBinding": ResourceType(
        RBAC, "v1", "ClusterRoleBinding", "clusterrolebindings", namespaced=False
    ),
    "Deployment": DEPLOYMENTS,
}
NAMESPACES = ResourceType("", "v1", "Namespace", "namespaces", namespaced=False)
SECRETS = ResourceType("", "v1", "Secret", "secrets")


@pytest.fixture(scope="module")
def kubeconfig(render: Render) -> Iterator[str]:
    """A server with the definitions and with what the chart says of rights."""
    source = kube_server.found()
    if source is None or source.assets is None:
        pytest.skip(kube_server.NONE)
    with kube_server.serving(source) as path:
        asyncio.run(_prepare(str(path), render()))
        yield str(path)


async def _prepare(kubeconfig: str, documents: list[Json]) -> None:
    await crds._apply(kubeconfig)
    async with await connect(kubeconfig=kubeconfig) as api:
        await api.create(NAMESPACES, {"metadata": {"name": NAMESPACE}}, manager="tests")
        for document in documents:
            if document["kind"] in KINDS:
                await api.create(KINDS[document["kind"]], document, manager="tests")


@contextlib.asynccontextmanager
async def account(kubeconfig: str, name: str) -> AsyncIterator[KubeApi]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        async with await connect(kubeconfig=kubeconfig, context=name) as api:
            yield api


def refusals() -> float:
    """Answers 403 that this process has got so far."""
    return sum(
        sample.value
        for metric in metrics.REQUESTS.collect()
        for sample in metric.samples
        if sample.name.endswith("_total") and sample.labels["code"] == "403"
    )


async def test_the_operator_and_the_hook_do_all_they_do_with_the_charts_rights(
    kubeconfig: str, tmp_path: Path
) -> None:
    before = refusals()
    async with (
        account(kubeconfig, "test") as admin,
        account(kubeconfig, "operator") as limited,
        account(kubeconfig, "uninstall") as hook,
    ):
        world = World(admin, NAMESPACE, tmp_path, None)
        settings = world.settings(
            leader_elect=True, lease_namespace=NAMESPACE, metrics_port=0, health_port=0, host="127.0.0.1"
        )
        kubelet = asyncio.create_task(world.kubelet.run())
        operator = asyncio.create_task(Process(limited, settings).run())
        try:
            await world.pool(size=1)
            await world.serving(roles={"prefill": {"min": 1, "max": 2}, "decode": {"min": 1, "max": 2}})
            await world.until_serving(2)
            await world.until_ready("Serving")
            kept = {"models": [{"uri": f"file://{world.model}"}]}
            cache = {
                "apiVersion": MODEL_CACHES.api_version,
                "kind": MODEL_CACHES.kind,
                "metadata": {"name": "c", "namespace": NAMESPACE},
                "spec": kept,
            }
            await admin.create(MODEL_CACHES, cache, manager="tests")

            async def cached() -> bool:
                found = (await admin.get(MODEL_CACHES, NAMESPACE, "c")).get("status") or {}
                return [c["reason"] for c in found.get("conditions", [])] == ["Cached"]

            await world.until(cached, why="the model is kept")
            await world.scale("m", "decode", 2)
            await world.until_serving(3)
            await admin.delete(MODEL_SERVINGS, NAMESPACE, "m")
            await world.until_serving(0)

            async def gone() -> bool:
                return not (await admin.list(MODEL_SERVINGS, NAMESPACE))[0]

            await world.until(gone, why="the finalizer is taken off")

            async def told() -> bool:
                return bool((await admin.list(EVENTS, NAMESPACE))[0])

            await world.until(told, why="events are written")
            await world.serving(name="stays")
            await world.until_serving(1, "stays")
        finally:
            operator.cancel()
            await asyncio.gather(operator, return_exceptions=True)

        async def drain(address: str, seconds: float) -> bool:
            return True

        try:
            outcome = await uninstall(
                hook, NAMESPACE, operator="deepflow-operator", drain_seconds=1, drain=drain
            )
        finally:
            kubelet.cancel()
            await asyncio.gather(kubelet, return_exceptions=True)
        assert outcome.left == []
        left = await admin.get(MODEL_SERVINGS, NAMESPACE, "stays")
        assert not left["metadata"].get("finalizers")
        assert (await world.condition("Ready", "stays")) == ("False", "Uninstalled")
        assert (await admin.get(DEPLOYMENTS, NAMESPACE, "deepflow-operator"))["spec"]["replicas"] == 0
    assert refusals() == before


@pytest.mark.parametrize(
    ("name", "reads", "refused"),
    [
        ("gateway", [MODEL_SERVINGS], [PODS, SECRETS, WARM_POOLS, ROLE_SCALERS]),
        ("operator", [MODEL_SERVINGS, WARM_POOLS, ROLE_SCALERS, PODS], [SECRETS, DEPLOYMENTS]),
        ("uninstall", [PODS, MODEL_SERVINGS, WARM_POOLS], [SECRETS, DEPLOYMENTS]),
        ("definitions", [], [PODS, SECRETS, MODEL_SERVINGS]),
    ],
)
async def test_accounts_read_what_they_need_and_no_more(
    kubeconfig: str, name: str, reads: list[ResourceType], refused: list[ResourceType]
) -> None:
    async with account(kubeconfig, name) as api:
        for kind in reads:
            _, version = await api.list(kind, NAMESPACE)
            assert version
            with pytest.raises(Forbidden):
                await api.list(kind, "kube-system")
        for kind in refused:
            with pytest.raises(Forbidden):
                await api.list(kind, NAMESPACE)


async def test_the_upgrade_s_hook_may_apply_the_definitions_and_touch_no_other(kubeconfig: str) -> None:
    kind = ResourceType(
        "apiextensions.k8s.io",
        "v1",
        "CustomResourceDefinition",
        "customresourcedefinitions",
        namespaced=False,
    )
    async with account(kubeconfig, "definitions") as api:
        for name in ("warmpools", "modelservings"):
            found = await api.get(kind, "", f"{name}.deepflow.dev")
            change: dict[str, Any] = {"metadata": {"annotations": {"tests": name}}}
            await api.patch(kind, "", found["metadata"]["name"], change, manager="tests")
        with pytest.raises(Forbidden):
            await api.delete(kind, "", "warmpools.deepflow.dev")
        with pytest.raises(Forbidden):
            await api.get(kind, "", "others.example.org")
