"""The supervisor's own metrics, served on a loopback port named in the status file."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

REGISTRY = CollectorRegistry()

CHILD_UP = Gauge("deepflow_local_child_up", "1 while the process runs", ["child"], registry=REGISTRY)
CHILD_RESTARTS = Counter(
    "deepflow_local_child_restarts",
    "Unplanned ends, each answered by a restart",
    ["child"],
    registry=REGISTRY,
)
CHILD_STARTS = Counter(
    "deepflow_local_child_starts", "Processes started, by how: exec, or forked by the template",
    ["kind", "path"], registry=REGISTRY,
)  # fmt: skip
FORK_SECONDS = Histogram(
    "deepflow_local_fork_seconds", "From the template's fork until the new process was its own",
    registry=REGISTRY, buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5),
)  # fmt: skip
TEMPLATE_BYTES = Gauge(
    "deepflow_local_template_bytes", "Resident memory of the template process; 0 = it does not run",
    registry=REGISTRY,
)  # fmt: skip
ORPHANS = Counter(
    "deepflow_local_orphans_reaped", "Processes that children left behind and that have ended",
    registry=REGISTRY,
)  # fmt: skip
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
