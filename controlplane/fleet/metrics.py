"""Prometheus metrics of the fleet room, prefix `deepflow_fleet_`."""

from __future__ import annotations

from functools import cache
from typing import Any, TypeVar

from prometheus_client import Counter, Gauge, Histogram

M = TypeVar("M", Counter, Gauge, Histogram)


def remembered(metric: M) -> M:
    """Its children are found by one look-up of the labels' values, without the library's lock: for metrics
    that every request touches. Label values are bounded, so the table is."""
    labels: Any = cache(metric.labels)
    metric.labels = labels  # type: ignore[method-assign]  # of this one object; the class is the library's
    return metric


EXECUTORS = Gauge(
    "deepflow_fleet_executors", "Known executors by link state.", ["link"], multiprocess_mode="livemax"
)
TASKS = Gauge("deepflow_fleet_stream_tasks", "Tasks open on streams.", multiprocess_mode="livesum")
SEND_QUEUE = Gauge("deepflow_fleet_send_queue", "Messages not yet written.", multiprocess_mode="livesum")
LINKS = Counter("deepflow_fleet_links_total", "Streams by what happened to them.", ["event"])
TASKS_LOST = Counter("deepflow_fleet_tasks_lost_total", "Tasks that were open on a stream that ended.")
EVENTS = Counter("deepflow_fleet_step_events_total", "Step events received.")
REGISTRY_READS = Counter("deepflow_fleet_registry_reads_total", "Reads of the registry.", ["outcome"])
REGISTRY_AGE = Gauge(
    "deepflow_fleet_registry_age_seconds", "Since the registry was last read.", multiprocess_mode="livemax"
)
PREFIX_BLOCKS = Gauge(
    "deepflow_fleet_prefix_blocks", "Block identities in the prefix index.", multiprocess_mode="livesum"
)
PREFIX_GAPS = Counter("deepflow_fleet_prefix_gaps_total", "Cache events that showed a gap.")
CONNECT_SECONDS = Histogram("deepflow_fleet_connect_seconds", "Stream opened until welcome.")
ACTUATION = Histogram(
    "deepflow_fleet_actuation_seconds",
    "Executor ready until this gateway can send it tasks, by the path of its start.",
    ["phase", "path"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)
DEMAND_WRITES = Counter("deepflow_fleet_demand_writes_total", "Reports of demand to Redis.", ["outcome"])
DEMAND_DROPPED = Counter("deepflow_fleet_demand_dropped_total", "Demand of models beyond the bound.")
