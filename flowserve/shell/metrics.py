"""Prometheus metrics of the TE-shell (`deepflow_te_*`) and the HTTP endpoint that serves all of them."""

from __future__ import annotations

import threading
from wsgiref.simple_server import WSGIServer

from prometheus_client import Counter, Enum, Gauge, Histogram, Info, start_http_server

TASKS = Counter(
    "deepflow_te_tasks",
    "Tasks by kind and outcome: how they ended, `rejected_<error>` for those not accepted.",
    ("kind", "outcome"),
)
STREAMS = Gauge("deepflow_te_streams", "Gateway streams that are open.")
STREAM_ENDS = Counter("deepflow_te_stream_ends", "Gateway streams that ended, by why.", ("reason",))
OUTBOX_DELTAS = Gauge("deepflow_te_outbox_deltas", "Merged deltas that wait for gateways to read them.")
OUTBOX_TOKENS = Counter("deepflow_te_outbox_tokens", "Tokens sent to gateways.")
KV_RESYNCS = Counter(
    "deepflow_te_kv_resyncs",
    "Snapshots of reusable blocks sent, by why (connect, load, slow reader, gap).",
    ("reason",),
)
STATE = Enum(
    "deepflow_te_state",
    "State of this executor.",
    states=["warm", "loading", "ready", "sleeping", "draining", "failed"],
)
ROLE = Enum(
    "deepflow_te_role", "Role preference of this executor.", states=["colocated", "prefill", "decode"]
)
ROLE_EPOCH = Gauge("deepflow_te_role_epoch", "Epoch of the role; an older one is refused.")
ROLE_REFUSED = Counter("deepflow_te_role_refused", "Role changes refused for a stale epoch.")
LOADS = Counter("deepflow_te_model_loads", "Model loads by outcome.", ("outcome",))
LOAD_SECONDS = Gauge("deepflow_te_model_load_seconds", "Seconds the last successful load took.")
START_SECONDS = Gauge(
    "deepflow_te_start_seconds", "Seconds from the process's start until a stage was reached.", ("stage",)
)
ACTUATION = Histogram(
    "deepflow_te_actuation_seconds",
    "Steps of a start, by phase and by path (cold, warm, hot, fork, wake).",
    ("phase", "path"),
    buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300),
)
PRELOADS = Counter(
    "deepflow_te_preloads",
    "Weights put into the node's memory before they were needed, by outcome.",
    ("outcome",),
)
SLEEPS = Counter(
    "deepflow_te_sleeps",
    "Sleeps by how they ended: ok, busy (tasks were left), failed; `dropped`: a sleeping model was given up.",
    ("outcome",),
)
ASLEEP = Gauge("deepflow_te_models_asleep", "Models whose weights wait in host memory.")
SLEEP_SECONDS = Gauge(
    "deepflow_te_sleep_seconds", "Seconds from the last task's end until a model's KV memory was given back."
)
REGISTRY_ERRORS = Counter("deepflow_te_registry_errors", "Failed writes to the registry.")
REGISTRY_CONNECTED = Gauge("deepflow_te_registry_connected", "1 while the last write went through.")
DRAIN_SECONDS = Gauge("deepflow_te_drain_seconds", "Seconds the last drain took.")
DRAIN_LEFT = Gauge("deepflow_te_drain_left", "Tasks and transfers left at the last drain's end.", ("what",))
STALE_SOCKETS = Counter(
    "deepflow_te_stale_sockets", "Sockets of killed executors that this one removed at its start."
)
PULLS = Gauge("deepflow_te_pulls", "Pulls that the engine waits for.")
INFO = Info("deepflow_te", "Which executor this is.")


class MetricsServer:
    """Serves the default registry at http://host:port/metrics until `stop`. Raises OSError on start."""

    def __init__(self, host: str, port: int) -> None:
        self._server: WSGIServer
        self._thread: threading.Thread
        self._server, self._thread = start_http_server(port, host)
        bound = self._server.server_address
        self.host, self.port = str(bound[0]), int(bound[1])

    def stop(self) -> None:
        """Blocks for up to the server's poll interval (0.5 s)."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)
