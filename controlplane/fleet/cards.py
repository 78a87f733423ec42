"""Model cards in Redis: what gateways need of a model that lies on executors' nodes only.

    deepflow:card:<digest>      the card's bytes (`controlplane.gateway.modelcard.encode_card`)
    deepflow:card:uri:<hash>    digest of what was last fetched from the URI with this hash

`<digest>` is the twelve hex digits in a revision (`<id>@<digest>[+<quantization>]`), the start of the SHA-256
of the model's files: a card never changes under its key. Whoever has fetched a model publishes its card;
gateways read it once and keep it. By the URI they find it while the model starts for the first time and
nobody has told its revision. A card that nobody read for CARD_DAYS is gone, and published again by the next
fetch.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Awaitable
from typing import cast

from redis.asyncio import Redis

CARD_PREFIX = "deepflow:card:"
URI_PREFIX = "deepflow:card:uri:"
CARD_DAYS = 30
MAX_CARD_BYTES = 64 << 20
"""The largest known vocabularies make a few MiB (ours: a bound, not a size)."""
CALL_SECONDS = 5.0

_DIGEST = re.compile(r"@([0-9a-f]{12})(?:\+.*)?\Z")


def card_digest(revision: str) -> str | None:
    """The digest that names a revision's card; None for a revision that is not made of one."""
    match = _DIGEST.search(revision)
    return match[1] if match is not None else None


def revision_of(model_id: str, sha256: str, quantization: str = "") -> str:
    """A model's revision: its id, the digest of its files, how its weights are packed ("" = as they are)."""
    text = f"{model_id}@{sha256[:12]}"
    return f"{text}+{quantization}" if quantization else text


async def publish_card(redis: Redis, sha256: str, data: bytes, *, uri: str = "") -> None:
    """`sha256` of the model's files, as hex; `uri` they came from. Raises ValueError, RedisError, OSError or
    TimeoutError."""
    if len(data) > MAX_CARD_BYTES:
        raise ValueError(f"a model card of {len(data)} bytes is larger than {MAX_CARD_BYTES}")
    async with asyncio.timeout(CALL_SECONDS):
        await redis.set(CARD_PREFIX + sha256[:12], data, ex=CARD_DAYS * 86_400)
        if uri:  # last: who finds the digest finds the card
            await redis.set(_uri_key(uri), sha256[:12], ex=CARD_DAYS * 86_400)


async def fetched_digest(redis: Redis, uri: str) -> str | None:
    """Digest of what was last fetched from `uri`. Raises RedisError, OSError or TimeoutError."""
    async with asyncio.timeout(CALL_SECONDS):
        value = await cast("Awaitable[bytes | None]", redis.get(_uri_key(uri)))
    return value.decode() if value is not None else None


def _uri_key(uri: str) -> str:
    """The checksum that a URI may end in is left out: it names the same files."""
    return URI_PREFIX + hashlib.sha256(uri.partition("#")[0].encode()).hexdigest()[:32]


async def read_card(redis: Redis, revision: str) -> bytes | None:
    """None: not published. Raises RedisError, OSError or TimeoutError."""
    digest = card_digest(revision)
    if digest is None:
        return None
    async with asyncio.timeout(CALL_SECONDS):
        return await cast("Awaitable[bytes | None]", redis.getex(CARD_PREFIX + digest, ex=CARD_DAYS * 86_400))
