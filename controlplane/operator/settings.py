"""What an operator process is told."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field

from controlplane.api.resources.names import ENV_REDIS_SECRET, ENV_TLS_SECRET, ENV_TOKEN_SECRET
from controlplane.operator.plan.values import Timing
from kvtransfer import tls
from kvtransfer.tls import Tls


@dataclass(frozen=True, slots=True)
class OperatorSettings:
    """Defaults are for a cluster; tests shorten times."""

    namespace: str = ""  # "" = all
    lease_namespace: str = "default"
    leader_elect: bool = False
    identity: str = ""
    metrics_port: int = 8080  # 0 = none
    health_port: int = 8081
    host: str = "0.0.0.0"
    redis_url: str = ""
    token: str = ""
    token_secret: str = ""  # SECRET/KEY that executors take DEEPFLOW_CLUSTER_TOKEN from
    tls: Tls | None = None
    tls_secret: str = ""  # that executors mount their certificates from; "" = none
    redis_secret: str = ""  # SECRET/KEY that executors take REDIS_URL from
    gateway_url: str = ""  # where clients reach the gateways, for status.url
    workers: int = 8
    scale_seconds: float = 2.0  # between two looks of the autoscaler
    demand_seconds: float = 1.0
    timing: Timing = field(default_factory=Timing)


def from_environment(env: Mapping[str, str], **given: object) -> OperatorSettings:
    """Settings that come from the environment (secrets, never on a command line), and `given` ones. Raises
    kvtransfer.tls.TlsError."""
    return OperatorSettings(
        identity=f"{env.get('POD_NAME') or socket.gethostname()}_{os.getpid()}",
        redis_url=env.get("REDIS_URL", ""),
        token=env.get("DEEPFLOW_CLUSTER_TOKEN", ""),
        tls=tls.from_environment(env),
        tls_secret=env.get(ENV_TLS_SECRET, ""),
        token_secret=env.get(ENV_TOKEN_SECRET, ""),
        redis_secret=env.get(ENV_REDIS_SECRET, ""),
        gateway_url=env.get("DEEPFLOW_GATEWAY_URL", ""),
        **given,  # type: ignore[arg-type]  # checked by the command line
    )
