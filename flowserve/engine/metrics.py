"""Prometheus metrics of the step loop (`deepflow_engine_*`). Written by the engine's thread alone.

Leaked blocks and stuck tasks are product metrics: anything but zero is a defect.
"""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

STEPS = Counter("deepflow_engine_steps", "Steps that ran a batch")
STEP_SECONDS = Histogram(
    "deepflow_engine_step_seconds",
    "Time of one batch on the executor",
    buckets=(0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 2, 5),
)
BATCH_TOKENS = Histogram(
    "deepflow_engine_batch_tokens",
    "Tokens of one step",
    buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
)
RUNNING = Gauge("deepflow_engine_running_tasks", "Tasks that hold blocks")
WAITING = Gauge("deepflow_engine_waiting_tasks", "Tasks accepted and holding nothing")
KV_BLOCKS = Gauge("deepflow_engine_kv_blocks", "Blocks of the pool by state", ["state"])
HOST_BYTES = Gauge("deepflow_engine_kv_host_bytes", "Bytes in the host tier")
TRANSFERS = Gauge("deepflow_engine_transfers", "Transfers that hold blocks", ["direction"])
PREFIX_HIT_TOKENS = Counter("deepflow_engine_prefix_hit_tokens", "Prompt tokens found in cache")
PROMPT_TOKENS = Counter("deepflow_engine_prompt_tokens", "Prompt tokens of admitted tasks")
OUTPUT_TOKENS = Counter("deepflow_engine_output_tokens", "Tokens sampled")
PREEMPTIONS = Counter("deepflow_engine_preemptions", "Tasks that lost their blocks and are recomputed")
FINISHED = Counter("deepflow_engine_finished_tasks", "Ended tasks by finish reason", ["reason"])
ERRORS = Counter("deepflow_engine_errors", "Tasks ended or refused with an error", ["code"])
EXECUTOR_FAILURES = Counter("deepflow_engine_executor_failures", "Steps that raised")
LEAKED_BLOCKS = Gauge("deepflow_engine_leaked_blocks", "Blocks whose references nobody answers for")
STUCK_TASKS = Gauge("deepflow_engine_stuck_tasks", "Tasks and transfers without progress for too long")
