"""Which processes are ours: a pid alone is not enough, since the system uses pids again."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass

import psutil

START_TOLERANCE_SECONDS = 1.0  # start times are derived from boot time and clock ticks


@dataclass(frozen=True, slots=True)
class ProcessRecord:
    """A process as it was when started: `command` without the launcher before it."""

    pid: int
    started: float  # Unix seconds, as psutil tells
    command: tuple[str, ...]

    def dump(self) -> list[object]:
        return [self.pid, self.started, list(self.command)]

    @classmethod
    def load(cls, raw: object) -> ProcessRecord | None:
        match raw:
            case [int(pid), int() | float() as started, [*command]]:
                return cls(pid, float(started), tuple(str(part) for part in command))
        return None


def record(pid: int, command: Iterable[str]) -> ProcessRecord | None:
    """The record of a process just started, or None if it is gone already."""
    try:
        return ProcessRecord(pid, psutil.Process(pid).create_time(), tuple(command))
    except psutil.Error:
        return None


def own_record() -> ProcessRecord:
    process = psutil.Process()
    return ProcessRecord(process.pid, process.create_time(), tuple(process.cmdline()))


def is_running(ours: ProcessRecord) -> bool:
    """Whether that very process still runs (same pid, same start, same command; no zombie)."""
    try:
        process = psutil.Process(ours.pid)
        if abs(process.create_time() - ours.started) > START_TOLERANCE_SECONDS:
            return False
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        shown = " ".join(process.cmdline()).rstrip()
    except psutil.Error:
        return False
    # As one text: so a forked executor shows its command. Between fork and exec of its command a started
    # process still shows the launcher before it.
    command = " ".join(ours.command)
    return shown == command or shown.endswith(f" {command}")


def end_all(records: Iterable[ProcessRecord], grace: float) -> list[ProcessRecord]:
    """SIGTERM, then after `grace` seconds SIGKILL, to those that are still ours; returns who was there."""
    present = [ours for ours in records if is_running(ours)]
    for ours in present:
        _send(ours, signal.SIGTERM)
    deadline = time.monotonic() + grace
    while time.monotonic() < deadline and any(is_running(ours) for ours in present):
        time.sleep(0.05)
    for ours in present:
        _send(ours, signal.SIGKILL)
    deadline = time.monotonic() + 5.0
    while time.monotonic() < deadline and any(is_running(ours) for ours in present):
        time.sleep(0.02)
    return present


def _send(ours: ProcessRecord, number: signal.Signals) -> None:
    if is_running(ours):
        try:
            os.kill(ours.pid, number)
        except ProcessLookupError:
            return
