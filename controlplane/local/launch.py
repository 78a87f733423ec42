"""Becomes a command that dies with its supervisor: `python -I -S launch.py SIGNAL PARENT COMMAND...`.

Linux sends SIGNAL to the process when its parent ends, however it ends; the setting survives exec.
Only the standard library is used, and little of it: this runs before every child. Elsewhere than on
Linux there is no such setting, and `deepflow down` collects what a killed supervisor left.
"""

import os
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    number, parent, command = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)
        if os.getppid() != parent:
            sys.exit("the supervisor ended while this process started")
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
