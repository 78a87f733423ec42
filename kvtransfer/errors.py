"""Typed failures of transfers, and how they travel over gRPC.

A failed RPC carries its code in trailing metadata; a watch carries it in its terminal update.
"""

from __future__ import annotations

import enum

import grpc
import grpc.aio
from deepflow.v1 import kvtransfer_pb2 as pb

ERROR_CODE_KEY = "x-deepflow-transfer-error"
"""Trailing metadata: the number of a `deepflow.v1.TransferErrorCode`."""


class TransferErrorCode(enum.IntEnum):
    """Mirrors deepflow.v1.TransferErrorCode; see the failure table in README.md."""

    UNKNOWN_TRANSFER = pb.TRANSFER_ERROR_CODE_UNKNOWN_TRANSFER
    LAYOUT_MISMATCH = pb.TRANSFER_ERROR_CODE_LAYOUT_MISMATCH
    LEASE_EXPIRED = pb.TRANSFER_ERROR_CODE_LEASE_EXPIRED
    ABORTED = pb.TRANSFER_ERROR_CODE_ABORTED
    GENERATION_MOVED = pb.TRANSFER_ERROR_CODE_GENERATION_MOVED
    PEER_LOST = pb.TRANSFER_ERROR_CODE_PEER_LOST
    CHECKSUM = pb.TRANSFER_ERROR_CODE_CHECKSUM
    DEADLINE = pb.TRANSFER_ERROR_CODE_DEADLINE
    INTERNAL = pb.TRANSFER_ERROR_CODE_INTERNAL
    BUSY = pb.TRANSFER_ERROR_CODE_BUSY
    STALE_POOL = pb.TRANSFER_ERROR_CODE_STALE_POOL
    NOT_CACHED = pb.TRANSFER_ERROR_CODE_NOT_CACHED


class TransferError(Exception):
    """A transfer that did not happen. `code` says why; nothing is left behind at this end."""

    def __init__(self, code: TransferErrorCode, message: str) -> None:
        super().__init__(f"{code.name}: {message}")
        self.code = code
        self.message = message

    @property
    def retryable(self) -> bool:
        """Whether a new attempt (another prefill, another peer) can succeed."""
        return self.code is not TransferErrorCode.LAYOUT_MISMATCH


class TransportUnavailable(Exception):
    """A transport cannot be used between two ends; another may. `reason` is one word for the metric."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


_STATUS = {
    TransferErrorCode.UNKNOWN_TRANSFER: grpc.StatusCode.NOT_FOUND,
    TransferErrorCode.LAYOUT_MISMATCH: grpc.StatusCode.FAILED_PRECONDITION,
    TransferErrorCode.LEASE_EXPIRED: grpc.StatusCode.FAILED_PRECONDITION,
    TransferErrorCode.STALE_POOL: grpc.StatusCode.FAILED_PRECONDITION,
    TransferErrorCode.ABORTED: grpc.StatusCode.ABORTED,
    TransferErrorCode.GENERATION_MOVED: grpc.StatusCode.ABORTED,
    TransferErrorCode.PEER_LOST: grpc.StatusCode.UNAVAILABLE,
    TransferErrorCode.CHECKSUM: grpc.StatusCode.DATA_LOSS,
    TransferErrorCode.DEADLINE: grpc.StatusCode.DEADLINE_EXCEEDED,
    TransferErrorCode.INTERNAL: grpc.StatusCode.INTERNAL,
    TransferErrorCode.NOT_CACHED: grpc.StatusCode.NOT_FOUND,
    TransferErrorCode.BUSY: grpc.StatusCode.RESOURCE_EXHAUSTED,
}


def status_of(error: TransferError) -> tuple[grpc.StatusCode, str, tuple[tuple[str, str], ...]]:
    """Arguments for `ServicerContext.abort`."""
    return _STATUS[error.code], error.message, ((ERROR_CODE_KEY, str(error.code.value)),)


def error_of(rpc: grpc.aio.AioRpcError, what: str) -> TransferError:
    """The typed error of a failed RPC; `what` names the call and its peer for the message."""
    message = f"{what}: {rpc.details() or rpc.code().name}"
    for key, value in rpc.trailing_metadata() or ():
        if key == ERROR_CODE_KEY:
            return TransferError(code_of(int(value)), message)
    match rpc.code():
        # CANCELLED comes from a server that shuts down; a deadline of one call means a hung peer.
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.CANCELLED | grpc.StatusCode.DEADLINE_EXCEEDED:
            return TransferError(TransferErrorCode.PEER_LOST, message)
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return TransferError(TransferErrorCode.BUSY, message)
        case _:
            return TransferError(TransferErrorCode.INTERNAL, f"{message} ({rpc.code().name})")


def code_of(number: int) -> TransferErrorCode:
    """The code of a number on the wire; INTERNAL for one that a newer peer may have added."""
    try:
        return TransferErrorCode(number)
    except ValueError:
        return TransferErrorCode.INTERNAL
