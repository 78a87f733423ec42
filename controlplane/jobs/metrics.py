"""Prometheus metrics of the jobs room, prefix `deepflow_jobs_`."""

from prometheus_client import Counter, Gauge, Histogram

from controlplane.fleet.metrics import remembered

_LATENCY = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_STEP = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)

JOBS = remembered(Counter("deepflow_jobs_jobs_total", "Jobs by how they ended.", ["outcome"]))
TASKS = remembered(Counter("deepflow_jobs_tasks_total", "Choices by how they ended.", ["outcome"]))
REFUSED = Counter("deepflow_jobs_refused_total", "Requests refused at admission.", ["reason"])
DROPPED = Counter(
    "deepflow_jobs_dropped_total",
    "Requests and choices that got no answer, as the API tells why.",
    ["reason"],
)
REPLAYS = Counter("deepflow_jobs_replays_total", "Attempts that were placed again.", ["reason"])
STALE = Counter("deepflow_jobs_stale_deltas_total", "Deltas or tokens ignored.", ["reason"])
PLACED = remembered(Counter("deepflow_jobs_placements_total", "Submits to executors.", ["kind", "reason"]))
PREDICTED = Counter(
    "deepflow_jobs_predicted_answers_total",
    "Ended answers whose length was predicted, by who predicted and how it turned out.",
    ["source", "outcome"],
)
EARLY = Counter(
    "deepflow_jobs_early_decodes_total",
    "Prefills that started, by whether their decode executor was chosen then, and if not, why.",
    ["outcome"],
)
HANDOVERS = Counter("deepflow_jobs_handovers_total", "Finished prefills by what became of them.", ["outcome"])
IN_FLIGHT = Gauge("deepflow_jobs_tasks_in_flight", "Choices not ended.", multiprocess_mode="livesum")
HELD = Gauge("deepflow_jobs_tasks_held", "Choices that wait for an executor.", multiprocess_mode="livesum")
STUCK = Gauge(
    "deepflow_jobs_tasks_stuck", "Choices not ended past deadline and grace: 0, or a bug.",
    multiprocess_mode="livesum",
)  # fmt: skip
PLACEMENT_SECONDS = remembered(
    Histogram(
        "deepflow_jobs_placement_seconds", "Admitted until first submitted.", ["mode"], buckets=_LATENCY
    )
)
TTFT_SECONDS = remembered(
    Histogram("deepflow_jobs_ttft_seconds", "Admitted until the first token.", ["mode"], buckets=_LATENCY)
)
TPOT_SECONDS = remembered(
    Histogram(
        "deepflow_jobs_tpot_seconds", "Mean time per output token after the first.", ["mode"], buckets=_STEP
    )
)
DECIDE_SECONDS = Histogram(
    "deepflow_jobs_decide_seconds", "One placement decision, its view included.",
    buckets=(0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.01, 0.1),
)  # fmt: skip
RECORDS = Counter("deepflow_jobs_records_total", "Record writes by outcome.", ["outcome"])
RECORDS_PENDING = Gauge(
    "deepflow_jobs_records_pending", "Records not yet written.", multiprocess_mode="livesum"
)
TRACES = Counter(
    "deepflow_jobs_traces_total",
    "Ended jobs and starts whose spans were `sent`, could not be (`failed`), or found no room (`dropped`).",
    ["outcome"],
)
STORE_UP = Gauge("deepflow_jobs_store_up", "The job store took the last write.", multiprocess_mode="livemin")
