"""Which models can be named, and what is known of them. Follows the catalogue file while it changes.

The supervisor writes the file (atomically); it is looked at every second. In a cluster `servings.py` offers
what ModelServings say, beside the file or instead of it. A model is in the catalogue whether or not an
executor holds it now: a name that is not here is the only cause of a 404. A file that cannot be read, or a
model whose card cannot be made, leaves what was there before.

File: `{"models": [{"id", "revision", "aliases": [], "path", "max_model_len", "dtype", "quantization",
"default", "wakes"}]}`. One id
may appear with several revisions: `default` (else the last) says which one the bare id means; each is also
named by its revision, `id@rev`. `wakes`: somebody starts executors on demand, so requests are held for them.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tokenizers import Tokenizer

from controlplane.api.errors import ApiError, model_not_found
from controlplane.gateway import metrics
from controlplane.gateway.chat import ChatTemplate
from controlplane.gateway.detokenize import TokenTable
from controlplane.gateway.modelcard import CardError, ModelCard, build_card
from controlplane.gateway.settings import GatewaySettings
from controlplane.gateway.words import Words

log = logging.getLogger(__name__)

PENDING_RETRY_SECONDS = 5.0
"""A card comes seconds after its model's files (ours)."""
_OPENED_BY = ("id", "revision", "path", "max_model_len", "created")


class HoldLimits(BaseModel):
    """Bounds of what one gateway process holds for one model while it wakes."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    requests: int = Field(ge=0)
    bytes: int = Field(ge=0)
    seconds: float = Field(gt=0)


class CatalogueEntry(BaseModel):
    """One model of the file, or of a ModelServing."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    id: str = Field(min_length=1)
    revision: str = Field(min_length=1)
    path: str
    aliases: tuple[str, ...] = ()
    max_model_len: int = 0  # 0 = the model's own
    dtype: str = "auto"
    quantization: str = ""
    default: bool = False
    wakes: bool = False  # requests are held while no executor serves it
    demand: str = ""  # its name in `controlplane.fleet.demand`; "" = its id
    hold: HoldLimits | None = None  # None: the gateway's settings
    created: int = 0  # Unix seconds; 0 = when its files were written

    @property
    def demand_key(self) -> str:
        return self.demand or self.id


@dataclass(frozen=True, slots=True)
class Offer:
    """A model from elsewhere than the file, with its card: its files need not be here."""

    entry: CatalogueEntry
    card: ModelCard


@dataclass(frozen=True, slots=True)
class Pending:
    """A name that is known, of a model that cannot be asked yet."""

    id: str
    aliases: tuple[str, ...]
    why: str
    demand: str  # the model's name in `controlplane.fleet.demand`
    created: int  # Unix seconds


class CatalogueFile(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    models: tuple[CatalogueEntry, ...]


@dataclass(frozen=True, slots=True, eq=False)
class ServedModel:
    """A model ready to be asked: its entry, card, tokenizer, token table and template."""

    entry: CatalogueEntry
    card: ModelCard
    tokenizer: Tokenizer
    table: TokenTable
    words: Words
    template: ChatTemplate | None
    context_length: int
    created: int
    fingerprint: str

    @property
    def id(self) -> str:
        return self.entry.id

    @property
    def revision(self) -> str:
        return self.entry.revision


class Catalogue:
    """Names → models. `run` follows the file; `load` reads it once."""

    def __init__(self, settings: GatewaySettings) -> None:
        self._settings = settings
        self._path = Path(settings.catalogue_path)
        self._state: tuple[int, int, int] | None = None
        self._names: dict[str, ServedModel] = {}
        self._served: list[ServedModel] = []
        self._listed: tuple[CatalogueEntry, ...] = ()  # by the file
        self._offers: tuple[Offer, ...] = ()
        self._pending: dict[str, Pending] = {}
        self.on_pending: Callable[[str], None] = lambda demand: None
        """Told of each request for a pending name: to be asked is what it may be waiting for."""
        self._replacing = asyncio.Lock()
        self._change = asyncio.Event()
        self._missing = {"file"} if settings.catalogue_path else set()
        if settings.kubernetes:
            self._missing.add("offers")

    @property
    def loaded(self) -> bool:
        """Every source was read once."""
        return not self._missing

    def find(self, name: str) -> ServedModel | None:
        """By id, alias or revision; None for a name that cannot be asked, or is not known."""
        return self._names.get(name)

    def pending(self, name: str) -> Pending | None:
        """What keeps a known name from being asked."""
        return self._pending.get(name)

    def resolve(self, name: str) -> ServedModel:
        """By id, alias or revision. Raises ApiError 404 model_not_found; 503 for a name that is known while
        its tokenizer is not yet."""
        model = self._names.get(name)
        if model is None:
            pending = self._pending.get(name)
            if pending is None:
                raise model_not_found(name)
            self.on_pending(pending.demand)
            message = f"The model `{name}` cannot be asked yet: {pending.why}."
            raise ApiError(503, message, code="model_not_ready", retry_after=PENDING_RETRY_SECONDS)
        return model

    def pendings(self) -> list[Pending]:
        """Models that are known and cannot be asked yet."""
        return [pending for name, pending in self._pending.items() if name == pending.id]

    async def offer(self, offers: Sequence[Offer], pending: Sequence[Pending]) -> None:
        """All models that are not from the file, instead of those before, and those that cannot be asked."""
        self._offers = tuple(offers)
        await self._replace()
        # Only now: a name that was pending is never unknown in between.
        self._pending = {name: model for model in pending for name in (model.id, *model.aliases)}
        self._missing.discard("offers")

    def models(self) -> list[ServedModel]:
        """What the bare ids mean, in the file's order."""
        return [model for model in self._served if self._names.get(model.id) is model]

    def revisions(self) -> list[ServedModel]:
        return list(self._served)

    async def run(self) -> None:
        """Follows the file until cancelled."""
        while self._settings.catalogue_path:
            await asyncio.sleep(self._settings.catalogue_poll_seconds)
            await self.load()

    async def load(self) -> bool:
        """Reads the file if it changed. Returns whether the catalogue is what the file says."""
        if not self._settings.catalogue_path:
            return True
        try:
            stat = await asyncio.to_thread(self._path.stat)
        except OSError as error:
            if self._state is not None or "file" in self._missing:
                log.warning("catalogue %s cannot be read: %s", self._path.name, error)
                self._state = None
            return False
        state = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if state == self._state:
            return True
        try:
            data = await asyncio.to_thread(self._path.read_bytes)
            parsed = CatalogueFile.model_validate(orjson.loads(data))
        except (OSError, orjson.JSONDecodeError, ValidationError) as error:
            self._state = state  # once per version of the file
            metrics.CATALOGUE.labels("invalid").inc()
            log.error("catalogue %s is not usable, the last one stays: %s", self._path.name, error)
            return False
        self._listed = parsed.models
        complete = await self._replace()
        # A model that failed (its file may still be coming) is tried again at the next look.
        self._state = state if complete else None
        metrics.CATALOGUE.labels("ok" if complete else "partial").inc()
        self._missing.discard("file")
        return complete

    async def _replace(self) -> bool:
        async with self._replacing:
            complete = await self._make()
        metrics.CATALOGUE_MODELS.set(len(self._names))
        change, self._change = self._change, asyncio.Event()
        change.set()
        return complete

    async def changed(self) -> None:
        """Until the next change."""
        await self._change.wait()

    async def _make(self) -> bool:
        known = {model.entry.revision: model for model in self._served}
        served: list[ServedModel] = []
        complete = True
        wanted: list[tuple[CatalogueEntry, ModelCard | None]] = [(entry, None) for entry in self._listed]
        wanted += [(offer.entry, offer.card) for offer in self._offers]
        for entry, card in wanted:
            old = known.get(entry.revision)
            if old is not None and _same_model(old.entry, entry):
                served.append(old if old.entry == entry else replace(old, entry=entry))
                continue
            try:
                served.append(await asyncio.to_thread(self._open, entry, card))
            except (CardError, OSError) as error:
                complete = False
                log.error("model %s cannot be offered: %s", entry.id, error)
                if old is not None:
                    served.append(old)
        names: dict[str, ServedModel] = {}
        for model in served:
            current = names.get(model.id)
            if current is None or not current.entry.default or model.entry.default:
                names[model.id] = model
        for model in served:
            for alias in model.entry.aliases:
                if alias not in names or (model.entry.default and names[alias].id != alias):
                    names[alias] = model
        for model in served:
            names.setdefault(model.revision, model)
        self._served, self._names = served, names
        return complete

    def _open(self, entry: CatalogueEntry, card: ModelCard | None) -> ServedModel:
        """Blocking: builds or reads the card where none is given, makes the tokenizer."""
        card = card or build_card(entry.path)
        tokenizer = Tokenizer.from_buffer(card.tokenizer_json)
        template = None
        if card.chat_template is not None:
            template = ChatTemplate(card, seconds=self._settings.template_seconds)
        try:
            created = entry.created or int(Path(entry.path).stat().st_mtime)
        except OSError:
            created = int(time.time())
        length = min(card.context_length, entry.max_model_len or card.context_length)
        return ServedModel(
            entry=entry,
            card=card,
            tokenizer=tokenizer,
            table=TokenTable(tokenizer, card),
            words=Words(tokenizer, card.tokenizer_json),
            template=template,
            context_length=length,
            created=created,
            fingerprint="fp_" + hashlib.sha256(entry.revision.encode()).hexdigest()[:10],
        )


def _same_model(old: CatalogueEntry, new: CatalogueEntry) -> bool:
    """Nothing differs that tokenizer, card or context length depend on: those are large, and stay."""
    mine, other = (entry.model_dump(include=set(_OPENED_BY)) for entry in (old, new))
    return mine == other


def require_template(model: ServedModel) -> ChatTemplate:
    """Raises ApiError 400 for a model without a chat template."""
    if model.template is None:
        raise ApiError(
            400,
            f"The model `{model.id}` has no chat template: use /v1/completions.",
            param="model",
            code="unsupported_model",
        )
    return model.template
