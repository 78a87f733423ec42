"""The documents against the code: every setting with its default, metric, option, route and error code."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import typer.main
from prometheus_client.metrics import MetricWrapperBase

from controlplane.cli import app as cli
from controlplane.gateway.settings import GatewaySettings
from controlplane.jobs.settings import RuntimeSettings
from flowserve.shell.settings import _parser

ROOT = Path(__file__).parents[2]
RUNNING = (ROOT / "docs/running.md").read_text()
API = (ROOT / "docs/api.md").read_text()
# Told by the command line, or made by the process: nobody sets them in the environment.
NOT_SET = {
    *("gateway_id", "redis_url", "catalogue_path", "kubernetes", "kube_namespace"),
    *("incarnation", "cluster_token", "tls_dir"),
}
METRIC_MODULES = (
    "controlplane.fleet.metrics",
    "controlplane.gateway.metrics",
    "controlplane.jobs.metrics",
    "controlplane.kube.metrics",
    "controlplane.local.metrics",
    "controlplane.operator.metrics",
    "flowserve.engine.metrics",
    "flowserve.rtc.metrics",
    "flowserve.shell.metrics",
    "kvtransfer.metrics",
)
SUFFIXES = {"counter": "_total", "info": "_info"}


@pytest.mark.parametrize(
    ("settings", "prefix"), [(GatewaySettings, "DEEPFLOW_GATEWAY_"), (RuntimeSettings, "DEEPFLOW_JOBS_")]
)
def test_every_setting_stands_with_its_default(settings: type, prefix: str) -> None:
    wanted = {}
    for name, field in settings.model_fields.items():
        if name not in NOT_SET:
            default = str(field.default)
            wanted[prefix + name.upper()] = default.lower() if isinstance(field.default, bool) else default
    found = dict(re.findall(rf"^\| `({prefix}[A-Z_]+)` \| (\S+) \|", RUNNING, re.MULTILINE))
    assert found == wanted


@pytest.mark.parametrize("module", METRIC_MODULES)
def test_every_metric_stands_with_its_labels(module: str) -> None:
    for value in vars(importlib.import_module(module)).values():
        if isinstance(value, MetricWrapperBase):
            labels = ", ".join(value._labelnames) or (value._name if value._type == "stateset" else "-")
            row = rf"^\| `{value._name}{SUFFIXES.get(value._type, '')}` \| [a-z, ]+ \| {labels} \| \S"
            assert re.search(row, RUNNING, re.MULTILINE), row


def test_every_option_of_up_and_of_an_executor_stands() -> None:
    up = typer.main.get_command(cli).commands["up"]  # type: ignore[attr-defined]  # it is a group
    for option in [*(name for p in up.params for name in p.opts), *_parser()._option_string_actions]:
        if option.startswith("--") and option != "--help":
            assert re.search(rf"`{option}`", RUNNING), option


def test_every_route_stands() -> None:
    for file in (ROOT / "controlplane/gateway/routes").glob("*.py"):
        for route in re.findall(r"@router\.\w+\(\s*\"([^\"]+)\"", file.read_text()):
            shown = route.replace(":path", "").replace("{job_id}", "{id}")
            assert f"`{shown}`" in API or f" {shown}" in API, route


def test_every_error_code_stands() -> None:
    for folder in ("gateway", "api", "jobs"):
        for file in (ROOT / "controlplane" / folder).rglob("*.py"):
            text = file.read_text()
            codes = re.findall(r"\bcode=\"([a-z_]+)\"", text)
            codes += re.findall(r"(?:ServingError|_refuse)\(\s*[45]\d\d,\s*\"([a-z_]+)\"", text)
            for code in codes:
                assert f"`{code}`" in API, (file.name, code)
