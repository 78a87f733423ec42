"""The supervisor's side of the template process (flowserve/shell/template.py): executors in milliseconds.

A start that the template cannot do is an ordinary start: it may be on its way, ended, or short of memory, and
no executor may fail for that. The supervisor is the subreaper of what it started, so a forked executor
becomes its child: the exit code comes to it, and its end ends the executor.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import logging
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path

import psutil

from controlplane.local import metrics
from controlplane.local.children import Child, ChildSpec

log = logging.getLogger("deepflow.local")

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
LENGTH = struct.Struct(">I")
# Bound of one start: about 0.05 s on two busy cores, and 64 may stand in line; ours.
FORK_SECONDS = 30.0
# Its imports take about 2.5 s of one core; ours. Whoever starts meanwhile waits, since an ordinary start
# would import the same.
READY_SECONDS = 30.0
READY_POLL_SECONDS = 0.02
ANSWER_BYTES = 4096
UNKNOWN_EXIT = 255  # somebody else took the exit code; asyncio's own answer to that


class TemplateUnavailable(Exception):
    """The template makes no executor now; `str()` says why."""


def supported() -> bool:
    """Whether this system has what forked children need: a subreaper, and descriptors of processes."""
    if sys.platform != "linux":
        return False
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError:  # a kernel or a sandbox without it
        return False
    return True


@contextlib.contextmanager
def subreaper() -> Iterator[None]:
    """While inside, what our descendants leave behind becomes our child. Raises OSError."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    if prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "no subreaper")
    try:
        yield
    finally:
        prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


class ForkedProcess:
    """A child that we did not start ourselves: what `asyncio.subprocess.Process` is to one that we did."""

    def __init__(self, pid: int) -> None:
        """On the event loop. Raises OSError where `pid` is gone or cannot be followed."""
        self.pid = pid
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[int] = self._loop.create_future()
        self._descriptor = os.pidfd_open(pid)
        self._loop.add_reader(self._descriptor, self._reap)

    def _reap(self) -> None:
        """The descriptor of a process is readable once that has ended."""
        try:
            _, status = os.waitpid(self.pid, os.WNOHANG)
            code = os.waitstatus_to_exitcode(status)
        except (ChildProcessError, ValueError):
            code = UNKNOWN_EXIT
        self._loop.remove_reader(self._descriptor)
        os.close(self._descriptor)
        self._ended.set_result(code)

    async def wait(self) -> int:
        """The exit code, negative for a signal. Cancelling it leaves the process alone."""
        return await asyncio.shield(self._ended)

    def terminate(self) -> None:
        """Raises ProcessLookupError."""
        if self._ended.done():
            raise ProcessLookupError
        os.kill(self.pid, signal.SIGTERM)


class Template:
    """Starts executors through the template process that `child` keeps alive."""

    def __init__(self, child: Child, path: Path) -> None:
        self._child = child
        self._path = path
        self._told = False  # that it is of no use now; once until it is again

    async def start(self, spec: ChildSpec, output: int) -> ForkedProcess | None:
        """The process, with `output` as its log; None where it must be started the ordinary way."""
        if spec.template_args is None:
            return None
        try:
            connection = await self._connect()
            process = await self._fork(connection, spec, output)
        except TemplateUnavailable as error:
            log.log(logging.DEBUG if self._told else logging.WARNING,
                    "%s starts without the template: %s", spec.name, error)  # fmt: skip
            self._told = True
            return None
        self._told = False
        return process

    async def _connect(self) -> socket.socket:
        """Waits for a template that is on its way. Raises TemplateUnavailable."""
        deadline = time.monotonic() + READY_SECONDS
        while True:
            connection = socket.socket(socket.AF_UNIX)
            connection.setblocking(False)
            try:
                connection.connect(str(self._path))  # local: at once, or not at all
                return connection
            except OSError as error:
                connection.close()
                why = error.strerror
            if self._child.state in ("backoff", "stopping"):
                raise TemplateUnavailable(self._child.last_exit or f"it is {self._child.state}")
            if time.monotonic() > deadline:
                raise TemplateUnavailable(f"not ready after {READY_SECONDS:.0f} s ({why})")
            await asyncio.sleep(READY_POLL_SECONDS)

    async def _fork(self, connection: socket.socket, spec: ChildSpec, output: int) -> ForkedProcess:
        """Raises TemplateUnavailable. An executor that was not given its `go` ends by itself, so that an
        answer that came too late, or a cancelled start, leaves nobody behind."""
        asked = {
            "command": spec.command,
            "argv": spec.template_args,
            "env": dict(spec.env),
            "orphan_signal": int(spec.orphan_signal),
        }
        body = json.dumps(asked).encode()
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(FORK_SECONDS):
                socket.send_fds(connection, [LENGTH.pack(len(body))], [output])
                await loop.sock_sendall(connection, body)
                answer = b""
                while not answer.endswith(b"\n") and len(answer) < ANSWER_BYTES:
                    part = await loop.sock_recv(connection, ANSWER_BYTES)
                    if not part:
                        raise TemplateUnavailable("it made no executor")
                    answer += part
                said = json.loads(answer)
                if "error" in said:
                    raise TemplateUnavailable(str(said["error"]))
                process = ForkedProcess(int(said["pid"]))
                await loop.sock_sendall(connection, b"g")
        except TimeoutError:
            raise TemplateUnavailable(f"no answer in {FORK_SECONDS:.0f} s") from None
        except (OSError, ValueError, KeyError) as error:
            raise TemplateUnavailable(str(error)) from None
        finally:
            connection.close()
        metrics.FORK_SECONDS.observe(float(said["fork_seconds"]))
        return process

    def measure(self) -> None:
        """Writes the template's memory to its gauge; 0 while it does not run."""
        pid = self._child.pid
        resident = 0
        if pid is not None:
            with contextlib.suppress(psutil.Error):
                resident = psutil.Process(pid).memory_info().rss
        metrics.TEMPLATE_BYTES.set(resident)


class Orphans:
    """What children left behind and the system handed to us: reaped, so that no zombie stays."""

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def reap(self, ours: Collection[int]) -> int:
        """Takes the exits of zombies that are nobody's in `ours` and that were there at the last call too:
        a process that some other part of us has just ended is still waited for by that part."""
        zombies = set(_zombies()) - set(ours)
        reaped = 0
        for pid in zombies & self._seen:
            with contextlib.suppress(ChildProcessError):
                reaped += os.waitpid(pid, os.WNOHANG)[0] == pid
        self._seen = zombies
        return reaped


def _zombies() -> Iterator[int]:
    """Children of this process, of whichever thread, that have ended and were not waited for."""
    for listing in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError, psutil.Error):
            for pid in map(int, listing.read_text().split()):
                if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                    yield pid
