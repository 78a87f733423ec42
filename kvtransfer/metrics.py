"""Prometheus metrics of transfers, prefix `deepflow_kv_`. One set per process, in the default registry."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

TRANSFERS = Counter(
    "deepflow_kv_transfers_total",
    "Pulls that ended at this receiver, by transport and outcome (ok, cancelled, or an error code).",
    ("transport", "outcome"),
)
BYTES = Counter("deepflow_kv_bytes_total", "KV bytes copied into this pool.", ("transport",))
SECONDS = Histogram(
    "deepflow_kv_transfer_seconds",
    "Time of a successful pull, from the call until all KV is in place (waiting for prefill included).",
    ("transport",),
    buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120),
)
COPY_SECONDS = Histogram(
    "deepflow_kv_copy_seconds",
    "Time of one pull spent copying.",
    ("transport",),
    buckets=(0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5),
)
MOVES = Histogram(
    "deepflow_kv_moves_per_transfer",
    "Contiguous copies of one pull (FlowKV's calls per request).",
    ("transport",),
    buckets=(0, 1, 2, 3, 5, 8, 13, 21, 34, 55, 100, 200, 500, 1000),
)
INFLIGHT_BYTES = Gauge("deepflow_kv_inflight_bytes", "Bytes of copies that run now at this receiver.")
ACTIVE_PULLS = Gauge("deepflow_kv_active_pulls", "Pulls in progress at this receiver.")
WAITING_PULLS = Gauge("deepflow_kv_waiting_pulls", "Pulls that wait for a slot at this receiver.")
CHOSEN = Counter(
    "deepflow_kv_transport_chosen_total",
    "Handshakes of this receiver that ended with a transport.",
    ("transport",),
)
FALLBACKS = Counter(
    "deepflow_kv_transport_fallbacks_total",
    "Transports a peer offered that could not be opened, so that a slower one is used.",
    ("transport", "reason"),
)
PREFIX_FETCHES = Counter(
    "deepflow_kv_prefix_fetches_total",
    "Prefixes asked for at other executors' caches, by outcome (ok, cancelled, or an error code).",
    ("outcome",),
)
PREFIXES_LENT = Counter("deepflow_kv_prefixes_lent_total", "Cached prefixes put on offer to other executors.")
RATE = Gauge(
    "deepflow_kv_rate_bytes_per_second", "Rate of this receiver's copies, as last measured.", ("transport",)
)
PEERS = Gauge("deepflow_kv_peers", "Peers with a cached channel (and mapping) at this receiver.")
PEERS_GONE = Counter(
    "deepflow_kv_peers_gone_total",
    "Idle peers whose process or pool had ended, so that their mapped memory was let go.",
)

ACTIVE_LEASES = Gauge("deepflow_kv_active_leases", "Transfers on offer at this sender that have not ended.")
RELEASED = Counter(
    "deepflow_kv_released_total",
    "Transfers that ended at this sender (acked, aborted, expired, withdrawn).",
    ("outcome",),
)
TAKEOVERS = Counter(
    "deepflow_kv_takeovers_total", "Transfers that a later attempt took over from their first receiver."
)
FEEDS = Gauge("deepflow_weights_feeds", "Executors that this one is feeding weights.")
FED = Counter(
    "deepflow_weights_fed_total",
    "Feeds that ended at this source: `ok`, `left` by the receiver, `lost` here.",
    ("outcome",),
)
FED_BYTES = Counter("deepflow_weights_fed_bytes_total", "Bytes of weights that receivers took from here.")
FEED_WAITS = Counter(
    "deepflow_weights_feed_wait_seconds_total", "Seconds that feeds waited because tasks run here."
)
FETCHED_BYTES = Counter(
    "deepflow_weights_fetched_bytes_total", "Bytes of weights taken from other executors.", ("transport",)
)
FETCHES = Counter(
    "deepflow_weights_fetches_total",
    "Weights asked of other executors: `ok`, `resumed` at another source, `failed` (storage serves then).",
    ("outcome",),
)
READ_BYTES = Counter(
    "deepflow_kv_read_bytes_total", "Bytes of KV and of weights sent over sockets and gRPC by this sender."
)
ACTIVE_READS = Gauge("deepflow_kv_active_reads", "Read streams this sender serves now.")
REFUSED = Counter(
    "deepflow_kv_refused_total", "Calls this sender refused because a bound was reached.", ("what",)
)
