"""The leader's role control: what the executors report moves one of them, by epoch; a hand-set role stays."""

from __future__ import annotations

from pathlib import Path

from deepflow.v1 import common_pb2, worker_pb2

from controlplane.local.children import Child, ChildSpec
from controlplane.local.executors import Executor, RoleEpochs
from controlplane.local.rolecontrol import RoleControl
from controlplane.local.topology import RoleName


def executor(path: Path, te_id: str, role: RoleName, epochs: RoleEpochs) -> Executor:
    spec = ChildSpec(te_id, "executor", ("true",), {}, path / f"{te_id}.log", stop_seconds=1.0)
    made = Executor(
        te_id,
        child=Child(spec, lambda: None),
        endpoint_file=path / f"{te_id}.json",
        role=role,
        epochs=epochs,
        token="t",
        on_change=lambda: None,
    )
    made.ready = True
    return made


def report(te: Executor, *, queued: int = 0) -> None:
    load = common_pb2.LoadReport(
        queued_prefill_tokens=queued, prefill_tokens_per_second=1000, kv_blocks_total=10, kv_blocks_free=10
    )
    te.status = worker_pb2.ExecutorStatus(record=worker_pb2.ExecutorRecord(te_id=te.te_id), load=load)


def test_a_lasting_prefill_queue_makes_the_decode_executor_help_and_a_pin_prevents_it(tmp_path: Path) -> None:
    for pinned in (False, True):
        epochs = RoleEpochs(tmp_path / f"epoch-{pinned}")
        p, d = (
            executor(tmp_path, n, r, epochs) for n, r in (("p", RoleName.PREFILL), ("d", RoleName.DECODE))
        )
        now = [0.0]
        control = RoleControl({"m": [p, d]}, clock=lambda now=now: now[0])  # type: ignore[misc]  # bound early
        if pinned:
            control.pin("d")
        report(p, queued=60_000)
        control.cycle()  # one executor has not reported yet
        before = d.describe()["role_epoch"]
        report(d)
        for _ in range(6):
            now[0] += 1
            control.cycle()
        assert d.role is (RoleName.DECODE if pinned else RoleName.COLOCATED)
        assert (d.describe()["role_epoch"] != before) is not pinned
        assert p.role is RoleName.PREFILL
        seen = control.describe()["m"]
        assert isinstance(seen, dict) and seen["balance"] == "prefill_hot"
