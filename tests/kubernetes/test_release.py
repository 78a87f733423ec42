"""Install, upgrade and uninstall with helm before a real API server: what is made, kept and left behind.

No controllers run there, so hooks (Jobs) are left out: what they do is tested in test_rights.py.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from controlplane.kube.client import NotFound, connect
from controlplane.kube.resources import MODEL_SERVINGS, WARM_POOLS, Json, ResourceType
from tests.kubernetes.conftest import CHART
from tests.support import kube_server

SECRETS = ResourceType("", "v1", "Secret", "secrets")
DEPLOYMENTS = ResourceType("apps", "v1", "Deployment", "deployments")
CLAIMS = ResourceType("", "v1", "PersistentVolumeClaim", "persistentvolumeclaims")
CRDS = ResourceType(
    "apiextensions.k8s.io", "v1", "CustomResourceDefinition", "customresourcedefinitions", namespaced=False
)
NAMESPACE = "release"
Helm = Callable[..., str]


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A server of its own: definitions are the release's to install."""
    source = kube_server.found()
    if source is None or source.assets is None:
        pytest.skip(kube_server.NONE)
    with kube_server.serving(source) as path:
        yield str(path)


@pytest.fixture(scope="module")
def release(helm: str, cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Helm:
    folder: Path = tmp_path_factory.mktemp("helm")

    def run(*arguments: str, values: dict[str, Any] | None = None) -> str:
        options: list[str] = []
        if values is not None:
            (folder / "values.yaml").write_text(yaml.safe_dump(values))
            options = ["-f", str(folder / "values.yaml")]
        command = [helm, *arguments, "--kubeconfig", cluster, "-n", NAMESPACE, "--no-hooks", *options]
        environment = {name: str(folder / name) for name in ("HELM_CACHE_HOME", "HELM_CONFIG_HOME")}
        made = subprocess.run(
            command, capture_output=True, text=True, timeout=120, check=False,
            env={**environment, "HELM_DATA_HOME": str(folder), "HOME": str(folder), "PATH": "/usr/bin:/bin"},
        )  # fmt: skip
        assert made.returncode == 0, made.stderr
        return made.stdout

    return run


async def test_a_release_comes_changes_and_goes_and_what_users_made_stays(
    release: Helm, cluster: str
) -> None:
    said = release("install", "deepflow", str(CHART), "--create-namespace")
    assert "kubectl -n release apply" in said
    async with await connect(kubeconfig=cluster) as api:
        assert len((await api.list(CRDS))[0]) == 4
        pool = await api.get(WARM_POOLS, NAMESPACE, "cpu")
        assert (pool["spec"]["size"], pool["spec"]["threads"]) == (2, 2)
        token = await api.get(SECRETS, NAMESPACE, "deepflow-token")
        password = await api.get(SECRETS, NAMESPACE, "deepflow-valkey")
        serving: Json = {
            "apiVersion": MODEL_SERVINGS.api_version,
            "kind": MODEL_SERVINGS.kind,
            "metadata": {"name": "mine", "namespace": NAMESPACE},
            "spec": {"model": {"uri": "hf://a/b"}, "roles": {"colocated": {}}},
        }
        await api.create(MODEL_SERVINGS, serving, manager="tests")
        own = {**pool, "metadata": {"name": "own", "namespace": NAMESPACE}}
        await api.create(WARM_POOLS, own, manager="tests")

        values = {
            "gateway": {"autoscaling": {"enabled": True}, "openMetrics": True},
            "warmPools": [{"name": "cpu", "profile": "cpu", "size": 5, "maxPods": 16}],
        }
        release("upgrade", "deepflow", str(CHART), values=values)
        assert (await api.get(SECRETS, NAMESPACE, "deepflow-token"))["data"] == token["data"]
        assert (await api.get(SECRETS, NAMESPACE, "deepflow-valkey"))["data"] == password["data"]
        assert (await api.get(WARM_POOLS, NAMESPACE, "cpu"))["spec"]["size"] == 5
        before = (await api.get(DEPLOYMENTS, NAMESPACE, "deepflow-gateway"))["metadata"]["generation"]
        release("upgrade", "deepflow", str(CHART), values=values)
        after = (await api.get(DEPLOYMENTS, NAMESPACE, "deepflow-gateway"))["metadata"]["generation"]
        assert after == before  # the same values roll nothing

        release("uninstall", "deepflow")
        assert [m["metadata"]["name"] for m in (await api.list(MODEL_SERVINGS, NAMESPACE))[0]] == ["mine"]
        assert [p["metadata"]["name"] for p in (await api.list(WARM_POOLS, NAMESPACE))[0]] == ["own"]
        assert len((await api.list(CRDS))[0]) == 4
        with pytest.raises(NotFound):
            await api.get(DEPLOYMENTS, NAMESPACE, "deepflow-gateway")
        left = {s["metadata"]["name"] for s in (await api.list(SECRETS, NAMESPACE))[0]}
        assert not left & {"deepflow-token", "deepflow-valkey"}

        # Over what is there; and executors that are left running know this token alone.
        release("install", "deepflow", str(CHART), values={"uninstall": {"keepServing": True}})
        token = await api.get(SECRETS, NAMESPACE, "deepflow-token")
        release("uninstall", "deepflow")
        release("install", "deepflow", str(CHART))
        assert (await api.get(SECRETS, NAMESPACE, "deepflow-token"))["data"] == token["data"]
