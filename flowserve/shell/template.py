"""`python -m flowserve.shell.template --socket PATH`: a process that becomes task executors by the OS's fork.

It has imported what an executor needs and does nothing else, so that a child serves in milliseconds and
shares its pages (DeepServe, section 6: pre-warmed, model-agnostic executors). On the CPU only: a device
that was opened cannot be forked, so accelerators' executors are started as processes of their own.

It has one thread, and no event loop, gRPC or OpenMP ever ran in it: children of a parent with a pool of
threads hang in the first parallel region. Where an import has started a thread it refuses to serve.

A child is forked twice: its parent ends at once, so that it becomes a child of whoever started the template
and is its sub-reaper (`controlplane.local`), which learns of its end as of any other child's. Called by that
one alone, one request a connection:

    {"argv": [options of flowserve.shell], "env": {...}, "log": path}  ->  {"pid": n} or {"error": text}
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import random
import signal
import socket
import struct
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from flowserve.shell.__main__ import prepare_environment

MAX_REQUEST_BYTES = 1 << 20
REQUEST_SECONDS = 5.0
"""A caller that says nothing for so long holds up the others no longer."""
ADOPTION_SECONDS = 5.0
EXIT_NOT_SERVING = 1
EXIT_CHILD_FAILED = 70
NAME_ENV = "DEEPFLOW_PROCESS_NAME"
"""Of a child's environment: what `rename` calls it."""
PR_SET_NAME = 15  # linux/prctl.h
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


class Unfit(Exception):
    """This process must not fork executors; the message says why."""


def warm_up() -> None:
    """Imports what executors import, and lets torch's first operations happen. Raises Unfit."""
    import numpy as np
    import torch
    import uvloop  # noqa: F401

    import flowserve.engine.engine
    import flowserve.engine.processors
    import flowserve.executor.local
    import flowserve.rtc.disk
    import flowserve.shell.process  # noqa: F401
    from flowserve.devices import open_device
    from flowserve.devices.native.library import NativeUnavailable, library
    from flowserve.engine.sampling import sample
    from flowserve.engine.types import SamplingParams
    from flowserve.executor.interface import SampleSpec

    open_device("cpu")
    with contextlib.suppress(NativeUnavailable):  # torch alone, then
        library()
    with torch.inference_mode():
        sample(torch.zeros(1, 64), [SampleSpec(SamplingParams(), [1], [], 0)])
    np.zeros(1).sum()
    threads = len(os.listdir("/proc/self/task"))
    if threads != 1:
        raise Unfit(f"it has {threads} threads after its imports, whose locks a child would inherit")
    gc.collect()
    gc.freeze()  # children's collections write to none of it: pages stay shared


def serve(listener: socket.socket) -> NoReturn:
    """Forks one executor a connection, for ever."""
    while True:
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(REQUEST_SECONDS)
            try:
                answer = _answer(connection, listener)
            except (OSError, ValueError, KeyError, TypeError) as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            with contextlib.suppress(OSError):  # the caller is gone; its executor is not, and is its child
                connection.sendall(json.dumps(answer).encode() + b"\n")


def _answer(connection: socket.socket, listener: socket.socket) -> dict[str, Any]:
    """Raises OSError, ValueError, KeyError, TypeError for a request that cannot be served."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    uid = _CREDENTIALS.unpack(credentials)[1]
    if uid != os.geteuid():
        raise PermissionError(f"user {uid} may not start executors here")
    data = b""
    while not data.endswith(b"\n"):
        part = connection.recv(65536)
        if not part or len(data) + len(part) > MAX_REQUEST_BYTES:
            raise ValueError("no whole request")
        data += part
    request = json.loads(data)
    argv = [str(item) for item in request["argv"]]
    env = {str(name): str(value) for name, value in request["env"].items()}
    log = os.open(request["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        return {"pid": fork_executor(argv, env, log)}
    finally:
        os.close(log)


def fork_executor(argv: list[str], env: dict[str, str], log: int) -> int:
    """The pid of a new executor, a child of this process's parent. Raises OSError."""
    adopter = os.getppid()
    reading, writing = os.pipe()
    between = os.fork()
    if between == 0:
        try:
            child = os.fork()
            if child == 0:
                _become(argv, env, log, adopter)
            os.write(writing, str(child).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        told = pipe.read()
    os.waitpid(between, 0)
    if not told:
        raise OSError("the system forks no more processes")
    return int(told)


def _become(argv: list[str], env: dict[str, str], log: int, adopter: int) -> NoReturn:
    """An executor, from here to the process's end."""
    code = EXIT_CHILD_FAILED
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        for name in os.listdir("/proc/self/fd"):
            if int(name) > 2:
                with contextlib.suppress(OSError):  # the listing's own
                    os.close(int(name))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        deadline = time.monotonic() + ADOPTION_SECONDS
        while os.getppid() != adopter:  # its parent is about to end
            if time.monotonic() > deadline:
                raise Unfit(f"{adopter} did not become its parent: it is no sub-reaper, or has ended")
            time.sleep(0.0005)
        os.environ.clear()
        os.environ.update(env)
        sys.argv = ["flowserve.shell", *argv]
        rename(env.get(NAME_ENV, "executor"))
        _reseed()
        from flowserve.shell import __main__ as shell

        shell.main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException as error:  # noqa: BLE001  nothing above it: the parent's code must not go on here
        print(f"a forked executor failed: {type(error).__name__}: {error}", file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _reseed() -> None:
    """Children of one template must not draw the same numbers."""
    import numpy as np
    import torch

    random.seed()
    np.random.seed()
    torch.seed()


def rename(name: str) -> None:
    """What `ps -o comm` and `top` show of this process (15 bytes of it), since its command line is the
    template's."""
    ctypes.CDLL(None).prctl(PR_SET_NAME, name.encode()[:15], 0, 0, 0)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m flowserve.shell.template", description="Forks executors."
    )
    parser.add_argument("--socket", type=Path, required=True, help="unix socket to listen at")
    path = parser.parse_args().socket
    prepare_environment(1)  # BLAS starts its threads when it is imported
    started = time.monotonic()
    try:
        warm_up()
    except Unfit as error:
        print(f"no template: {error}", file=sys.stderr)
        sys.exit(EXIT_NOT_SERVING)
    listener = socket.socket(socket.AF_UNIX)
    path.unlink(missing_ok=True)
    before = os.umask(0o177)
    listener.bind(os.fspath(path))
    os.umask(before)
    listener.listen(64)
    print(f"ready to fork executors after {time.monotonic() - started:.2f} s", flush=True)
    serve(listener)


if __name__ == "__main__":
    main()
