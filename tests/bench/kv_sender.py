"""The sending process of `tests.bench.kv_transfer`: a real sender, a plain socket, and the classic path.

The classic path is FlowKV's baseline (arXiv 2504.03775): one call for each block, layer and K or V, over
the transport that is compared. It uses what ours uses (same channel options, same socket options, bytes
without protobuf, no checks), so that the difference is the calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import socket
import struct
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import uvloop

from kvtransfer.auth import TokenAuth
from kvtransfer.channel import SERVER_OPTIONS
from kvtransfer.layout import KVLayout
from kvtransfer.transports import stream_wire as wire
from tests.support.kv import TOKEN, block_bytes, serving

PIECE = struct.Struct("<QI")  # offset in the pages, bytes
RAW_PIECE_BYTES = 1 << 20
"""Of the plain copy over a socket: the fastest of 64 KiB, 256 KiB, 1 MiB and everything."""
CLASSIC_METHOD = "/classic/Piece"


class SenderProcess:
    """Talks to the process over a pipe. Attributes say where its servers are."""

    def __init__(self, shm_dir: Path, layout: KVLayout, num_blocks: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_main, args=(theirs, shm_dir, layout, num_blocks), daemon=True)
        self.process.start()
        theirs.close()
        if not self._pipe.poll(60):
            raise RuntimeError("the sender does not start")
        self.address, self.classic, self.raw = self._pipe.recv()

    def __call__(self, method: str, *args: Any) -> Any:
        self._pipe.send((method, args))
        if not self._pipe.poll(30):
            raise RuntimeError(f"{method} does not answer")
        return self._pipe.recv()

    def close(self) -> None:
        self.process.kill()
        self.process.join(10)
        self._pipe.close()


def _main(pipe: Connection, shm_dir: Path, layout: KVLayout, num_blocks: int) -> None:
    uvloop.run(_serve(pipe, shm_dir, layout, num_blocks))


async def _serve(pipe: Connection, shm_dir: Path, layout: KVLayout, num_blocks: int) -> None:
    async with serving(shm_dir, layout=layout, num_blocks=num_blocks) as host:
        pages = host.pool.pages

        async def piece(request: bytes, _context: object) -> bytes:
            offset, size = PIECE.unpack(request)
            return bytes(pages[offset : offset + size])

        server = grpc.aio.server(interceptors=[TokenAuth(TOKEN)], options=SERVER_OPTIONS)
        handlers = {"Piece": grpc.unary_unary_rpc_method_handler(piece)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("classic", handlers),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        raw = _raw_servers(shm_dir, pages)
        pipe.send((host.address, f"127.0.0.1:{port}", raw))

        def offer(transfer_id: str, blocks: list[int]) -> None:
            host.offer_all(transfer_id, blocks, len(blocks) * layout.block_tokens)

        calls = {"offer": offer, "digest": lambda blocks: block_bytes(host.pool, blocks)}

        def answer() -> None:
            with contextlib.suppress(EOFError):
                while True:
                    method, args = pipe.recv()
                    pipe.send(calls[method](*args))

        await asyncio.to_thread(answer)
        await server.stop(0)


def _raw_servers(folder: Path, pages: memoryview) -> dict[str, Any]:
    """Sockets that send what is asked for, piece by piece, and know nothing else; their addresses."""
    unix = socket.socket(socket.AF_UNIX)
    unix.bind(str(folder / "raw.sock"))
    tcp = socket.socket()
    tcp.bind(("127.0.0.1", 0))
    for listener in (unix, tcp):
        listener.listen()
        threading.Thread(target=_accept, args=(listener, pages), daemon=True).start()
    return {"unix": unix.getsockname(), "tcp": tcp.getsockname()}


def _accept(listener: socket.socket, pages: memoryview) -> None:
    while True:
        connection, _ = listener.accept()
        wire.tune(connection)
        threading.Thread(target=_send, args=(connection, pages), daemon=True).start()


def _send(connection: socket.socket, pages: memoryview) -> None:
    with connection:
        while request := connection.recv(PIECE.size, socket.MSG_WAITALL):
            offset, size = PIECE.unpack(request)
            for at in range(offset, offset + size, RAW_PIECE_BYTES):
                connection.sendall(pages[at : min(at + RAW_PIECE_BYTES, offset + size)])
