"""`python -m flowserve.shell`: settings, then the environment that libraries read once, then the rest."""

from __future__ import annotations

import os
import sys

from flowserve.shell.settings import Settings, SettingsError, parse

EXIT_USAGE = 2
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def _die_with_parent() -> None:
    """SIGKILL when the parent ends, however it ends (Linux; elsewhere the supervisor cleans up)."""
    if sys.platform != "linux":
        return
    import ctypes
    import signal

    parent = os.getppid()
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        raise SettingsError(f"prctl: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent:
        raise SettingsError("the parent ended while this process started")


def _prepare(settings: Settings) -> None:
    if settings.parent_death:
        _die_with_parent()
    # OpenMP and BLAS read these when they are loaded; torch.set_num_threads comes too late for some.
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(settings.threads)
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")


def main() -> None:
    try:
        settings = parse(sys.argv[1:], os.environ)
        _prepare(settings)
    except SettingsError as error:
        print(f"python -m flowserve.shell: {error}", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    from flowserve.shell import logs

    logs.configure(settings.te_id, settings.log_level)
    from flowserve.shell import process

    process.main(settings)


if __name__ == "__main__":
    main()
