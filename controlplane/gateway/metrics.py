"""Prometheus metrics of the gateway, prefix `deepflow_gateway_`. Label values made by clients are capped."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.registry import Collector

from controlplane.fleet.metrics import remembered

OTHER = "other"

# Seconds. From a cached answer to the default request deadline.
_LATENCY = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_STAGE = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1, 5, 10)


def _live_gauge(name: str, text: str) -> Gauge:
    return Gauge(name, text, multiprocess_mode="livesum")


REQUESTS = remembered(
    Counter(
    "deepflow_gateway_requests_total", "Requests by route, status (499: the client left) and model.",
    ["route", "status", "model"],
)
)  # fmt: skip
SECONDS = remembered(
    Histogram("deepflow_gateway_request_seconds", "Whole requests.", ["route"], buckets=_LATENCY)
)
STAGE_SECONDS = remembered(
    Histogram(
    "deepflow_gateway_stage_seconds", "Stages of a request before the job executor has it.",
    ["stage"], buckets=_STAGE,
)
)  # fmt: skip
FIRST_TOKEN_SECONDS = remembered(
    Histogram(
    "deepflow_gateway_time_to_first_token_seconds", "Request received to first token.", ["model"],
    buckets=_LATENCY,
)
)  # fmt: skip
TOKEN_SECONDS = remembered(
    Histogram(
    "deepflow_gateway_time_per_output_token_seconds", "Mean time of a request's tokens after the first.",
    ["model"], buckets=_LATENCY,
)
)  # fmt: skip
TOKENS = remembered(Counter("deepflow_gateway_tokens_total", "Tokens metered.", ["tenant", "model", "kind"]))
IN_FLIGHT = _live_gauge("deepflow_gateway_in_flight", "Generations running.")
CONNECTIONS = _live_gauge("deepflow_gateway_connections", "Open client connections.")
TOKENIZER_WAITING = _live_gauge("deepflow_gateway_tokenizer_calls", "Tokenizer calls running or waiting.")
WORDS = remembered(
    Counter(
        "deepflow_gateway_tokenizer_words_total", "Words of prompts: known from before, or new.", ["outcome"]
    )
)
WORDS_HELD = _live_gauge("deepflow_gateway_tokenizer_words_held", "Words whose token ids are remembered.")
LIMITED = Counter("deepflow_gateway_limited_total", "Requests refused by a bound.", ["bound"])
AUTH = remembered(Counter("deepflow_gateway_auth_total", "Authentications by outcome.", ["outcome"]))
CUT = Counter("deepflow_gateway_streams_cut_total", "Streams ended before [DONE].", ["reason"])
KEEPALIVES = Counter("deepflow_gateway_sse_keepalives_total", "Keep-alive comments sent.")
CATALOGUE = Counter("deepflow_gateway_catalogue_loads_total", "Catalogue reads by outcome.", ["outcome"])
CATALOGUE_MODELS = Gauge(
    "deepflow_gateway_catalogue_models", "Models that can be named.", multiprocess_mode="livemax"
)
REDIS_ERRORS = Counter("deepflow_gateway_redis_errors_total", "Failed calls to Redis.", ["use"])
USAGE_LOST = Counter("deepflow_gateway_usage_rows_lost_total", "Usage rows dropped while Redis was away.")
USAGE_PENDING = _live_gauge("deepflow_gateway_usage_rows_pending", "Usage rows not yet written.")
HELD = _live_gauge("deepflow_gateway_held_requests", "Requests held while their models wake.")
HELD_BYTES = _live_gauge("deepflow_gateway_held_bytes", "Bytes of the bodies of held requests.")
HOLDS = Counter(
    "deepflow_gateway_holds_total",
    "Held requests by end: served, expired (503), refused (by the executor's queue), left.", ["outcome"],
)  # fmt: skip
HOLD_SECONDS = Histogram(
    "deepflow_gateway_hold_seconds", "Holding of requests that were served.", buckets=_LATENCY
)
WAKE_SECONDS = Histogram(
    "deepflow_gateway_wake_seconds", "First request held for a model to an executor that serves it.",
    ["model"], buckets=_LATENCY,
)  # fmt: skip
CARDS = Counter("deepflow_gateway_cards_total", "Model cards looked for in Redis by outcome.", ["outcome"])
PROBES = Counter("deepflow_gateway_probes_total", "One-token model probes.", ["outcome"])


class LabelCap:
    """Lets the first `limit` distinct values of a label through; the rest become "other"."""

    __slots__ = ("_limit", "_seen")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._seen: set[str] = set()

    def __call__(self, value: str) -> str:
        if value in self._seen:
            return value
        if len(self._seen) >= self._limit:
            return OTHER
        self._seen.add(value)
        return value


def render(multiprocess_dir: str | None) -> bytes:
    """The text exposition; over all processes of this gateway where a shared folder is set."""
    if multiprocess_dir is None:
        return generate_latest()
    from prometheus_client import multiprocess

    registry = CollectorRegistry()
    collector: Collector = multiprocess.MultiProcessCollector(registry, path=multiprocess_dir)  # type: ignore[no-untyped-call]  # library
    del collector  # it registered itself
    return generate_latest(registry)
