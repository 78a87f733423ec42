"""One child process that is kept alive: started, watched, restarted with back-off, stopped in order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from controlplane.local import metrics
from controlplane.local.processes import ProcessRecord, record

log = logging.getLogger("deepflow.local")

BACKOFF_BASE_SECONDS = 0.5
BACKOFF_CAP_SECONDS = 30.0
# A child that lived this long starts with a clean record: its next end is answered at once.
HEALTHY_SECONDS = 60.0
LOG_BYTES = 16 << 20  # per log file; one older file is kept
KILL_WAIT_SECONDS = 5.0
LAUNCHER = Path(__file__).with_name("launch.py")


def backoff_seconds(failures: int) -> float:
    """The wait before the start after `failures` ends in a row: 0.5 s, doubling, at most 30 s."""
    return min(BACKOFF_CAP_SECONDS, BACKOFF_BASE_SECONDS * 2.0 ** min(failures - 1, 16)) if failures else 0.0


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """What to run and how to end it."""

    name: str
    kind: str  # "valkey" | "template" | "executor" | "gateway"
    command: tuple[str, ...]
    env: Mapping[str, str]
    log: Path
    stop_seconds: float  # after SIGTERM, until SIGKILL
    orphan_signal: signal.Signals = signal.SIGKILL  # what the child gets when the supervisor dies
    pass_fds: tuple[int, ...] = ()
    before_start: Callable[[], None] = field(default=lambda: None)
    template_args: tuple[str, ...] | None = None  # of flowserve.shell, where its template may fork it


class Process(Protocol):
    """A running child: one that was started (asyncio's), or one that the template forked."""

    @property
    def pid(self) -> int: ...

    async def wait(self) -> int:
        """The exit code, negative for a signal."""
        ...

    def terminate(self) -> None:
        """Raises ProcessLookupError."""
        ...


Fork = Callable[[ChildSpec, int], Awaitable[Process | None]]
"""Gets a child and its open log; None: to be started the ordinary way."""


class Child:
    """Owns one process at a time. `run()` is a task of the supervisor; `on_change` is told every change."""

    def __init__(self, spec: ChildSpec, on_change: Callable[[], None], fork: Fork | None = None) -> None:
        self.spec = spec
        self.state = "stopped"  # "running" | "backoff" | "stopping" | "stopped"
        self.restarts = 0
        self.last_exit = ""
        self.record: ProcessRecord | None = None
        self.on_change = on_change
        self._fork = fork
        self._process: Process | None = None
        self._failures = 0
        self._stopping = asyncio.Event()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    async def run(self) -> None:
        """Keeps the process alive until `stop()`; cancelling it kills the process."""
        try:
            while not self._stopping.is_set():
                started = time.monotonic()
                why = await self._run_once()
                if self._stopping.is_set():
                    break
                self._failures = 1 if time.monotonic() - started >= HEALTHY_SECONDS else self._failures + 1
                self.restarts += 1
                self.last_exit = why
                metrics.CHILD_RESTARTS.labels(self.spec.name).inc()
                wait = backoff_seconds(self._failures)
                log.warning("%s %s; starting it again in %.1f s", self.spec.name, why, wait)
                self._set("backoff", wait)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), wait)
        finally:
            self._kill_group()
            self._set("stopped")

    async def _run_once(self) -> str:
        """Starts the process and waits for its end; returns how it ended."""
        spec = self.spec
        try:
            spec.before_start()
            # Append mode: truncating the file for rotation is safe while the child writes.
            with spec.log.open("ab") as output:
                self._process = await self._start(output.fileno())
        except OSError as error:
            return f"could not be started ({error})"
        self.record = record(self._process.pid, spec.command)
        if self._stopping.is_set():  # asked to stop between the decision to start and the start
            self._kill_group()
        self._set("running")
        code = await self._process.wait()
        self._kill_group()  # whatever it started and left behind
        self._process = None
        self.record = None
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"

    async def _start(self, output: int) -> Process:
        """Raises OSError."""
        spec = self.spec
        forked = await self._fork(spec, output) if self._fork is not None else None
        metrics.CHILD_STARTS.labels(spec.kind, "exec" if forked is None else "template").inc()
        if forked is not None:
            return forked
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", str(LAUNCHER)),
            *(str(int(spec.orphan_signal)), str(os.getpid()), *spec.command),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=dict(spec.env),
            pass_fds=spec.pass_fds,
            start_new_session=True,  # a terminal's Ctrl-C reaches the supervisor alone
        )

    async def stop(self) -> None:
        """SIGTERM, at most `stop_seconds`, SIGKILL; no restart. Returns when the process is gone."""
        self._stopping.set()
        process = self._process
        if process is None:
            return
        self._set("stopping")
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), self.spec.stop_seconds)
        except TimeoutError:
            log.warning("%s did not stop in %.0f s: killed", self.spec.name, self.spec.stop_seconds)
            self._kill_group()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), KILL_WAIT_SECONDS)

    def kill(self, why: str) -> None:
        """Ends a process that no longer answers; `run` starts it again."""
        log.warning("%s: %s: killed", self.spec.name, why)
        self._kill_group()

    def rotate_log(self) -> None:
        """Copies a log that grew past its bound to `.1` and empties it."""
        path = self.spec.log
        try:
            if path.stat().st_size > LOG_BYTES:
                data = path.read_bytes()
                path.with_suffix(".log.1").write_bytes(data[-LOG_BYTES:])
                os.truncate(path, 0)
        except OSError as error:
            log.warning("log of %s was not rotated: %s", self.spec.name, error)

    def log_tail(self, lines: int = 15) -> str:
        """The last lines of its log."""
        try:
            with self.spec.log.open("rb") as file:
                file.seek(max(0, self.spec.log.stat().st_size - 16384))
                return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])
        except OSError:
            return ""

    def _kill_group(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _set(self, state: str, backoff: float = 0.0) -> None:
        self.state = state
        metrics.CHILD_UP.labels(self.spec.name).set(state == "running")
        metrics.CHILD_BACKOFF.labels(self.spec.name).set(backoff)
        self.on_change()
