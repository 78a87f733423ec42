"""The gateways' one listening socket, held by the supervisor: while a gateway restarts, connections wait."""

from __future__ import annotations

import errno
import socket

import psutil

from controlplane.local.errors import StackError

BACKLOG = 2048  # connections that may wait; the kernel's own bound (net.core.somaxconn) may be lower


def bind(host: str, port: int) -> socket.socket:
    """Listens on host:port, inheritable. Raises StackError naming the port and, where visible, its owner."""
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, OverflowError) as error:
        raise StackError(f"cannot listen on {host}:{port}: {error}") from None
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
        listener.setblocking(False)
        listener.set_inheritable(True)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise StackError(
                f"port {port} on {host} is in use{_owner(port)}; stop that, or choose another with --port"
            ) from None
        raise StackError(f"cannot listen on {host}:{port}: {error.strerror}") from None
    return listener


def _owner(port: int) -> str:
    """' by NAME (pid N)' where the system lets us see it."""
    try:
        for connection in psutil.net_connections("tcp"):
            address = connection.laddr
            if (
                connection.status == psutil.CONN_LISTEN
                and address
                and address.port == port
                and connection.pid
            ):
                return f" by {psutil.Process(connection.pid).name()} (pid {connection.pid})"
    except (psutil.Error, OSError):
        pass
    return ""
