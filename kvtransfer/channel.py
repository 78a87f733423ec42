"""gRPC options of every internal channel and server, in one place.

Frame size and bandwidth probe: streams of 1-2 MiB messages over loopback were about 1.5 times as
fast with 16 MB frames and the probe off as with the defaults. The window bounds what one Read has
in flight; 4 MiB was as fast as 16 MiB.
"""

from __future__ import annotations

from collections.abc import Sequence

import grpc.aio

from kvtransfer.tls import SERVER_NAME, Tls

READ_CHUNK_BYTES = 2 << 20
"""Bytes of one message of a Read: the fastest size measured for gRPC streams lies at 1-2 MiB."""
MAX_MESSAGE_BYTES = 64 << 20
"""Far above any message of ours; gRPC's own default, 4 MiB, is below a long prompt with logprobs."""
KEEPALIVE_MS = 5_000
"""A peer that answers no ping (stopped, or its host gone) is noticed within two of these (ours)."""
CONNECT_BOUND = "grpc.min_reconnect_backoff_ms"
"""Despite its name, how long an attempt to connect may take at least: a refused one is repeated after the
back-off all the same."""
TLS_CONNECT_MS = 5_000
"""A server asks for its certificates in Python, under the interpreter's lock, which an import of torch holds
for some hundred milliseconds (ours)."""

_COMMON: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.http2.max_frame_size", (16 << 20) - 1),
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 4 << 20),
    ("grpc.http2.write_buffer_size", 8 << 20),
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_MS),
    ("grpc.http2.ping_timeout_ms", KEEPALIVE_MS),  # measured: without it a stopped peer stays unnoticed
    ("grpc.http2.max_pings_without_data", 0),
)
CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    *_COMMON,
    ("grpc.use_local_subchannel_pool", 1),  # a new channel to a restarted peer inherits no back-off
    ("grpc.initial_reconnect_backoff_ms", 100),
    (CONNECT_BOUND, 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.enable_http_proxy", 0),
)
SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    *_COMMON,
    ("grpc.so_reuseport", 0),  # two processes on one port must fail, not share it
    ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_MS // 2),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", KEEPALIVE_MS // 2),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_ping_strikes", 0),
)


def open_channel(
    address: str, tls: Tls | None = None, options: Sequence[tuple[str, int]] = CHANNEL_OPTIONS
) -> grpc.aio.Channel:
    """A channel to another executor; connects lazily. Credentials go with each call as metadata."""
    if tls is None:
        return grpc.aio.insecure_channel(address, options=options)
    kept = (option for option in options if option[0] != CONNECT_BOUND)
    named = (*kept, (CONNECT_BOUND, TLS_CONNECT_MS), ("grpc.ssl_target_name_override", SERVER_NAME))
    return grpc.aio.secure_channel(address, tls.channel_credentials(), options=named)


def add_port(server: grpc.aio.Server, address: str, tls: Tls | None = None) -> int:
    """Listens; the port. Raises RuntimeError, as gRPC does."""
    if tls is None:
        return server.add_insecure_port(address)
    return server.add_secure_port(address, tls.server_credentials())
