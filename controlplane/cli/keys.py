"""`deepflow keys`: API keys of tenants, kept as hashes in Redis. A key is shown once, when made."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from controlplane.cli.output import AsJson, CliError, StateDir, ago, note, print_json, stack_status, table

if TYPE_CHECKING:
    from redis.asyncio import Redis

app = typer.Typer(help="API keys of tenants.", no_args_is_help=True)

T = TypeVar("T")

RedisUrl = Annotated[
    str | None,
    typer.Option(
        "--redis-url",
        envvar="REDIS_URL",
        show_default=False,
        help="Where keys are kept.  [default: the running stack's Valkey]",
    ),
]


@app.command()
def create(
    *,
    tenant: Annotated[str, typer.Argument(help="Whom the key is for; usage is counted per tenant.")],
    name: Annotated[str, typer.Option(help="A name to tell keys apart.")] = "",
    priority: Annotated[int, typer.Option(min=-100, max=100, help="Higher goes first.")] = 0,
    requests_per_minute: Annotated[int | None, typer.Option(min=1, help="Bound of requests.")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(min=1, help="Bound of tokens, both ways.")] = None,
    concurrent: Annotated[int | None, typer.Option(min=1, help="Bound of requests at one time.")] = None,
    expires_days: Annotated[float | None, typer.Option(min=0, help="Days until it ends.")] = None,
    admin: Annotated[bool, typer.Option("--admin", help="Sees the jobs of all tenants.")] = False,
    redis_url: RedisUrl = None,
    state_dir: StateDir = None,
) -> None:
    """Make a key. It is printed once, on stdout, and never stored."""
    from controlplane.gateway.keys import KeyLimits, create_key

    limits = KeyLimits(requests_per_minute, tokens_per_minute, concurrent)
    expires_in = None if expires_days is None else expires_days * 86_400
    try:
        key, record = _with_redis(
            redis_url or str(stack_status(state_dir)["redis_url"]),
            lambda redis: create_key(
                redis, tenant=tenant, name=name, priority=priority, limits=limits, expires_in=expires_in,
                admin=admin,
            ),
        )  # fmt: skip
    except ValueError as error:
        raise CliError(str(error)) from None
    note(f"{record.key_id} for {tenant}; keep the key, it is not shown again:")
    print(key)


@app.command("list")
def list_all(
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's.")] = None,
    as_json: AsJson = False,
    redis_url: RedisUrl = None,
    state_dir: StateDir = None,
) -> None:
    """List keys: ids, tenants and bounds, never the keys themselves."""
    from dataclasses import asdict

    from controlplane.gateway.keys import list_keys

    url = redis_url or str(stack_status(state_dir)["redis_url"])
    records = _with_redis(url, lambda redis: list_keys(redis, tenant))
    if as_json:
        print_json([asdict(record) for record in records])
        return
    now = time.time()
    rows = []
    for record in records:
        state = "revoked" if record.revoked else "active" if record.usable(now) else "expired"
        used = f"{ago(now - record.last_used)} ago" if record.last_used else "never"
        rows.append((record.key_id, record.tenant, record.name or "-", state, record.priority, used))
    table(("KEY", "TENANT", "NAME", "STATE", "PRIORITY", "LAST USED"), rows)


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="KEY", help="Key id, as `deepflow keys list` shows it.")],
    redis_url: RedisUrl = None,
    state_dir: StateDir = None,
) -> None:
    """Revoke a key. Gateways stop taking it within seconds."""
    from controlplane.gateway.keys import revoke_key

    url = redis_url or str(stack_status(state_dir)["redis_url"])
    if not _with_redis(url, lambda redis: revoke_key(redis, key_id)):
        raise CliError(f"no key '{key_id}' (or it is revoked already)")
    note(f"{key_id} is revoked")


def _with_redis(url: str, work: Callable[[Redis], Awaitable[T]]) -> T:
    from redis.asyncio import Redis as AsyncRedis
    from redis.exceptions import RedisError

    async def run() -> T:
        redis = AsyncRedis.from_url(url)
        try:
            return await work(redis)
        finally:
            await redis.aclose()

    try:
        return asyncio.run(run())
    except (RedisError, OSError) as error:
        raise CliError(f"Redis does not answer: {error}") from None
