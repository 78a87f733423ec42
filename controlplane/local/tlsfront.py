"""`python -m controlplane.local.tlsfront`: TLS in front of a server on loopback that speaks none.

The Valkey that is bundled is built without TLS; in a pod of the chart this stands beside it. Clients must
show a certificate of the authority (`kvtransfer.tls`, $DEEPFLOW_TLS_DIR); what they say is passed on as it
is.
Certificates that are renewed are taken for new connections. Never on the way of a token.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import sys

from kvtransfer.tls import TLS_DIR_ENV, Tls, TlsError, from_environment

MAX_CONNECTIONS = 4096
"""Above the clients that a Valkey of the chart has: some per gateway, one per executor (ours)."""
CHUNK_BYTES = 64 << 10
CONNECT_SECONDS = 5.0

log = logging.getLogger(__name__)


class Front:
    """Passes bytes between TLS connections and `target`; at most MAX_CONNECTIONS, more are closed at once."""

    def __init__(self, tls: Tls, target: tuple[str, int]) -> None:
        self._tls = tls
        self._target = target
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.Task[None]] = set()

    async def start(self, host: str, port: int) -> int:
        """The port. Raises OSError."""
        self._server = await asyncio.start_server(
            self._serve, host, port, ssl=self._tls.server_context(), limit=CHUNK_BYTES,
            ssl_handshake_timeout=CONNECT_SECONDS,
        )  # fmt: skip
        bound: int = self._server.sockets[0].getsockname()[1]
        return bound

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in list(self._open):
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A task boundary: a connection's end is its own."""
        task = asyncio.current_task()
        assert task is not None
        if len(self._open) >= MAX_CONNECTIONS:
            writer.transport.abort()
            return
        self._open.add(task)
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                behind = await asyncio.open_connection(*self._target, limit=CHUNK_BYTES)
            try:
                await _join((reader, writer), behind)
            finally:
                behind[1].transport.abort()
        except (OSError, TimeoutError) as error:
            log.info("a connection ended: %s", error or type(error).__name__)
        finally:
            self._open.discard(task)
            writer.transport.abort()


_Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def _join(one: _Ends, other: _Ends) -> None:
    """Both ways until either end closes: Redis clients have no use for half a connection."""
    ways = [asyncio.create_task(_pass(one[0], other[1])), asyncio.create_task(_pass(other[0], one[1]))]
    try:
        done, _ = await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in done:
            way.result()
    finally:
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(CHUNK_BYTES):
        writer.write(data)
        await writer.drain()


def _place(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host, int(port)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m controlplane.local.tlsfront", description=__doc__)
    parser.add_argument("--listen", type=_place, default=("0.0.0.0", 6379), help="HOST:PORT")
    parser.add_argument("--to", type=_place, default=("127.0.0.1", 6380), help="HOST:PORT behind it")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        tls = from_environment(os.environ)
    except TlsError as error:
        sys.exit(f"tlsfront: {error}")
    if tls is None:
        sys.exit(f"tlsfront: ${TLS_DIR_ENV} names no folder of certificates")

    async def serve(tls: Tls) -> None:
        front = Front(tls, arguments.to)
        await front.start(*arguments.listen)
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await stop.wait()
        await front.stop()

    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(tls))


if __name__ == "__main__":
    main()
