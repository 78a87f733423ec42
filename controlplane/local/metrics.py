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
ROLE_SCORE = Gauge(
    "deepflow_local_role_score", "Load of a side, 1 = as much as it can take", ["model", "side"],
    registry=REGISTRY,
)  # fmt: skip
OVERLOADED = Gauge(
    "deepflow_local_overloaded", "1 while both sides are at capacity: more executors are wanted", ["model"],
    registry=REGISTRY,
)  # fmt: skip
SCALINGS = Counter(
    "deepflow_local_scalings", "Decisions to have more executors of a role, or fewer",
    ["model", "role", "direction"], registry=REGISTRY,
)  # fmt: skip
ROLE_CHANGES = Counter("deepflow_local_role_changes", "Roles set on executors", ["role"], registry=REGISTRY)
