"""A command in a pod's container, as `kubectl exec` runs it; for the command line against a cluster.

The API server's exec is a WebSocket whose messages begin with a channel's number (v4.channel.k8s.io): 1 is
standard output, 2 standard error, 3 a Status at the end. Who may do this is the kubeconfig's to say (`create`
and `get` of pods/exec).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import aiohttp
import orjson

from controlplane.kube.client import KubeApi, KubeError, Unavailable
from controlplane.kube.resources import PODS, Json

PROTOCOL = "v4.channel.k8s.io"
EXEC_SECONDS = 60.0
MAX_OUTPUT_BYTES = 64 << 20  # of a command of ours: far above a list of a hundred jobs

_OUTPUT, _ERRORS, _STATUS = 1, 2, 3


@dataclass(frozen=True, slots=True)
class Executed:
    """What a command said, and how it ended."""

    code: int
    output: bytes
    errors: str


async def execute(
    api: KubeApi, namespace: str, pod: str, container: str, command: Sequence[str],
    *, seconds: float = EXEC_SECONDS,
) -> Executed:  # fmt: skip
    """Runs it without input. Raises KubeError (NotFound for a pod that is gone, Forbidden)."""
    params = [("container", container), ("stdout", "true"), ("stderr", "true")]
    params += [("command", word) for word in command]
    output, errors, status = bytearray(), bytearray(), b""
    try:
        async with asyncio.timeout(seconds):
            socket = await api.open_socket(PODS.path(namespace, pod, "exec"), params, protocol=PROTOCOL)
            async with socket:
                async for message in socket:
                    if message.type not in (aiohttp.WSMsgType.BINARY, aiohttp.WSMsgType.TEXT):
                        break
                    data = message.data.encode() if isinstance(message.data, str) else bytes(message.data)
                    channel, said = (data[0], data[1:]) if data else (0, b"")
                    if channel == _OUTPUT:
                        output += said
                    elif channel == _ERRORS:
                        errors += said
                    elif channel == _STATUS:
                        status = said
                    if len(output) + len(errors) > MAX_OUTPUT_BYTES:
                        raise KubeError(0, "TooMuch", f"a command said more than {MAX_OUTPUT_BYTES} bytes")
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise Unavailable(0, type(error).__name__, str(error) or "no answer in time") from error
    return Executed(_code(status), bytes(output), errors.decode(errors="replace"))


def _code(status: bytes) -> int:
    """Exit code by the Status at the end. Raises KubeError where the command could not be run at all."""
    try:
        value: Json = orjson.loads(status)
    except orjson.JSONDecodeError:
        raise KubeError(0, "Cut", "the connection ended before the command did") from None
    if value.get("status") == "Success":
        return 0
    for cause in (value.get("details") or {}).get("causes") or []:
        if cause.get("reason") == "ExitCode":
            return int(cause["message"])
    raise KubeError(
        int(value.get("code") or 0), str(value.get("reason") or ""), str(value.get("message") or "")
    )
