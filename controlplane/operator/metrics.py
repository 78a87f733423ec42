"""Metrics of the operator. Queues and reconciles have controller-runtime's names: its dashboards fit."""

from prometheus_client import Counter, Gauge, Histogram

# From a reconcile that finds nothing to do to one that waits for a slow API server.
_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_START = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800)

QUEUE_DEPTH = Gauge("workqueue_depth", "Keys that wait.", ["name"])
QUEUE_ADDS = Counter("workqueue_adds_total", "Keys added.", ["name"])
QUEUE_SECONDS = Histogram("workqueue_queue_duration_seconds", "Wait of a key.", ["name"], buckets=_SECONDS)
WORK_SECONDS = Histogram("workqueue_work_duration_seconds", "Work on a key.", ["name"], buckets=_SECONDS)
QUEUE_RETRIES = Counter("workqueue_retries_total", "Keys added again after a failure.", ["name"])
QUEUE_UNFINISHED = Gauge("workqueue_unfinished_work_seconds", "Work in progress, summed.", ["name"])
QUEUE_LONGEST = Gauge(
    "workqueue_longest_running_processor_seconds", "The longest work in progress.", ["name"]
)

RECONCILES = Counter("controller_runtime_reconcile_total", "Reconciles.", ["controller", "result"])
RECONCILE_ERRORS = Counter("controller_runtime_reconcile_errors_total", "Failed reconciles.", ["controller"])
RECONCILE_SECONDS = Histogram(
    "controller_runtime_reconcile_time_seconds", "Reconciles.", ["controller"], buckets=_SECONDS
)
ACTIVE_WORKERS = Gauge("controller_runtime_active_workers", "Reconciles in progress.", ["controller"])
MAX_WORKERS = Gauge("controller_runtime_max_concurrent_reconciles", "Workers.", ["controller"])

LEADING = Gauge("deepflow_operator_leading", "1 while this process holds the lease.")
ACTIONS = Counter("deepflow_operator_actions_total", "Actions by what came of them.", ["action", "outcome"])
CLAIM_SECONDS = Histogram(
    "deepflow_operator_start_seconds", "Claim until the executor serves.", ["path"], buckets=_START
)
PODS = Gauge("deepflow_operator_pods", "Executors' pods.", ["state"])
MISSING = Gauge("deepflow_operator_missing_executors", "Wanted executors without a pod.", ["accelerator"])
TE_CALLS = Counter("deepflow_operator_executor_calls_total", "Calls to executors.", ["call", "outcome"])
TE_POLL_AGE = Gauge("deepflow_operator_executor_poll_lag_seconds", "How late polls of executors are.")
DEMAND_READS = Counter("deepflow_operator_demand_reads_total", "Reads of demand.", ["outcome"])
ACTIVATIONS = Counter("deepflow_operator_activations_total", "Models woken from zero.")
SCALINGS = Counter("deepflow_operator_scalings_total", "Changes of replicas.", ["reason", "advisory"])
PRELOADS = Counter(
    "deepflow_operator_preloads_total", "Weights that warm pods were told to hold ahead.", ["outcome"]
)
KEPT = Gauge("deepflow_operator_kept_models", "Models that pods keep ahead of their load", ["state"])
