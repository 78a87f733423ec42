"""`deepflow status` and `deepflow top` against a cluster, through a kubeconfig, as a user calls them."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest

from tests.support.kube_world import World

ROOT = Path(__file__).parents[2]


async def deepflow(*args: str) -> tuple[int, str]:
    """Exit code and output of the command."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "controlplane.cli", *args, cwd=ROOT, env={**os.environ, "COLUMNS": "200"},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    output, _ = await asyncio.wait_for(process.communicate(), 60)
    return process.returncode or 0, output.decode()


@pytest.fixture
def kubeconfig(emulated: World, tmp_path: Path) -> str:
    assert emulated.server is not None
    config = {
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "users": [{"name": "u", "user": {}}],
        "clusters": [{"name": "k", "cluster": {"server": str(emulated.server.url).rstrip("/")}}],
        "contexts": [
            {"name": "c", "context": {"cluster": "k", "user": "u", "namespace": emulated.namespace}}
        ],
    }  # fmt: skip
    path = tmp_path / "kubeconfig"
    path.write_text(json.dumps(config))
    return str(path)


async def test_status_and_top_tell_what_the_cluster_serves(emulated: World, kubeconfig: str) -> None:
    world = emulated
    async with world.operator():
        await world.pool(size=1)
        await world.serving(roles={"prefill": {"min": 1, "max": 2}, "decode": {"min": 1, "max": 2}})
        pods = await world.until_serving(2)
        await world.until_ready("Serving")
    code, text = await deepflow("status", "--kubeconfig", kubeconfig)
    assert code == 0, text
    assert "1 of 1 models ready" in text and "P1/1 D1/1" in text and "prefill" in text
    assert all(pod["metadata"]["name"] in text for pod in pods)
    code, text = await deepflow("top", "--kubeconfig", kubeconfig, "--count", "2", "--every", "0.5")
    assert code == 0 and "P1/1 D1/1" in text
    code, text = await deepflow("status", "--kubeconfig", kubeconfig, "--json")
    assert code == 0 and json.loads(text)["servings"][0]["metadata"]["name"] == "m"


async def test_a_cluster_that_does_not_answer_is_one_line(tmp_path: Path) -> None:
    code, text = await deepflow("status", "--kubeconfig", str(tmp_path / "none"))
    assert code == 1 and text.startswith("error: the cluster cannot be read: there is no kubeconfig")
