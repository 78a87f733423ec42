"""Every bound and deadline of the gateway, in one place. Environment: `DEEPFLOW_GATEWAY_<FIELD>`.

Read once at start by `__main__.py`; tests build it directly. Seconds and bytes throughout. Where a number
comes from stands beside it; "ours" means chosen, not derived.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, Field

ENV_PREFIX = "DEEPFLOW_GATEWAY_"
MIB = 1 << 20


class GatewaySettings(BaseModel):
    """All bounds. Fields are grouped by the stage that uses them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # Identity and places (command line).
    gateway_id: str = "gw-0"
    redis_url: str = "redis://127.0.0.1:6379/0"
    catalogue_path: str = ""
    kubernetes: bool = Field(False, description="The catalogue is what ModelServings say.")
    kube_namespace: str = Field("", description="Of the ModelServings; empty: that of the pod.")
    require_key: bool = Field(False, description="Keys are needed on loopback too.")
    metrics_open: bool = Field(False, description="/metrics without a key from other hosts.")

    # Connections (server.py).
    max_connections: int = Field(4096, ge=1, description="Open sockets per process.")
    max_header_bytes: int = Field(64 * 1024, ge=1024, description="Request line and headers of one request.")
    header_seconds: float = Field(15, gt=0, description="From the first byte to the end of the headers.")
    keep_alive_seconds: int = Field(75, ge=1, description="Idle connections; above common proxies' 60 s.")
    discard_bytes: int = Field(
        256 * MIB, ge=0, description="Bytes of a refused body read and dropped, so that its answer arrives."
    )
    discard_seconds: float = Field(10, gt=0, description="The same, in time.")

    # Body (body.py).
    max_body_bytes: int = Field(10 * MIB, ge=1024)
    body_seconds: float = Field(30, gt=0, description="From the end of the headers to the end of the body.")

    # Validation (generation.py).
    max_prompts: int = Field(128, ge=1, description="Prompts in one completions call.")
    max_n: int = Field(32, ge=1)
    max_choices: int = Field(256, ge=1, description="Prompts times n.")

    # Template and tokenizer (tokenizing.py).
    tokenizer_threads: int = Field(2, ge=1)
    tokenizer_waiting: int = Field(256, ge=1, description="Calls running or waiting; beyond: 429.")
    tokenize_seconds: float = Field(10, gt=0, description="Template and tokenizer, waiting included.")
    template_seconds: float = Field(2, gt=0)

    # Requests (generation.py, sse.py).
    request_seconds: float = Field(600, gt=0, description="Whole request; passed down, never restarted.")
    request_grace_seconds: float = Field(5, gt=0, description="How long the executor may overstay it.")
    max_in_flight: int = Field(1024, ge=1, description="Generations per process; beyond: 429.")
    peek_seconds: float = Field(0.25, ge=0, description="How long a stream's 200 waits for an early error.")
    sse_keepalive_seconds: float = Field(10, gt=0, description="Silence before a comment; proxies cut at 60.")
    sse_buffer_bytes: int = Field(256 * 1024, ge=16 * 1024, description="Unsent bytes of one slow client.")
    sse_stall_seconds: float = Field(30, gt=0, description="A client that reads nothing for so long is cut.")

    # Holding while a model wakes (holding.py); a ModelServing's `limits` win over the first three.
    hold_requests: int = Field(256, ge=0, description="Held per model and process; beyond: 429.")
    hold_bytes: int = Field(64 * MIB, ge=0, description="Bytes of their bodies.")
    hold_seconds: float = Field(300, gt=0, description="How long one is held; then 503 with Retry-After.")
    hold_total_bytes: int = Field(256 * MIB, ge=0, description="Bytes of all held bodies of a process.")
    hold_comment_seconds: float = Field(2, gt=0, description="Between comments that tell of the wake.")
    hold_poll_seconds: float = Field(
        0.02, gt=0, description="How often held models are looked at: little beside a wake's seconds."
    )

    # Authentication (auth.py).
    key_cache_seconds: float = Field(3, gt=0, le=5, description="A revoked key works at most so long.")
    key_cache_size: int = Field(10_000, ge=1)
    key_outage_seconds: float = Field(3600, ge=0, description="Known keys work so long without Redis.")
    redis_seconds: float = Field(0.5, gt=0, description="One call to Redis on a request's way.")

    # Metering (metering.py, metrics.py).
    usage_flush_seconds: float = Field(1, gt=0)
    usage_pending: int = Field(10_000, ge=1, description="Unwritten usage rows kept while Redis is away.")
    usage_days: int = Field(400, ge=1, description="How long a day's usage is kept in Redis.")
    metric_labels: int = Field(
        200, ge=1, description="Distinct values of a client-derived label, then 'other'."
    )

    # Catalogue and readiness.
    catalogue_poll_seconds: float = Field(1, gt=0)
    probe_seconds: float = Field(10, gt=0, description="How long one answered probe vouches for a model.")
    probe_failed_seconds: float = Field(1, ge=0, description="How long a failed probe is believed.")
    probe_timeout_seconds: float = Field(10, gt=0)

    # Shutdown.
    drain_grace_seconds: float = Field(
        0, ge=0, description="Not ready but still accepting: for load balancers."
    )
    drain_seconds: int = Field(60, ge=0, description="Running answers may finish; then they are cancelled.")

    @classmethod
    def from_env(
        cls, env: Mapping[str, str] | None = None, overrides: Mapping[str, object] | None = None
    ) -> GatewaySettings:
        """Settings from `DEEPFLOW_GATEWAY_*`, then `overrides`. Raises pydantic.ValidationError."""
        env = os.environ if env is None else env
        values: dict[str, object] = {
            name: env[ENV_PREFIX + name.upper()]
            for name in cls.model_fields
            if ENV_PREFIX + name.upper() in env
        }
        return cls.model_validate({**values, **(overrides or {})})
