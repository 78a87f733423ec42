"""The command lines and environments of the supervisor's children."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import psutil

from controlplane.local.children import ChildSpec
from controlplane.local.settings import (
    StackSettings,
    StatePaths,
    cores,
    default_kv_bytes,
    threads_per_executor,
    weights_cache_bytes,
)
from controlplane.local.topology import RoleName
from controlplane.local.valkey import server_command
from kvtransfer.tls import TLS_DIR_ENV

# Seconds from SIGTERM to SIGKILL. `deepflow down` takes at most their sum.
GATEWAY_STOP_SECONDS = 15.0
EXECUTOR_STOP_SECONDS = 15.0
VALKEY_STOP_SECONDS = 10.0
TEMPLATE_STOP_SECONDS = 5.0  # it holds nothing: SIGTERM ends it at once
GATEWAY_DRAIN_SECONDS = "10"  # running answers may finish so long; under GATEWAY_STOP_SECONDS

# -P: the working folder is no place to import from.
PYTHON = (sys.executable, "-P", "-m")


def base_env(paths: StatePaths, redis_url: str, token: str) -> dict[str, str]:
    """What all children share. Secrets (a REDIS_URL may hold a password) travel in the environment, never on
    a command line, which every user of the machine can read."""
    return {
        **os.environ,
        "DEEPFLOW_HOME": str(paths.root),
        "DEEPFLOW_CLUSTER_TOKEN": token,
        "DEEPFLOW_PARENT_DEATH": "1",  # their parent is a supervisor; the launcher ties their lives to it
        "REDIS_URL": redis_url,
        TLS_DIR_ENV: "",  # all of it is on loopback, and the supervisor speaks no TLS
        "PYTHONUNBUFFERED": "1",
    }


def valkey_spec(paths: StatePaths) -> ChildSpec:
    return ChildSpec(
        name="valkey",
        kind="valkey",
        command=tuple(server_command(paths.valkey_data, paths.valkey_socket)),
        env=dict(os.environ),
        log=paths.logs / "valkey.log",
        stop_seconds=VALKEY_STOP_SECONDS,
        orphan_signal=signal.SIGTERM,  # it saves what it has
        before_start=lambda: paths.valkey_socket.unlink(missing_ok=True),
    )


def _executor_env(settings: StackSettings, env: dict[str, str]) -> tuple[str, dict[str, str]]:
    """Threads of an executor, and its environment."""
    threads = str(settings.threads or threads_per_executor(settings.executors, cores()))
    return threads, {**env, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}


def template_spec(settings: StackSettings, paths: StatePaths, env: dict[str, str]) -> ChildSpec:
    """With the environment of executors: libraries read some of it as they are loaded."""
    return ChildSpec(
        name="template",
        kind="template",
        command=(*PYTHON, "flowserve.shell.template", "--socket", str(paths.template_socket)),
        env=_executor_env(settings, env)[1],
        log=paths.logs / "template.log",
        stop_seconds=TEMPLATE_STOP_SECONDS,
        before_start=lambda: paths.template_socket.unlink(missing_ok=True),
    )


def executor_spec(  # noqa: PLR0917  what, where, who, and how: each is named at the call
    settings: StackSettings,
    paths: StatePaths,
    te_id: str,
    role: RoleName,
    env: dict[str, str],
    options: tuple[str, ...] = (),
) -> ChildSpec:
    """`options` of flowserve.shell win over those that follow from the settings."""
    threads, env = _executor_env(settings, env)
    endpoint = paths.run / f"{te_id}.json"
    bound = weights_cache_bytes(settings, paths)
    weights = ("--weights-dir", str(paths.weights), "--weights-bytes", str(bound)) if bound else ()
    arguments = (
        *("--te-id", te_id, "--listen", "127.0.0.1:0"),
        *("--endpoint-file", str(endpoint), "--role", role.value),
        *("--device", settings.device, "--tensor-parallel", str(settings.tensor_parallel)),
        *("--threads", threads, "--shm-dir", str(paths.sockets), *weights, *options),
    )
    return ChildSpec(
        name=te_id,
        kind="executor",
        command=(*PYTHON, "flowserve.shell", *arguments),
        env=env,
        log=paths.logs / f"{te_id}.log",
        stop_seconds=EXECUTOR_STOP_SECONDS,
        before_start=lambda: endpoint.unlink(missing_ok=True),
        template_args=arguments if settings.device == "cpu" else None,  # a device does not survive a fork
    )


def gateway_spec(
    settings: StackSettings, paths: StatePaths, number: int, listener: int, env: dict[str, str]
) -> ChildSpec:
    gateway_id = f"gw-{number}"
    shared = paths.run / "prometheus"
    metrics: tuple[str, ...] = ()
    if settings.gateways > 1:  # any of them may answer /metrics, for all
        metrics = ("--prometheus-dir", str(shared))
    return ChildSpec(
        name=gateway_id,
        kind="gateway",
        command=(
            *(*PYTHON, "controlplane.gateway", "--fd", str(listener)),
            *("--catalogue", str(paths.catalogue), "--gateway-id", gateway_id, *metrics),
        ),
        env={"DEEPFLOW_GATEWAY_DRAIN_SECONDS": GATEWAY_DRAIN_SECONDS, **env},
        log=paths.logs / f"{gateway_id}.log",
        stop_seconds=GATEWAY_STOP_SECONDS,
        pass_fds=(listener,),
        before_start=lambda: forget_dead_gauges(shared),
    )


def forget_dead_gauges(folder: Path) -> None:
    """Removes the gauges of gateways that have ended, which would count on (prometheus_client names the
    files `gauge_live<kind>_<pid>.db`; counters of the dead stay, as they should)."""
    for file in folder.glob("gauge_live*_*.db"):
        pid = file.stem.rsplit("_", 1)[-1]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            file.unlink(missing_ok=True)


def kv_bytes(settings: StackSettings) -> int:
    """Bytes of one executor's KV pool."""
    if settings.kv_cache_bytes is not None:
        return settings.kv_cache_bytes
    return default_kv_bytes(settings.executors, psutil.virtual_memory().available)
