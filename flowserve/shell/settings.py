"""Command line and environment of a TE, checked. Imports nothing heavy: it runs before torch."""

from __future__ import annotations

import argparse
import ipaddress
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvtransfer import tls as tls_files
from kvtransfer.images import DEFAULT_BUSY_RATE
from kvtransfer.tls import TLS_DIR_ENV, Tls, TlsError
from kvtransfer.transports.choice import MODES

TOKEN_ENV = "DEEPFLOW_CLUSTER_TOKEN"
PARENT_DEATH_ENV = "DEEPFLOW_PARENT_DEATH"
# Under the grace of whoever stops us (local supervisor: 15 s, Kubernetes: 30 s), so that the
# registration is taken back and streams end with a reason before a SIGKILL.
DEFAULT_DRAIN_SECONDS = 10.0
# A step is bounded to 0.5 s; sixty times that is no slow step (ours).
DEFAULT_WATCHDOG_SECONDS = 30.0
DEFAULT_MAX_ASLEEP = 4
"""Models that may sleep in one process (ours): each holds its weights, or a mapping of the node's."""
_IN_THE_CLEAR = {"tcp", "nixl", "mooncake", "collective"}
MAX_CALL_US = 1e6  # a call of a second is no call (ours)
_TE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_RESERVED_IDS = ("ids", "events")  # the registry's own keys beside deepflow:te:<te_id>


class SettingsError(Exception):
    """The process cannot start like this; `str()` says what to change."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    host: str
    port: int  # 0 = any free one

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Settings:
    """What one executor process is told. Names of roles and devices are checked by their rooms."""

    te_id: str
    listen: Endpoint
    advertise_host: str
    token: str
    tls: Tls | None = None
    health_listen: Endpoint | None = None
    redis_url: str = ""
    tasks_listen: Endpoint | None = None
    endpoint_file: Path | None = None
    metrics_listen: Endpoint | None = None
    shm_dir: Path | None = None
    role: str = "colocated"
    device: str = "cpu"
    tensor_parallel: int = 1
    threads: int = 1
    kv_transport: str = "auto"
    kv_checksum: bool = False
    kv_data_listen: Endpoint | None = None
    lease_seconds: float = 30.0
    host_cache_bytes: int = 0
    disk_cache: Path | None = None
    disk_cache_bytes: int = 0
    weights_dir: Path | None = None
    weights_bytes: int = 0
    weights_reserve_bytes: int = 0
    feed_bytes_per_second: int = DEFAULT_BUSY_RATE
    max_asleep: int = DEFAULT_MAX_ASLEEP
    engine: str = "flowserve"
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    compact_call_us: float = 0.0
    block_tokens: int = 16
    max_tasks: int = 256
    max_running: int = 64
    max_batch_tokens: int = 512
    chunked_prefill: bool = True
    prefix_cache: bool = True
    drain_seconds: float = DEFAULT_DRAIN_SECONDS
    watchdog_seconds: float = DEFAULT_WATCHDOG_SECONDS
    parent_death: bool = False
    log_level: str = "info"


def parse_endpoint(text: str) -> Endpoint:
    """ "host:port", "[v6]:port". Raises ValueError."""
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or not 0 <= int(port) <= 65535:
        raise ValueError(f"{text!r} is not HOST:PORT")
    return Endpoint(host, int(port))


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_wildcard(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flowserve.shell",
        description="A task executor: starts warm, loads a model on request, runs its tasks.",
    )
    add = parser.add_argument
    add("--te-id", required=True, help="name in the registry; letters, digits, '.', '_', '-'")
    add("--listen", default="127.0.0.1:0", help="HOST:PORT of the gRPC server, port 0 = any")
    add(
        "--tasks-listen",
        default="",
        help="HOST:PORT of the Tasks stream without gRPC (default: the listen host, any port); 'off' = none",
    )
    add(
        "--health-listen",
        default="",
        help="HOST:PORT of the health service alone, without TLS, for probes that know none",
    )
    add("--advertise-host", default="", help="host that peers reach it at (default: the listen host)")
    add("--endpoint-file", type=Path, help="JSON with the address, written when serving")
    add("--redis-url", default="", help="registry (default: $REDIS_URL); none = not registered")
    add("--role", default="colocated", choices=("colocated", "prefill", "decode"))
    add("--engine", default="flowserve", choices=("flowserve", "vllm"), help="what runs the model")
    add("--engine-args", default="", help="JSON of further arguments of vLLM's engine (AsyncEngineArgs)")
    add("--device", default="cpu", help="cpu, cuda[:N], npu[:N]")
    add("--tensor-parallel", type=int, default=1, help="ranks that share each model, a device each")
    add("--threads", type=int, default=0, help="compute threads (default: the cores it may use)")
    add("--metrics-listen", default="127.0.0.1:0", help="HOST:PORT of /metrics; 'off' = none")
    add("--shm-dir", type=Path, help="folder of the sockets that pass KV pools on this host")
    add("--kv-transport", default="auto", choices=MODES)
    add("--kv-checksum", action="store_true", help="checksums of KV that this executor pulls")
    add(
        "--kv-data-listen",
        default="",
        help="HOST:PORT that peers read KV from (default: the listen host, any port); 'off' = over gRPC",
    )
    add("--lease-seconds", type=float, default=30.0, help="how long KV stays on offer unless renewed")
    add("--host-cache-bytes", type=int, default=0, help="host tier of the prefix cache")
    add("--disk-cache", type=Path, help="folder of the prefix cache's disk tier; executors may share it")
    add("--disk-cache-bytes", type=int, default=0, help="bound of that folder, of all who share it")
    add("--weights-dir", type=Path, help="folder in memory of the node's weights, which executors share")
    add("--weights-bytes", type=int, default=0, help="bound of that folder, of all who share it")
    add("--weights-reserve-bytes", type=int, default=0, help="set aside there for the next model, zeroed")
    add(
        "--feed-bytes-per-second",
        type=int,
        default=DEFAULT_BUSY_RATE,
        help="weights fed to other executors while tasks run here; 0 = no bound",
    )
    add(
        "--max-asleep",
        type=int,
        default=DEFAULT_MAX_ASLEEP,
        help="models that may sleep here, their weights in host memory",
    )
    add("--compact-call-us", type=float, default=0.0, help="compact KV before a transfer; cost of a call")
    add("--block-tokens", type=int, default=16)
    add("--max-tasks", type=int, default=256, help="bound of waiting and running tasks")
    add("--max-running", type=int, default=64)
    add("--max-batch-tokens", type=int, default=512)
    add("--no-chunked-prefill", action="store_true", help="whole prompts in one step")
    add("--no-prefix-cache", action="store_true")
    add("--drain-seconds", type=float, default=DEFAULT_DRAIN_SECONDS, help="bound of the drain on SIGTERM")
    add("--watchdog-seconds", type=float, default=DEFAULT_WATCHDOG_SECONDS, help="a hung engine's age")
    add("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    return parser


def _engine_args(args: argparse.Namespace) -> dict[str, Any]:
    """Raises SettingsError."""
    if not args.engine_args:
        return {}
    if args.engine != "vllm":
        raise SettingsError("--engine-args are vLLM's: give --engine vllm too")
    try:
        value = json.loads(args.engine_args)
    except ValueError as error:
        raise SettingsError(f"--engine-args is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise SettingsError("--engine-args must be a JSON object")
    return value


def _beside(text: str, listen: Endpoint) -> Endpoint | None:
    """A plain socket beside the gRPC server: `text`, or its host and any port. Raises ValueError."""
    if text == "off":
        return None
    return parse_endpoint(text) if text else Endpoint(listen.host, 0)


def _tls(env: Mapping[str, str], transport: str) -> Tls | None:
    """Raises SettingsError."""
    try:
        tls = tls_files.from_environment(env)
    except TlsError as error:
        raise SettingsError(f"{TLS_DIR_ENV}: {error}") from None
    if tls is not None and transport in _IN_THE_CLEAR:
        raise SettingsError(f"--kv-transport {transport} sends KV in the clear: not with {TLS_DIR_ENV}")
    return tls


def parse(argv: Sequence[str], env: Mapping[str, str]) -> Settings:
    """Raises SettingsError; argparse itself exits for unknown options and `--help`."""
    args = _parser().parse_args(argv)
    if not _TE_ID.fullmatch(args.te_id) or args.te_id in _RESERVED_IDS:
        raise SettingsError(
            f"--te-id {args.te_id!r}: letters, digits, '.', '_' and '-', at most 128, not 'ids' or 'events'"
        )
    for name in ("tensor_parallel", "block_tokens", "max_tasks", "max_running", "max_batch_tokens"):
        if getattr(args, name) < 1:
            raise SettingsError(f"--{name.replace('_', '-')} must be positive, is {getattr(args, name)}")
    for name in ("lease_seconds", "watchdog_seconds"):
        if not 0 < getattr(args, name) < float("inf"):
            raise SettingsError(f"--{name.replace('_', '-')} must be positive, is {getattr(args, name)}")
    if args.drain_seconds < 0 or args.threads < 0 or args.host_cache_bytes < 0:
        raise SettingsError("--drain-seconds, --threads and --host-cache-bytes must not be negative")
    if (args.disk_cache is None) != (args.disk_cache_bytes == 0) or args.disk_cache_bytes < 0:
        raise SettingsError("--disk-cache needs a positive --disk-cache-bytes, and the other way round")
    if (args.weights_dir is None) != (args.weights_bytes == 0) or args.weights_bytes < 0:
        raise SettingsError("--weights-dir needs a positive --weights-bytes, and the other way round")
    if not 0 <= args.weights_reserve_bytes <= args.weights_bytes:
        raise SettingsError("--weights-reserve-bytes must lie between 0 and --weights-bytes")
    if args.feed_bytes_per_second < 0:
        raise SettingsError("--feed-bytes-per-second must not be negative")
    engine_args = _engine_args(args)
    if args.max_asleep < 1:
        raise SettingsError("--max-asleep must be 1 or more: a Sleep keeps the model that was awake")
    if not 0 <= args.compact_call_us <= MAX_CALL_US:
        raise SettingsError(f"--compact-call-us must be between 0 and {MAX_CALL_US:.0f}")
    if args.max_running > args.max_batch_tokens:
        raise SettingsError("--max-running must not exceed --max-batch-tokens: each decode takes one token")
    try:
        listen = parse_endpoint(args.listen)
        metrics = None if args.metrics_listen == "off" else parse_endpoint(args.metrics_listen)
        tasks = _beside(args.tasks_listen, listen)
        data = _beside(args.kv_data_listen, listen)
        probes = parse_endpoint(args.health_listen) if args.health_listen else None
    except ValueError as error:
        raise SettingsError(str(error)) from None
    token = env.get(TOKEN_ENV, "")
    tls = _tls(env, args.kv_transport)
    for option, endpoint in (("--listen", listen), ("--tasks-listen", tasks), ("--kv-data-listen", data)):
        if not token and endpoint is not None and not is_loopback(endpoint.host):
            raise SettingsError(
                f"{option} {endpoint} can be reached from other hosts:"
                f" set {TOKEN_ENV}, or listen on 127.0.0.1"
            )
    advertise = args.advertise_host or listen.host
    if _is_wildcard(advertise):
        raise SettingsError(f"peers cannot reach {advertise}: give --advertise-host (in a pod: its IP)")
    return Settings(
        te_id=args.te_id,
        listen=listen,
        tasks_listen=tasks,
        advertise_host=advertise,
        token=token,
        tls=tls,
        health_listen=probes,
        redis_url=args.redis_url or env.get("REDIS_URL", ""),
        endpoint_file=args.endpoint_file,
        metrics_listen=metrics,
        shm_dir=args.shm_dir,
        role=args.role,
        device=args.device,
        tensor_parallel=args.tensor_parallel,
        threads=args.threads or available_cores(),
        kv_transport=args.kv_transport,
        kv_checksum=args.kv_checksum,
        # The data sockets write pages to the wire as they lie: under TLS blocks go over gRPC.
        kv_data_listen=data if tls is None else None,
        lease_seconds=args.lease_seconds,
        host_cache_bytes=args.host_cache_bytes,
        disk_cache=args.disk_cache,
        disk_cache_bytes=args.disk_cache_bytes,
        weights_dir=args.weights_dir,
        weights_bytes=args.weights_bytes,
        weights_reserve_bytes=args.weights_reserve_bytes,
        feed_bytes_per_second=args.feed_bytes_per_second,
        max_asleep=args.max_asleep,
        engine=args.engine,
        engine_args=engine_args,
        compact_call_us=args.compact_call_us,
        block_tokens=args.block_tokens,
        max_tasks=args.max_tasks,
        max_running=args.max_running,
        max_batch_tokens=args.max_batch_tokens,
        chunked_prefill=not args.no_chunked_prefill,
        prefix_cache=not args.no_prefix_cache,
        drain_seconds=args.drain_seconds,
        watchdog_seconds=args.watchdog_seconds,
        parent_death=env.get(PARENT_DEATH_ENV) == "1",
        log_level=args.log_level,
    )
