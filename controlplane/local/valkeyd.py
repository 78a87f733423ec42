"""`python -m controlplane.local.valkeyd`: the embedded Valkey on a TCP port, as the chart runs it in a pod.

The password comes from $DEEPFLOW_VALKEY_PASSWORD and reaches the server on its standard input, never on a
command line. The process becomes the server, so signals and exit codes are the server's own.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from controlplane.local.valkey import ValkeyError, server_binary

PASSWORD_ENV = "DEEPFLOW_VALKEY_PASSWORD"
MIN_PASSWORD = 16  # characters (ours): whoever has it has all keys


def configuration(folder: Path, port: int, password: str, *, loopback: bool = False) -> str:
    """Text of the server's configuration: durable to one second, never evicting. Raises ValkeyError."""
    if len(password) < MIN_PASSWORD or not password.isalnum():
        raise ValkeyError(f"${PASSWORD_ENV} must have at least {MIN_PASSWORD} letters and digits")
    options = {
        # A pod: who may reach it is for the network policy to say, or for the TLS in front of it.
        "bind": "127.0.0.1" if loopback else "* -::*",
        "port": str(port),
        "requirepass": password,
        "dir": f'"{folder}"',
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": '""',  # the append-only file is the one persistence
        "maxmemory-policy": "noeviction",
        "daemonize": "no",
    }
    return "".join(f"{key} {value}\n" for key, value in options.items())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m controlplane.local.valkeyd", description=__doc__)
    parser.add_argument("--dir", type=Path, required=True, help="folder of the append-only file")
    parser.add_argument("--port", type=int, default=6379)
    parser.add_argument("--loopback", action="store_true", help="reached through `tlsfront` alone")
    arguments = parser.parse_args()
    try:
        binary = str(server_binary())
        password = os.environ.get(PASSWORD_ENV, "")
        text = configuration(arguments.dir.absolute(), arguments.port, password, loopback=arguments.loopback)
    except ValkeyError as error:
        sys.exit(f"valkeyd: {error}")
    reading, writing = os.pipe()
    os.write(writing, text.encode())  # far below a pipe's capacity
    os.close(writing)
    os.dup2(reading, sys.stdin.fileno())
    os.close(reading)
    environment = {key: value for key, value in os.environ.items() if key != PASSWORD_ENV}
    os.execve(binary, [binary, "-"], environment)


if __name__ == "__main__":
    main()
