"""The supervisor's side of the template process (`flowserve.shell.template`): executors by fork.

The template is a child like any other and is restarted when it ends. An executor that it forks becomes a
child of this process, which is a sub-reaper for that. Where the template cannot be had (it has ended, it
refuses) executors are started as programs: slower, never not at all.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path

from controlplane.local import metrics
from controlplane.local.children import Child, ChildSpec, Forked

log = logging.getLogger("deepflow.local")

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
ASK_SECONDS = 10.0
"""Longest wait for one fork: thousands of times what it takes; then the executor is started otherwise."""
READY_SECONDS = 60.0
"""Longest wait for a template that still imports (2 s on an idle machine): executors that came first wait,
which costs less than importing the same beside it."""
READY_POLL_SECONDS = 0.02
MAX_ANSWER_BYTES = 1 << 16
NAME_ENV = "DEEPFLOW_PROCESS_NAME"


def supported() -> bool:
    """Whether this system can re-parent processes to us and tell us of their ends."""
    return sys.platform == "linux" and hasattr(os, "pidfd_open")


def become_subreaper() -> None:
    """Descendants whose parent ends become our children from now on. Raises OSError."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


class Template:
    """The running template. `fork` is a `ChildSpec.fork`."""

    def __init__(self, socket: Path, child: Child, program: tuple[str, ...]) -> None:
        """`program` is how executors' commands begin; what follows are the options that a fork gets."""
        self._socket, self.child, self._program = socket, child, program
        self._told = False

    async def fork(self, spec: ChildSpec) -> Forked | None:
        """An executor; None where the template cannot be had."""
        if spec.command[: len(self._program)] != self._program:
            raise ValueError(f"{spec.name} is not started as {' '.join(self._program)}")
        started = time.monotonic()
        try:
            await self._ready()
            started = time.monotonic()
            async with asyncio.timeout(ASK_SECONDS):
                pid = await self._ask(spec)
            forked = Forked(pid, self.child.spec.command)
        except (OSError, TimeoutError, ValueError) as error:
            if not self._told:
                reason = str(error) or type(error).__name__
                log.warning("%s is started without the template: %s", spec.name, reason)
                self._told = True
            return None
        self._told = False
        metrics.FORK_SECONDS.observe(time.monotonic() - started)
        return forked

    async def _ready(self) -> None:
        """Until it listens. Raises OSError once it has ended, TimeoutError."""
        async with asyncio.timeout(READY_SECONDS):
            while not self._socket.exists():
                if self.child.restarts or self.child.state in ("backoff", "stopping"):
                    raise OSError("it has ended")
                await asyncio.sleep(READY_POLL_SECONDS)

    async def _ask(self, spec: ChildSpec) -> int:
        """Raises OSError, ValueError."""
        request = {
            "argv": spec.command[len(self._program) :],
            "env": {**spec.env, NAME_ENV: spec.name},
            "log": os.fspath(spec.log),
        }
        reader, writer = await asyncio.open_unix_connection(self._socket, limit=MAX_ANSWER_BYTES)
        try:
            writer.write(json.dumps(request).encode() + b"\n")
            await writer.drain()
            answer = json.loads(await reader.readline() or b'{"error": "it gave no answer"}')
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        if "pid" not in answer:
            raise OSError(str(answer.get("error")))
        return int(answer["pid"])


class Reaper:
    """Takes leave of processes that became ours because their parent ended before them, and then ended."""

    def __init__(self, known: Callable[[], Collection[int]]) -> None:
        """`known` are the children whose ends somebody waits for."""
        self._known = known
        self._seen: int | None = None

    def look(self) -> None:
        """At most one a look, and only one that was there at the last: asyncio may be about to ask for it."""
        try:
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            found = None
        pid = None if found is None or found.si_pid in self._known() else found.si_pid
        if pid is not None and pid == self._seen:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
            metrics.ORPHANS.inc()
            pid = None
        self._seen = pid
