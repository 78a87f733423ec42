"""TLS between the parts: gateways, operator, executors, fetchers and the Valkey of the chart.

Both ends show a certificate of one authority (mutual TLS), and each checks the other's. Pods are called by
addresses that come and go, so certificates do not name them: every one carries the name `SERVER_NAME`, and
belonging to this authority is what is proved; the cluster token is needed as before. The folder holds
`tls.crt`, `tls.key` and `ca.crt`, as a Secret of cert-manager does when it is mounted.

Certificates that are renewed in the folder are taken for every new connection, without a restart. Made by the
processes' edges from $DEEPFLOW_TLS_DIR; without it connections are plain, as on one machine.
"""

from __future__ import annotations

import functools
import logging
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

TLS_DIR_ENV = "DEEPFLOW_TLS_DIR"
SERVER_NAME = "deepflow.internal"
"""DNS name that every certificate carries."""
_FILES = ("tls.crt", "tls.key", "ca.crt")
_Stamp = tuple[int, ...]

log = logging.getLogger(__name__)


class TlsError(Exception):
    """Certificates cannot be used; `str()` says which and why."""


@dataclass(frozen=True, slots=True)
class _Material:
    certificate: bytes
    key: bytes
    authority: bytes


@dataclass(slots=True, eq=False)
class Tls:
    """Certificates of a process, read again when their files change. Any thread."""

    folder: Path
    _stamp: _Stamp = ()
    _material: _Material = field(default_factory=lambda: _Material(b"", b"", b""))
    _client: ssl.SSLContext | None = None

    def __post_init__(self) -> None:
        """Raises TlsError: a process whose certificates are wrong must not begin."""
        self._load()

    # -- gRPC ------------------------------------------------------------------------------------------

    def server_credentials(self) -> grpc.ServerCredentials:
        """For `add_secure_port`: clients must show a certificate; each handshake has the newest of ours."""
        given = self._material

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            nonlocal given
            material = self._fresh()
            if material is given:
                return None
            given = material
            return _configuration(material)

        made: grpc.ServerCredentials = grpc.dynamic_ssl_server_credentials(
            _configuration(given),
            fetch,  # type: ignore[arg-type]  # None means unchanged; the stubs leave it out
            require_client_authentication=True,
        )
        return made

    def channel_credentials(self) -> grpc.ChannelCredentials:
        material = self._fresh()
        made: grpc.ChannelCredentials = grpc.ssl_channel_credentials(
            material.authority, material.key, material.certificate
        )
        return made

    # -- plain sockets -----------------------------------------------------------------------------------

    def server_context(self) -> ssl.SSLContext:
        """For asyncio's servers: as `server_credentials`."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.verify_mode = ssl.CERT_REQUIRED
        self._fill(context)
        stamp = self._stamp

        def greeted(_: ssl.SSLObject, __: str | None, current: ssl.SSLContext) -> None:
            nonlocal stamp
            self._fresh()
            if self._stamp != stamp:
                stamp = self._stamp
                self._fill(current)  # for the connections after this one

        context.sni_callback = greeted
        return context

    def client_context(self) -> ssl.SSLContext:
        """For asyncio's clients, with `server_hostname=SERVER_NAME`."""
        before = self._stamp
        self._fresh()
        if self._client is None or self._stamp != before:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            self._fill(context)
            self._client = context
        return self._client

    # -- files -------------------------------------------------------------------------------------------

    def _fill(self, context: ssl.SSLContext) -> None:
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_verify_locations(cadata=self._material.authority.decode())
        context.load_cert_chain(self.folder / "tls.crt", self.folder / "tls.key")

    def _fresh(self) -> _Material:
        """The newest that is whole: files are exchanged one after the other."""
        try:
            if self._look() != self._stamp:
                self._load()
                log.info("certificates of %s were read again", self.folder)
        except (TlsError, OSError) as error:
            log.warning("certificates are not renewed, those of before go on: %s", error)
        return self._material

    def _look(self) -> _Stamp:
        return tuple((self.folder / name).stat().st_mtime_ns for name in _FILES)

    def _load(self) -> None:
        try:
            stamp = self._look()
            certificate, key, authority = ((self.folder / name).read_bytes() for name in _FILES)
            trial = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)  # do they fit each other?
            trial.load_cert_chain(self.folder / "tls.crt", self.folder / "tls.key")
            trial.load_verify_locations(cadata=authority.decode())
        except (OSError, ValueError) as error:
            raise TlsError(f"{self.folder}: {error}") from error
        self._stamp, self._material = stamp, _Material(certificate, key, authority)


@functools.lru_cache(maxsize=8)
def of_folder(folder: str) -> Tls | None:
    """One of a process for each folder; None for "". Raises TlsError."""
    return Tls(Path(folder)) if folder else None


def from_environment(env: Mapping[str, str]) -> Tls | None:
    """None where no folder is named. Raises TlsError."""
    return of_folder(env.get(TLS_DIR_ENV, ""))


def socket_options(tls: Tls | None) -> dict[str, Any]:
    """Of asyncio's `create_connection`."""
    return {} if tls is None else {"ssl": tls.client_context(), "server_hostname": SERVER_NAME}


def _configuration(material: _Material) -> grpc.ServerCertificateConfiguration:
    made: grpc.ServerCertificateConfiguration = grpc.ssl_server_certificate_configuration(
        [(material.key, material.certificate)], root_certificates=material.authority
    )
    return made
