"""`python -m flowserve.shell.template --socket PATH`: a process that becomes task executors by the OS's fork.

The interpreter and every library of a cpu executor are imported once, then the collector is frozen. Each
request gives a process that shares those pages and runs `flowserve.shell` as if it had been started. This is
DeepServe's pre-warmed executor (section 6, TE-Pre-Load) for a cpu; accelerators start processes, because a
device that was opened does not survive a fork.

A fork copies the calling thread alone, so this process never has another: no event loop, no gRPC, no
parallel region. It counts its threads before it serves and refuses to serve with more than one.

One request on a connection, from the process that started this one and from nobody else:

    asked     4 bytes of length, JSON {"command", "argv", "env", "orphan_signal"}, and one descriptor: the log
    answered  one line of JSON, {"pid": ..., "fork_seconds": ...} by the executor itself or {"error": ...}
    go        one byte; without it (the asker gave up) the executor ends, so that no one runs unowned

The executor is a grandchild: the child between ends at once, and the system hands the executor to its
nearest subreaper, the asker, which thereby gets its exit code and whose end ends it.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import logging
import os
import runpy
import signal
import socket
import struct
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

log = logging.getLogger(__name__)

EXIT_CANNOT_SERVE = 1
PR_SET_PDEATHSIG = 1  # linux/prctl.h
MAX_REQUEST = 4 << 20  # bytes: twice what Linux takes as a command line and environment by default
REQUEST_SECONDS = 5.0  # for a request that has begun, and for its `go`; ours
ADOPTION_SECONDS = 5.0  # until the asker is our parent, which takes the system microseconds; ours
ADOPTION_POLL_SECONDS = 0.0005
BACKLOG = 128
LENGTH = struct.Struct(">I")
PEER = struct.Struct("iII")  # struct ucred: pid, uid, gid
# Read by gRPC as it is loaded; as `flowserve.shell` sets them.
QUIET = {"GRPC_ENABLE_FORK_SUPPORT": "0", "GRPC_VERBOSITY": "ERROR"}


class TemplateError(Exception):
    """No executor was made; `str()` says why."""


@dataclass(frozen=True, slots=True)
class Request:
    """One executor to be."""

    command: tuple[str, ...]  # what it would have been started with: its title
    argv: tuple[str, ...]  # of flowserve.shell
    env: dict[str, str]
    orphan_signal: int
    parent: int  # whose child it becomes

    @classmethod
    def load(cls, data: bytes, parent: int) -> Request:
        """Raises TemplateError."""
        try:
            raw: Any = json.loads(data)
            return cls(
                tuple(map(str, raw["command"])),
                tuple(map(str, raw["argv"])),
                {str(name): str(value) for name, value in raw["env"].items()},
                int(signal.Signals(raw["orphan_signal"])),
                parent,
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TemplateError(f"not a request: {error!r}") from None


def preload() -> None:
    """Everything that an executor on cpu imports before its first load, and nothing that starts a thread."""
    import encodings.idna  # noqa: F401  what a process, a load and a submit need

    import numpy.random  # noqa: F401
    import torch
    import uvloop  # noqa: F401  loaded, not started

    import flowserve.engine.engine
    import flowserve.engine.processors
    import flowserve.executor.local
    import flowserve.models.gguf_file
    import flowserve.models.safetensors_folder
    import flowserve.models.weight_cache
    import flowserve.rtc.disk
    import flowserve.shell.logs
    import flowserve.shell.process  # noqa: F401
    from flowserve.devices import open_device
    from flowserve.devices.native.library import NativeUnavailable, library
    from flowserve.engine.sampling import sample
    from flowserve.engine.types import SamplingParams
    from flowserve.executor.interface import SampleSpec
    from flowserve.shell.settings import parse

    # What first uses compile and cache is compiled and cached here, not in memory of each child.
    parse(["--te-id", "template"], {})
    torch.set_num_threads(1)
    with torch.inference_mode():
        sample(torch.zeros(1, 64), [SampleSpec(SamplingParams(), [1], [], 0)])
    open_device("cpu")
    try:
        library()
    except NativeUnavailable as error:
        log.info("without the compiled step: %s", error)


def threads() -> int:
    """Of this process."""
    return len(os.listdir("/proc/self/task"))


def serve(path: Path) -> NoReturn:
    """Answers requests until the process is ended. Raises OSError where it cannot listen."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    mask = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(mask)
    listener.listen(BACKLOG)
    while True:
        connection, _ = listener.accept()
        with connection:
            try:
                request, output = _receive(connection)
            except (TemplateError, OSError) as error:
                _refuse(connection, str(error))
                continue
            started = time.monotonic()
            try:
                between = os.fork()
            except OSError as error:  # no memory, no more processes
                _refuse(connection, f"fork: {error.strerror}")
                between = -1
            if between == 0:
                listener.close()
                _become(request, connection, output, started)
            os.close(output)
            if between > 0:
                os.waitpid(between, 0)


def _receive(connection: socket.socket) -> tuple[Request, int]:
    """A request and the descriptor of its log. Raises TemplateError, OSError."""
    connection.settimeout(REQUEST_SECONDS)
    pid, uid, _ = PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER.size))
    if uid != os.geteuid() or pid != os.getppid():
        raise TemplateError(f"process {pid} of user {uid} did not start this template")
    data, descriptors, _, _ = socket.recv_fds(connection, LENGTH.size, 1)
    try:
        if len(data) != LENGTH.size or len(descriptors) != 1:
            raise TemplateError("not a request: no length, or no log")
        (size,) = LENGTH.unpack(data)
        if size > MAX_REQUEST:
            raise TemplateError(f"a request of {size} bytes; {MAX_REQUEST} are allowed")
        body = bytearray()
        while len(body) < size:
            part = connection.recv(min(size - len(body), 1 << 16))
            if not part:
                raise TemplateError("the asker went away")
            body += part
        return Request.load(bytes(body), pid), descriptors[0]
    except BaseException:
        for descriptor in descriptors:
            os.close(descriptor)
        raise


def _refuse(connection: socket.socket, why: str) -> None:
    log.error("no executor: %s", why)
    try:
        connection.sendall(json.dumps({"error": why}).encode() + b"\n")
    except OSError as error:
        log.info("nobody reads that: %s", error)


def _become(request: Request, connection: socket.socket, output: int, started: float) -> NoReturn:
    """In the child between: makes the executor and ends. Only the executor goes on here."""
    code = 70  # EX_SOFTWARE
    try:
        if os.fork() > 0:
            os._exit(0)
        _arm(request, output, connection.fileno())
        said = {"pid": os.getpid(), "fork_seconds": time.monotonic() - started}
        connection.settimeout(REQUEST_SECONDS)
        connection.sendall(json.dumps(said).encode() + b"\n")
        if connection.recv(1) != b"g":
            raise TemplateError("nobody waits for this executor any more")
        connection.close()
        code = _run(request)
    except BaseException:  # noqa: BLE001  into the template's loop, which this is, frame by frame
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _arm(request: Request, output: int, connection: int) -> None:
    """Makes the fork what an exec would have given: descriptors, session, signals, environment, title, draws.

    Raises TemplateError where the asker did not become the parent.
    """
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) != connection:
            try:
                os.close(int(name))
            except OSError:
                continue  # the listing's own
    os.setsid()  # a terminal's Ctrl-C reaches the supervisor alone
    deadline = time.monotonic() + ADOPTION_SECONDS
    while os.getppid() != request.parent:
        if time.monotonic() > deadline:
            raise TemplateError(f"process {request.parent} is no subreaper: {os.getppid()} is the parent")
        time.sleep(ADOPTION_POLL_SECONDS)
    # Only now: the setting is about the parent of the moment, and its end between is caught by the check.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, request.orphan_signal, 0, 0, 0)
    if os.getppid() != request.parent:
        raise TemplateError("the supervisor ended while this process started")
    _default_signals()
    _retitle(request.command)
    _replace_environment(request.env)
    _draw_afresh()


def _default_signals() -> None:
    """As in a new interpreter."""
    ignored = {signal.SIGPIPE, signal.SIGXFSZ}
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
        elif 0 < number < signal.SIGRTMIN:
            signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _retitle(command: tuple[str, ...]) -> None:
    """Writes the command over the template's own, where the system reads a process's command line: it shows
    as one text (proc(5), cmdline), which `ps` prints alike and the supervisor compares.

    The room is the old command line and environment, so `_replace_environment` must follow at once. A
    longer command is cut.
    """
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    first, last, env_first, env_last = (int(fields[number - 3]) for number in (48, 49, 50, 51))
    if not 0 < first < last <= env_first < env_last:
        return
    title = " ".join(command).encode(errors="surrogateescape")
    # A NUL at the old end would mean that it still is a list of arguments.
    title = title.ljust(last - first)[: env_last - first - 1]
    ctypes.memset(first, 0, env_last - first)
    ctypes.memmove(first, title, len(title))


def _replace_environment(env: dict[str, str]) -> None:
    # The C library's entries lie where the title now is: forgotten before anybody reads them.
    ctypes.CDLL(None).clearenv()
    os.environ._data.clear()  # type: ignore[attr-defined]  # unsetenv would search those entries
    os.environ.update(env)


def _draw_afresh() -> None:
    """Random numbers of this process alone. Python's own `random` sees to itself."""
    import numpy
    import torch

    numpy.random.seed()
    # Not torch.seed(), which reseeds every device's generator and imports what that takes.
    torch.default_generator.manual_seed(int.from_bytes(os.urandom(8), "little") >> 1)


def _run(request: Request) -> int:
    """`python -m flowserve.shell` with these arguments; the exit code if it returns."""
    from flowserve.devices.native.library import library

    library.cache_clear()  # the environment may switch it off
    logging.getLogger().handlers.clear()
    sys.argv = ["flowserve.shell", *request.argv]
    try:
        runpy.run_module("flowserve.shell", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m flowserve.shell.template", description=__doc__)
    parser.add_argument("--socket", type=Path, required=True, help="where it listens, for this user alone")
    path = parser.parse_args().socket
    # numpy's BLAS would start a pool of its own as it is imported.
    os.environ.update(QUIET, OPENBLAS_NUM_THREADS="1")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    started = time.monotonic()
    preload()
    gc.collect()
    gc.freeze()  # a collection in a child would write to every object, and so copy every page
    if (found := threads()) != 1:
        log.error("does not serve: %d threads run, and a fork would keep one of them", found)
        return EXIT_CANNOT_SERVE
    log.info("serves at %s after %.2f s", path, time.monotonic() - started)
    serve(path)


if __name__ == "__main__":
    sys.exit(main())
