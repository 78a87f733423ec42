"""API keys: made, listed, revoked and looked up in Redis. Only SHA-256 hashes are stored.

Called by the gateway's authentication (`auth.py`) and by `deepflow keys create|list|revoke`. Records:

- `deepflow:key:<sha256 hex of the key>`: a hash with the fields of `KeyRecord`;
- `deepflow:keys`: a hash from key id to that digest, so that keys can be listed and revoked by id.

A key is 256 random bits, so a plain hash (no salt, no stretching) is enough: it cannot be guessed from
its digest. The key itself is shown once, by `create_key`.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from redis.asyncio import Redis

KEY_PREFIX = "sk-df-"
KEY_BYTES = 32  # 256 bits of randomness
MAX_KEY_CHARS = 256  # longer bearer tokens cannot be ours
REVOKED_KEEP_SECONDS = 90 * 86_400  # ours: a revoked key stays listed for a quarter, then goes
DEFAULT_TENANT = "default"

RECORD_PREFIX = "deepflow:key:"
INDEX_KEY = "deepflow:keys"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z")

# Writes `last_used` only where the record still exists: a late write must not bring a key back.
_TOUCH = """
if redis.call('EXISTS', KEYS[1]) == 1 then redis.call('HSET', KEYS[1], 'last_used', ARGV[1]) end
return 1
"""


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """Bounds of one key; None = unbounded."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None  # prompt and completion tokens
    concurrent: int | None = None  # requests in flight, over all gateways

    @property
    def unbounded(self) -> bool:
        return self.requests_per_minute is None and self.tokens_per_minute is None and self.concurrent is None


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """What is known of a key. Times are Unix seconds."""

    key_id: str
    tenant: str
    name: str = ""
    priority: int = 0  # higher first
    limits: KeyLimits = field(default_factory=KeyLimits)
    admin: bool = False  # sees all tenants' jobs
    created: float = 0.0
    expires: float | None = None
    last_used: float | None = None
    revoked: float | None = None

    def usable(self, now: float) -> bool:
        return self.revoked is None and (self.expires is None or now < self.expires)


def digest_of(key: str) -> str:
    """The SHA-256 of a key, in hex: the only form in which it is stored or compared."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


async def create_key(
    redis: Redis,
    *,
    tenant: str,
    name: str = "",
    priority: int = 0,
    limits: KeyLimits | None = None,
    expires_in: float | None = None,
    admin: bool = False,
) -> tuple[str, KeyRecord]:
    """Makes a key and stores its hash. Returns (the key, shown this once; its record).

    `expires_in` is in seconds. Raises ValueError for a malformed tenant, name, priority or bound.
    """
    if not _NAME.match(tenant):
        raise ValueError("tenant: 1 to 63 letters, digits, '.', '_' or '-', starting with a letter or digit")
    if len(name) > 128 or not name.isprintable():
        raise ValueError("name: at most 128 printable characters")
    if not -100 <= priority <= 100:
        raise ValueError("priority: between -100 and 100")
    limits = limits or KeyLimits()
    for bound in (limits.requests_per_minute, limits.tokens_per_minute, limits.concurrent):
        if bound is not None and not 1 <= bound <= 2**53:
            raise ValueError("limits: positive integers")
    if expires_in is not None and not 0 < expires_in <= 100 * 365 * 86_400:
        raise ValueError("expires_in: a positive number of seconds")
    now = time.time()
    key = KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)
    digest = digest_of(key)
    record = KeyRecord(
        key_id=f"key_{secrets.token_hex(8)}",
        tenant=tenant,
        name=name,
        priority=priority,
        limits=limits,
        admin=admin,
        created=now,
        expires=None if expires_in is None else now + expires_in,
    )
    async with redis.pipeline(transaction=True) as pipe:
        pipe.hset(RECORD_PREFIX + digest, mapping=cast(Any, _to_fields(record)))
        pipe.hset(INDEX_KEY, record.key_id, digest)
        await pipe.execute()
    return key, record


async def list_keys(redis: Redis, tenant: str | None = None) -> list[KeyRecord]:
    """All keys (of one tenant), oldest first, revoked and expired ones included."""
    index = await redis.hgetall(INDEX_KEY)
    records: list[KeyRecord] = []
    gone: list[str] = []
    for key_id, digest in index.items():
        fields = await redis.hgetall(RECORD_PREFIX + _text(digest))
        if not fields:
            gone.append(_text(key_id))
            continue
        record = _from_fields(fields)
        if tenant is None or record.tenant == tenant:
            records.append(record)
    if gone:
        await redis.hdel(INDEX_KEY, *gone)
    return sorted(records, key=lambda record: (record.created, record.key_id))


async def revoke_key(redis: Redis, key_id: str) -> bool:
    """Revokes a key by its id. Gateways refuse it within seconds. False: no such key, or revoked before."""
    digest = await redis.hget(INDEX_KEY, key_id)
    if digest is None:
        return False
    name = RECORD_PREFIX + _text(digest)
    fields = await redis.hgetall(name)
    if not fields or _from_fields(fields).revoked is not None:
        return False
    async with redis.pipeline(transaction=True) as pipe:
        pipe.hset(name, "revoked", repr(time.time()))
        pipe.expire(name, REVOKED_KEEP_SECONDS)
        await pipe.execute()
    return True


async def find_key(redis: Redis, digest: str) -> KeyRecord | None:
    """The record of the key with this digest. Raises redis.RedisError when the store cannot be asked."""
    fields = await redis.hgetall(RECORD_PREFIX + digest)
    return _from_fields(fields) if fields else None


async def touch_keys(redis: Redis, used: Mapping[str, float]) -> None:
    """Writes when keys (by digest) were last used, Unix seconds."""
    async with redis.pipeline(transaction=False) as pipe:
        for digest, when in used.items():
            pipe.eval(_TOUCH, 1, RECORD_PREFIX + digest, repr(when))
        await pipe.execute()


def _to_fields(record: KeyRecord) -> dict[str, str]:
    fields: dict[str, object] = {
        "key_id": record.key_id,
        "tenant": record.tenant,
        "name": record.name,
        "priority": record.priority,
        "requests_per_minute": record.limits.requests_per_minute,
        "tokens_per_minute": record.limits.tokens_per_minute,
        "concurrent": record.limits.concurrent,
        "admin": int(record.admin),
        "created": record.created,
        "expires": record.expires,
        "last_used": record.last_used,
        "revoked": record.revoked,
    }
    return {name: str(value) for name, value in fields.items() if value is not None}


def _from_fields(raw: Mapping[Any, Any]) -> KeyRecord:
    fields = {_text(name): _text(value) for name, value in raw.items()}

    def whole(name: str) -> int | None:
        return int(fields[name]) if name in fields else None

    def real(name: str) -> float | None:
        return float(fields[name]) if name in fields else None

    return KeyRecord(
        key_id=fields.get("key_id", ""),
        tenant=fields.get("tenant", ""),
        name=fields.get("name", ""),
        priority=whole("priority") or 0,
        limits=KeyLimits(whole("requests_per_minute"), whole("tokens_per_minute"), whole("concurrent")),
        admin=fields.get("admin") == "1",
        created=real("created") or 0.0,
        expires=real("expires"),
        last_used=real("last_used"),
        revoked=real("revoked"),
    )


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
