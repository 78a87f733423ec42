"""What a supervisor that was killed left behind, and how the next one (or `deepflow down`) ends it."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
from collections.abc import Iterator

from controlplane.local.errors import AlreadyRunning
from controlplane.local.processes import ProcessRecord, end_all
from controlplane.local.settings import StatePaths, read_json

GRACE_SECONDS = 5.0


@contextlib.contextmanager
def state_lock(paths: StatePaths) -> Iterator[None]:
    """Holds the state folder for one supervisor. The lock ends with the process, however it ends."""
    with paths.lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AlreadyRunning(str(paths.root)) from None
        yield


def recorded(paths: StatePaths) -> tuple[ProcessRecord | None, list[ProcessRecord]]:
    """The supervisor and the children that the status file names, running or not."""
    status = read_json(paths.status) or {}
    children = [ProcessRecord.load(raw) for raw in status.get("processes", [])]
    return ProcessRecord.load(status.get("supervisor")), [ours for ours in children if ours is not None]


def clear(paths: StatePaths, grace: float = GRACE_SECONDS) -> list[ProcessRecord]:
    """Ends recorded children that still run and removes sockets, endpoint and status files, and the weights
    that they shared.

    Call it only while no supervisor runs. Data, logs, the token and the epoch stay.
    """
    _, children = recorded(paths)
    ended = end_all(children, grace)
    shutil.rmtree(paths.run, ignore_errors=True)
    shutil.rmtree(paths.weights, ignore_errors=True)
    if paths.sockets != paths.run:
        shutil.rmtree(paths.sockets, ignore_errors=True)
    for path in (paths.catalogue, paths.settings, paths.status):
        path.unlink(missing_ok=True)
    return ended
