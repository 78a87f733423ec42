"""Prometheus metrics of the cache, prefix `deepflow_rtc_`. Written by the engine's thread and by tiers."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

TABLE_RUNS = Histogram(
    "deepflow_rtc_table_runs",
    "Runs that the new blocks of a table lie in (a transfer costs a call per run)",
    buckets=(1, 2, 3, 5, 8, 13, 21, 55),
)
STAGED_BLOCKS = Counter(
    "deepflow_rtc_staged_blocks", "Blocks copied into one run because their transfer takes less time so"
)
EVICTED_BLOCKS = Counter("deepflow_rtc_evicted_blocks", "Cached blocks handed out for something else")

POPULATED = Counter(
    "deepflow_rtc_populated_blocks", "Blocks brought back to the device, by where from", ["tier"]
)
DECLINED = Counter(
    "deepflow_rtc_populates_declined", "Prefixes computed because bringing them would take longer", ["tier"]
)
DISK_BYTES = Gauge("deepflow_rtc_disk_bytes", "Bytes in the disk tier's folder, of all who share it")
DISK_PENDING = Gauge("deepflow_rtc_disk_pending_bytes", "Pages that wait to be written to the disk")
DISK_WRITTEN = Counter("deepflow_rtc_disk_written_pages", "Pages written to the disk")
DISK_EVICTED = Counter("deepflow_rtc_disk_evicted_pages", "Pages removed from the disk for newer ones")
DISK_DROPPED = Counter(
    "deepflow_rtc_disk_dropped_pages", "Pages not written to the disk: queue_full, error, stopped", ["reason"]
)
DISK_LOST = Counter(
    "deepflow_rtc_disk_lost_pages",
    "Pages not read: gone (evicted by another) or bad (torn or tampered with, and removed)",
    ["reason"],
)
DISK_READ_SECONDS = Histogram(
    "deepflow_rtc_disk_read_seconds",
    "Time of reading and checking a page",
    buckets=(0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1),
)
