"""The catalogue of a gateway in a cluster: what the namespace's ModelServings say, followed by a watch.

A ModelServing is in the catalogue from its creation to its deletion, whether or not executors run. The
gateway tokenizes, so it needs the model's card; the model's files lie on executors' nodes, and whoever
fetched them published the card (`controlplane.fleet.cards`). Until there is one the name is known and answers
503. While the API server is away the last list stays.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import ValidationError
from redis.asyncio import Redis
from redis.exceptions import RedisError

from controlplane.api.resources.base import parse_quantity
from controlplane.api.resources.modelserving import ModelServing
from controlplane.api.resources.names import ConditionType, Reason
from controlplane.fleet.cards import card_digest, fetched_digest, read_card, revision_of
from controlplane.gateway import metrics
from controlplane.gateway.catalogue import Catalogue, CatalogueEntry, HoldLimits, Offer, Pending
from controlplane.gateway.modelcard import CardError, ModelCard, build_card, decode_card
from controlplane.gateway.settings import GatewaySettings
from controlplane.gateway.wake import Stage
from controlplane.kube.client import KubeError, connect
from controlplane.kube.reflector import Reflector, Store
from controlplane.kube.resources import MODEL_SERVINGS, Json

RETRY_SECONDS = 2.0
"""Between looks for cards that are not published yet (ours: one small read each)."""
CONNECT_SECONDS = 5.0
MAX_CARDS = 1024
"""Cards kept, those of the catalogue apart: a model that goes and comes again needs no read."""

UNTOLD = "?"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Named:
    """One model to offer, and the names that it won."""

    key: str  # "<namespace>/<name>"
    entry: CatalogueEntry  # its revision is UNTOLD until the first executor has served it
    uri: str
    path: Path | None  # its files, should they be here too


def named(servings: Iterable[ModelServing]) -> tuple[list[Named], list[Pending]]:
    """What to offer, and what cannot be asked yet. Two that want one name: the older has it, as the operator
    says in their conditions."""
    ordered = sorted(servings, key=lambda s: (_created(s), s.metadata.namespace, s.metadata.name))
    taken: set[str] = set()
    found: list[Named] = []
    pending: list[Pending] = []
    for serving in ordered:
        if serving.model_id in taken:
            continue
        aliases = tuple(alias for alias in serving.spec.model.aliases if alias not in taken)
        taken.update((serving.model_id, *aliases))
        status, limits = serving.status, serving.spec.limits
        key, created = "/".join(serving.key), _created(serving)
        if not status.revision and (why := _refused(serving)):
            pending.append(Pending(serving.model_id, aliases, why, key, created))
            continue
        uri = urlsplit(serving.spec.model.uri)
        found.append(
            Named(
                key,
                CatalogueEntry(
                    id=serving.model_id,
                    revision=status.revision or UNTOLD,
                    path="",
                    aliases=aliases,
                    max_model_len=serving.spec.options.max_model_len,
                    dtype=serving.spec.options.dtype,
                    quantization=serving.spec.options.quantization.replace("none", ""),
                    wakes=True,
                    demand=key,
                    hold=HoldLimits(
                        requests=limits.held_requests,
                        bytes=parse_quantity(limits.held_bytes),
                        seconds=limits.hold_seconds,
                    ),
                    created=created,
                ),
                serving.spec.model.uri,
                Path(uri.path) if uri.scheme == "file" else None,
            )
        )
    return found, pending


def stage_of(serving: ModelServing) -> Stage:
    """Its `Ready` condition, and the progress of the start that runs."""
    status, wake = serving.status, serving.status.last_wake
    capacity = status.condition(ConditionType.CAPACITY)
    ready = status.condition(ConditionType.READY)
    shown = capacity if capacity is not None and capacity.status == "False" else ready
    typical = wake.seconds if wake is not None else None
    progress = wake.progress if wake is not None and wake.seconds is None else None
    if shown is None:
        return Stage("Unknown", "", progress, typical)
    detail = "" if shown.reason == Reason.SCALED_TO_ZERO else shown.message
    return Stage(shown.reason, detail, progress, typical)


def _created(serving: ModelServing) -> int:
    at = serving.metadata.creation_timestamp
    return int(at.timestamp()) if at is not None else 0


def _refused(serving: ModelServing) -> str:
    """Why it will not be started; "" if it may be."""
    accepted = serving.status.condition(ConditionType.ACCEPTED)
    if accepted is not None and accepted.status == "False":
        return f"it is not accepted: {accepted.message or accepted.reason}"
    return ""


class Servings:
    """Offers to `catalogue` until cancelled."""

    def __init__(self, catalogue: Catalogue, redis: Redis, settings: GatewaySettings) -> None:
        self._catalogue = catalogue
        self._redis = redis
        self._settings = settings
        self._store = Store(MODEL_SERVINGS)
        self._changed = asyncio.Event()
        self._cards: dict[str, ModelCard] = {}  # by digest
        self._store.on_change(lambda before, now: self._changed.set())

    def stage(self, key: str) -> Stage | None:
        """Where a model's start is; None for one that is not here."""
        namespace, _, name = key.partition("/")
        obj = self._store.get((namespace, name))
        serving = _parse(obj) if obj is not None else None
        return stage_of(serving) if serving is not None else None

    async def run(self) -> None:
        while True:
            try:
                api = await connect(user_agent="deepflow-gateway")
            except KubeError as error:
                log.error("%s", error)
                await asyncio.sleep(CONNECT_SECONDS)
                continue
            namespace = self._settings.kube_namespace or api.namespace
            async with api, asyncio.TaskGroup() as group:
                reflector = Reflector(api, self._store, namespace=namespace)
                group.create_task(reflector.run(), name="servings-watch")
                await reflector.synced.wait()
                await self._follow()

    async def _follow(self) -> None:
        while True:
            self._changed.clear()
            complete = await self.refresh()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if complete else RETRY_SECONDS):
                    await self._changed.wait()

    async def refresh(self) -> bool:
        """One offer of what the store holds. False while a card is missing."""
        servings = [serving for obj in self._store if (serving := _parse(obj)) is not None]
        found, pending = named(servings)
        offers: list[Offer] = []
        for item in found:
            entry = await self._told(item)
            card = await self._card(entry, item.path) if entry is not None else None
            if entry is not None and card is not None:
                offers.append(Offer(entry, card))
                continue
            why = (
                "its files have not been fetched yet"
                if entry is None
                else "its tokenizer is not published yet"
            )
            entry = item.entry
            pending.append(Pending(entry.id, entry.aliases, why, item.key, entry.created))
        await self._catalogue.offer(offers, pending)
        return len(offers) == len(found)

    async def _told(self, item: Named) -> CatalogueEntry | None:
        """The entry with its revision: as the status has it, else by what was last fetched for it."""
        entry = item.entry
        if entry.revision != UNTOLD:
            return entry
        try:
            digest = await fetched_digest(self._redis, item.uri)
        except (RedisError, OSError, TimeoutError) as error:
            log.warning("what was fetched for %s cannot be read: %s", item.key, error)
            return None
        if digest is None:
            return None
        return entry.model_copy(update={"revision": revision_of(entry.id, digest, entry.quantization)})

    async def _card(self, entry: CatalogueEntry, path: Path | None) -> ModelCard | None:
        digest = card_digest(entry.revision) or entry.revision
        card = self._cards.get(digest)
        if card is None:
            card = await self._read(entry, path)
            if card is not None:
                self._cards[digest] = card
                if len(self._cards) > MAX_CARDS:
                    del self._cards[next(iter(self._cards))]
        return card

    async def _read(self, entry: CatalogueEntry, path: Path | None) -> ModelCard | None:
        if path is not None and await asyncio.to_thread(path.exists):
            try:
                return await asyncio.to_thread(build_card, path)
            except (CardError, OSError) as error:
                log.warning("no card can be made of %s: %s", path, error)
        outcome = "missing"
        try:
            data = await read_card(self._redis, entry.revision)
            card = decode_card(data) if data is not None else None
            if card is not None:
                outcome = "read"
            return card
        except (RedisError, OSError, TimeoutError) as error:
            outcome = "failed"
            log.warning("the card of %s cannot be read: %s", entry.id, error)
        except (ValueError, KeyError, TypeError) as error:
            outcome = "invalid"
            log.error("what is published as the card of %s is none: %s", entry.id, error)
        finally:
            metrics.CARDS.labels(outcome).inc()
        return None


def _parse(obj: Json) -> ModelServing | None:
    try:
        return ModelServing.model_validate(obj)
    except ValidationError as error:
        name: Mapping[str, object] = obj.get("metadata") or {}
        log.error("ModelServing %s cannot be read: %s", name.get("name"), error.errors()[0]["msg"])
        return None
