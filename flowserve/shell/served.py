"""What the TE-shell asks of a loaded model and its engine, whichever engine it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from flowserve.engine.types import EngineTask, KVEvents, LoadReport, Role, TaskError

if TYPE_CHECKING:  # imports torch
    from flowserve.engine.core import AuditResult
    from flowserve.models.weight_cache import Named
    from flowserve.shell.loading import Asleep, LoadSpec
    from flowserve.shell.start import Start
    from kvtransfer.pool import BlockStore


class ServedEngine(Protocol):
    """`flowserve.engine.engine.Engine`, `flowserve.vllm.engine.VllmEngine`. From any thread."""

    def submit(self, task: EngineTask) -> None: ...

    def abort(self, task_id: str, attempt: int, reason: str = ...) -> None: ...

    def abort_owner(self, owner: str) -> None: ...

    def pull_done(
        self, task_id: str, attempt: int, error: TaskError | None = None, payload: bytes = b""
    ) -> None: ...

    def release_transfer(self, transfer_id: str, outcome: str) -> None: ...

    def lend(self, identities: Sequence[bytes]) -> tuple[str, int]: ...

    def set_role(self, role: Role) -> None: ...

    def stop(self, timeout: float = ...) -> bool: ...

    @property
    def active_tasks(self) -> int: ...

    @property
    def consecutive_failures(self) -> int: ...

    @property
    def lost(self) -> str: ...

    def load(self) -> LoadReport: ...

    def snapshot_kv_events(self) -> KVEvents: ...

    def audit(self) -> AuditResult: ...


class ServedModel(Protocol):
    """`flowserve.shell.loading.Model`, `flowserve.vllm.loading.VllmModel`."""

    load_seconds: float

    @property
    def spec(self) -> LoadSpec: ...

    @property
    def engine(self) -> ServedEngine: ...

    @property
    def store(self) -> BlockStore | None:
        """What transfers read and write; None: KV is not transferred."""
        ...

    @property
    def start(self) -> Start: ...

    @property
    def image(self) -> Named | None:
        """Its weights in the node's cache."""
        ...

    @property
    def can_sleep(self) -> bool: ...

    @property
    def num_blocks(self) -> int: ...

    @property
    def block_tokens(self) -> int: ...

    @property
    def max_model_len(self) -> int: ...

    @property
    def dtype(self) -> str: ...

    def sleep(self) -> Asleep: ...

    def close(self) -> bool: ...
