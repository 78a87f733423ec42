"""Which transport two ends use: the best that both can do and that can be opened, decided once a handshake.

Shared memory copies once. A unix socket serves ends on one host of which one has its pool in a
device's memory, TCP any two hosts that reach each other's data port, gRPC everything that could shake
hands at all.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Literal, get_args

from kvtransfer import metrics
from kvtransfer.errors import TransferError, TransferErrorCode, TransportUnavailable
from kvtransfer.transports.base import Transport

logger = logging.getLogger(__name__)

Mode = Literal["auto", "shm", "unix", "tcp", "grpc", "nixl", "mooncake", "collective"]
MODES: tuple[Mode, ...] = get_args(Mode)
BEST_FIRST = ("shm", "unix", "tcp", "grpc")
"""By rate, as tests/bench/kv_transfer.py measures it over one host."""

Opener = Callable[[], Awaitable[Transport]]


async def open_best(mode: Mode, openers: Mapping[str, Opener], peer: str) -> Transport:
    """Opens the best of what both ends can do; `openers` holds those by name, "grpc" among them.

    A `mode` other than "auto" is demanded. Raises TransferError if it cannot be had.
    """
    names = [name for name in BEST_FIRST if name in openers] if mode == "auto" else [mode]
    for name in names:
        try:
            if name not in openers:
                raise TransportUnavailable("host", f"{peer} does not offer it to this executor")
            transport = await openers[name]()
        except TransportUnavailable as error:
            if mode != "auto":
                raise TransferError(
                    TransferErrorCode.INTERNAL, f"{peer}: transport {name} is demanded but: {error}"
                ) from error
            logger.warning("peer %s: transport %s cannot be used: %s", peer, name, error)
            metrics.FALLBACKS.labels(name, error.reason).inc()
            continue
        logger.info("peer %s: transport %s of %s", peer, name, ", ".join(openers))
        metrics.CHOSEN.labels(name).inc()
        return transport
    raise AssertionError("gRPC can always be opened")
