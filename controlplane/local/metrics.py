"""The supervisor's own metrics, served on a loopback port named in the status file."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge

REGISTRY = CollectorRegistry()

CHILD_UP = Gauge("deepflow_local_child_up", "1 while the process runs", ["child"], registry=REGISTRY)
CHILD_RESTARTS = Counter(
    "deepflow_local_child_restarts",
    "Unplanned ends, each answered by a restart",
    ["child"],
    registry=REGISTRY,
)
CHILD_BACKOFF = Gauge(
    "deepflow_local_child_backoff_seconds", "Wait before the next start; 0 = not waiting", ["child"],
    registry=REGISTRY,
)  # fmt: skip
EXECUTOR_READY = Gauge(
    "deepflow_local_executor_ready",
    "1 while it has its model and its role",
    ["te"],
    registry=REGISTRY,
)
ROLE_CHANGES = Counter("deepflow_local_role_changes", "Roles set on executors", ["role"], registry=REGISTRY)
