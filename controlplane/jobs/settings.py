"""Every bound and deadline of the serving runtime, in one place. Environment: `DEEPFLOW_JOBS_<FIELD>`.

Seconds throughout. Where a number comes from stands beside it; "ours" means chosen, not derived.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from controlplane.fleet.channel import ChannelSettings
from controlplane.scheduling.heatmap import HeatMap
from controlplane.scheduling.types import Policy, PolicyName
from kvtransfer.tls import TLS_DIR_ENV, of_folder

ENV_PREFIX = "DEEPFLOW_JOBS_"
TOKEN_ENV = "DEEPFLOW_CLUSTER_TOKEN"


def _token() -> str:
    return os.environ.get(TOKEN_ENV, "")


def _tls_dir() -> str:
    return os.environ.get(TLS_DIR_ENV, "")


def _incarnation() -> str:
    return secrets.token_hex(8)


class RuntimeSettings(BaseModel):
    """One gateway process's job executor, fleet and store."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # Identity and places.
    redis_url: str = "redis://127.0.0.1:6379/0"
    gateway_id: str = "gw-0"
    incarnation: str = Field(default_factory=_incarnation, description="Of this process; never reused.")
    cluster_token: str = Field(default_factory=_token, repr=False, description=f"Default: ${TOKEN_ENV}.")

    tls_dir: str = Field(default_factory=_tls_dir, description=f"Default: ${TLS_DIR_ENV}.")

    # Policy (scheduling.Policy).
    policy: Literal["round_robin", "least_loaded", "prefix_affinity", "combined"] = "combined"
    disaggregate_min_uncached_tokens: int = Field(
        0,
        ge=0,
        description="Prefill and decode are split from so many uncached prompt tokens on. 0: whenever a "
        "prefill and a decode executor are there, as an operator who gave roles expects; larger values "
        "spare short prompts the hand-over once it costs more than the interference it avoids.",
    )
    heat_map: str | None = Field(
        None,
        description="File that `deepflow calibrate --heat-map` wrote: where splitting pays. None: wherever "
        "both roles are there.",
    )
    affinity_slack_ratio: float = Field(
        1.5, ge=1, description="A cached prefix is followed up to ratio x the shortest queue + slack."
    )
    affinity_slack_seconds: float = Field(1, ge=0)
    early_decode: bool = Field(
        True,
        description="Decode executors are chosen when the prefill starts where the view says so, and copy "
        "KV while it computes; else always at the hand-over.",
    )
    early_free_share: float = Field(
        0.25, ge=0, le=1, description="Part of a decode executor's KV that an early choice must leave free."
    )
    early_horizon_seconds: float = Field(
        5, ge=0, description="With several decode executors, longer prefills choose at the hand-over."
    )
    max_step_age_seconds: float = Field(
        10, gt=0, description="An engine whose loop did not turn for so long gets no task; a step aims < 0.5."
    )

    # Admission.
    max_choices: int = Field(1024, ge=1, description="Choices in flight, held ones included; beyond: 429.")
    max_held: int = Field(512, ge=1, description="Choices that wait for an executor; beyond: 429.")
    max_held_bytes: int = Field(
        256 << 20, ge=1, description="Bytes of prompts that wait for an executor of one model; beyond: 429."
    )
    hold_seconds: float = Field(
        5,
        ge=0,
        description="Prompts wait here, where priorities and shares order them, while each executor has more "
        "than this to prefill. 0: they go to executors as long as those take any.",
    )
    hold_step_seconds: float = Field(
        0, ge=0, description="Nothing starts while all decode executors take longer steps. 0: no bound."
    )
    tenant_weights: dict[str, float] = Field(
        default={},
        description='Shares of tenants while requests wait, as JSON (`{"gold":4}`); 1 for all others.',
    )

    # Deadlines of the stages; the request's own comes with it.
    placement_seconds: float = Field(60, gt=0, description="Hold while no executor exists, then 503.")
    contended_seconds: float = Field(
        300, gt=0, description="Hold while executors exist but are full, then 429."
    )
    first_token_seconds: float = Field(
        180, gt=0, description="A task without a first event: it may wait in its executor's queue (ours)."
    )
    stall_seconds: float = Field(60, gt=0, description="A running task without an event.")
    handover_seconds: float = Field(
        10, gt=0, description="A finished prefill waits so long for a decode executor, then runs unified."
    )
    stuck_grace_seconds: float = Field(5, gt=0, description="Past its deadline by so much: a stuck task.")
    tick_seconds: float = Field(0.1, gt=0, description="How often deadlines are looked at.")

    # Replays.
    max_attempts: int = Field(8, ge=1, description="Faults that one choice survives.")
    retry_base_seconds: float = Field(0.02, ge=0, description="First pause; doubles, with jitter.")
    retry_max_seconds: float = Field(1, ge=0)

    # Records (writer.py, store.py).
    record_ttl_seconds: float = Field(3600, ge=1)
    record_flush_seconds: float = Field(0.1, gt=0)
    record_young_seconds: float = Field(
        0.5, ge=0, description="A running job is not recorded before; a shorter one once, when it has ended."
    )
    record_batch: int = Field(500, ge=1)
    record_pending: int = Field(10_000, ge=1, description="Unwritten records kept while Redis is away.")
    redis_seconds: float = Field(2, gt=0, description="One call to Redis; never on an answer's way.")

    # Fleet (registry.py, channel.py).
    registry_poll_seconds: float = Field(1, gt=0)
    eager_group_size: int = Field(
        64, ge=0, description="Streams are opened on discovery for groups up to this size, else on first use."
    )
    connect_seconds: float = Field(5, gt=0, description="Connect, hello and welcome.")
    suspect_seconds: float = Field(3, gt=0, description="Silence (reports come each second): not chosen.")
    lost_seconds: float = Field(10, gt=0, description="Silence: the stream is closed, its tasks replayed.")
    send_queue: int = Field(1024, ge=1, description="Submits that wait on one stream; beyond: elsewhere.")
    prefix_blocks: int = Field(1 << 18, ge=1, description="Block identities known to be cached somewhere.")

    # Shutdown. The gateway drains its own requests first.
    drain_seconds: float = Field(5, ge=0)

    @field_validator("tenant_weights", mode="before")
    @classmethod
    def _weights_from_json(cls, value: object) -> object:
        """The environment has text."""
        return json.loads(value) if isinstance(value, str) else value

    @field_validator("tenant_weights")
    @classmethod
    def _weights_positive(cls, value: dict[str, float]) -> dict[str, float]:
        for tenant, weight in value.items():
            if not 0 < weight < float("inf"):
                raise ValueError(f"the weight of {tenant!r} is not above 0")
        return value

    @field_validator("heat_map")
    @classmethod
    def _heat_map_readable(cls, value: str | None) -> str | None:
        """A gateway with a wrong file says so at its start."""
        _read_heat_map(value)
        return value

    @property
    def scheduling(self) -> Policy:
        return Policy(
            name=PolicyName(self.policy),
            min_uncached_tokens=self.disaggregate_min_uncached_tokens,
            max_step_age_seconds=self.max_step_age_seconds,
            affinity_slack_seconds=self.affinity_slack_seconds,
            affinity_slack_ratio=self.affinity_slack_ratio,
            heat_map=_read_heat_map(self.heat_map),
            early_decode=self.early_decode,
            early_free_share=self.early_free_share,
            early_horizon_seconds=self.early_horizon_seconds,
            hold_seconds=self.hold_seconds,
            hold_step_seconds=self.hold_step_seconds,
        )

    @property
    def channel(self) -> ChannelSettings:
        """Raises kvtransfer.tls.TlsError for certificates that cannot be used."""
        return ChannelSettings(
            gateway_id=self.gateway_id,
            incarnation=self.incarnation,
            token=self.cluster_token,
            tls=of_folder(self.tls_dir),
            suspect_seconds=self.suspect_seconds,
            lost_seconds=self.lost_seconds,
            welcome_seconds=self.connect_seconds,
            send_queue=self.send_queue,
        )

    @classmethod
    def from_env(
        cls, env: Mapping[str, str] | None = None, overrides: Mapping[str, object] | None = None
    ) -> RuntimeSettings:
        """Settings from `DEEPFLOW_JOBS_*`, then `overrides`. Raises pydantic.ValidationError."""
        env = os.environ if env is None else env
        values: dict[str, object] = {
            name: env[ENV_PREFIX + name.upper()]
            for name in cls.model_fields
            if ENV_PREFIX + name.upper() in env
        }
        return cls.model_validate({**values, **(overrides or {})})


def _read_heat_map(path: str | None) -> HeatMap | None:
    """Raises ValueError that says why."""
    if not path:
        return None
    try:
        return HeatMap.parse(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no heat map: {error}") from None
