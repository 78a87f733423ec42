"""What `deepflow up` was asked for, and where a stack keeps its files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from controlplane.local.errors import StackError
from controlplane.local.topology import Topology, parse_topology
from controlplane.local.valkey import MAX_SOCKET_PATH

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8000
DEFAULT_TOPOLOGY = "1P1D"
DEFAULT_KV_BYTES = 1 << 30  # per executor: about 46,000 tokens of the default model in bf16
# Of the memory that is free at the start, what all KV pools together may take; the rest is for weights,
# activations and everyone else. Ours.
KV_SHARE_OF_MEMORY = 0.5
MIN_KV_BYTES = 64 << 20
MEMORY_FILES = Path("/dev/shm")  # Linux: a file system in memory
WEIGHTS_SHARE_OF_MEMORY = 0.5  # of its free space, for the weights that executors share. Ours.


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model to serve."""

    uri: str
    id: str
    topology: Topology
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StackSettings:
    """Everything the supervisor needs to know; JSON carries it into a detached supervisor."""

    state_dir: Path
    models: tuple[ModelSpec, ...]
    host: str = DEFAULT_HOST
    port: int = DEFAULT_PORT
    gateways: int = 1
    dtype: str = "auto"
    quantization: str = ""  # of weights: "", int8, int4
    device: str = "cpu"
    tensor_parallel: int = 1  # ranks of each executor
    kv_cache_bytes: int | None = None  # per executor; None = default_kv_bytes()
    max_model_len: int = 0  # 0 = the model's own
    weights_cache_bytes: int | None = None  # of the node's memory, for all; None = the default, 0 = none
    threads: int | None = None  # per executor; None = cores / executors
    role_control: bool = False  # roles follow the load, else they stay as the topology and the operator say
    autoscale: int = 0  # each role may grow to so many executors; 0 = as many as the topology says
    redis_url: str | None = None  # None = an embedded Valkey
    template: bool = True  # executors are forks of a template process, where device and system allow it
    start_timeout: float = 600.0  # seconds until ready, downloads not counted

    @property
    def executors(self) -> int:
        return sum(len(model.topology.roles) for model in self.models)

    @property
    def url(self) -> str:
        """Where a client on this machine reaches the gateway."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    def dump(self) -> dict[str, Any]:
        value = asdict(self)
        value["state_dir"] = str(self.state_dir)
        for model, spec in zip(value["models"], self.models, strict=True):
            model["topology"] = str(spec.topology)
        return value

    @classmethod
    def load(cls, value: dict[str, Any]) -> StackSettings:
        models = tuple(
            ModelSpec(m["uri"], m["id"], parse_topology(m["topology"]), tuple(m["aliases"]))
            for m in value["models"]
        )
        return cls(**{**value, "state_dir": Path(value["state_dir"]), "models": models})


def cores() -> int:
    """Cores this process may use (the scheduler's mask, not the machine's count)."""
    try:
        return max(1, len(os.sched_getaffinity(0)))
    except AttributeError:  # not on macOS
        return max(1, os.cpu_count() or 1)


def threads_per_executor(executors: int, available: int) -> int:
    """Cores shared out evenly; one each when there are more executors than cores."""
    return max(1, available // max(1, executors))


def default_kv_bytes(executors: int, available_bytes: int) -> int:
    """Bytes of KV pool per executor: 1 GiB, less where memory is short."""
    share = int(available_bytes * KV_SHARE_OF_MEMORY) // max(1, executors)
    return max(MIN_KV_BYTES, min(DEFAULT_KV_BYTES, share))


def weights_cache_bytes(settings: StackSettings, paths: StatePaths) -> int:
    """Bound of the node's weight cache: as asked, by default half of what is free; 0 without such memory."""
    if settings.weights_cache_bytes is not None or not MEMORY_FILES.is_dir():
        return settings.weights_cache_bytes or 0
    found = os.statvfs(MEMORY_FILES)
    return int(found.f_bavail * found.f_frsize * WEIGHTS_SHARE_OF_MEMORY)


def default_state_dir() -> Path:
    """$DEEPFLOW_HOME, or the user's state folder."""
    configured = os.environ.get("DEEPFLOW_HOME")
    if configured:
        return Path(configured).expanduser().absolute()
    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(base).expanduser().absolute() / "deepflow"


@dataclass(frozen=True, slots=True)
class StatePaths:
    """The files of one stack. Only `valkey/`, `logs/`, the token and the epoch outlive `down`."""

    root: Path

    @property
    def lock(self) -> Path:
        return self.root / "supervisor.lock"

    @property
    def status(self) -> Path:
        return self.root / "status.json"

    @property
    def settings(self) -> Path:
        return self.root / "settings.json"

    @property
    def catalogue(self) -> Path:
        return self.root / "catalogue.json"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def valkey_data(self) -> Path:
        return self.root / "valkey"

    @property
    def token(self) -> Path:
        return self.root / "cluster-token"

    @property
    def role_epoch(self) -> Path:
        return self.root / "role-epoch"

    @property
    def run(self) -> Path:
        """Endpoint files and metric files of the running processes."""
        return self.root / "run"

    @property
    def sockets(self) -> Path:
        """Unix sockets: beside the state where the path is short enough, else in the temporary folder."""
        beside = self.root / "run"
        if len(str(beside)) + 32 <= MAX_SOCKET_PATH:
            return beside
        digest = hashlib.sha256(str(self.root).encode()).hexdigest()[:12]
        return Path(tempfile.gettempdir()) / f"deepflow-{os.getuid()}-{digest}"

    @property
    def weights(self) -> Path:
        """The node's weight cache: in memory, gone with the stack."""
        digest = hashlib.sha256(str(self.root).encode()).hexdigest()[:12]
        return MEMORY_FILES / f"deepflow-weights-{os.getuid()}-{digest}"

    @property
    def control(self) -> Path:
        return self.sockets / "control.sock"

    @property
    def template_socket(self) -> Path:
        return self.sockets / "template.sock"

    @property
    def valkey_socket(self) -> Path:
        return self.sockets / "valkey.sock"

    def prepare(self) -> None:
        """Makes the folders, private to this user. Raises StackError."""
        try:
            for folder in (self.root, self.logs, self.valkey_data, self.run, self.sockets):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            owner = self.sockets.lstat()
            if owner.st_uid != os.getuid() or self.sockets.is_symlink():
                raise StackError(f"{self.sockets} is not ours; set DEEPFLOW_HOME to a short path")
        except OSError as error:
            raise StackError(f"cannot use the state folder {self.root}: {error.strerror or error}") from None


def write_atomically(path: Path, text: str, mode: int = 0o600) -> None:
    """Readers see the old text or the new one, never a part."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.chmod(name, mode)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, or None when absent or broken."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
