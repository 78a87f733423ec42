"""Prometheus metrics of the cache, prefix `deepflow_rtc_`. Written by the engine's thread."""

from __future__ import annotations

from prometheus_client import Counter, Histogram

TABLE_RUNS = Histogram(
    "deepflow_rtc_table_runs",
    "Runs that the new blocks of a table lie in (a transfer costs a call per run)",
    buckets=(1, 2, 3, 5, 8, 13, 21, 55),
)
STAGED_BLOCKS = Counter(
    "deepflow_rtc_staged_blocks", "Blocks copied into one run because their transfer takes less time so"
)
EVICTED_BLOCKS = Counter("deepflow_rtc_evicted_blocks", "Cached blocks handed out for something else")
