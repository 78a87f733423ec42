"""Which models can be named, and what is known of them. Follows the catalogue file while it changes.

The supervisor writes the file (atomically); it is looked at every second. A model is in the catalogue
whether or not an executor holds it now: a name that is not here is the only cause of a 404. A file that
cannot be read, or a model whose card cannot be made, leaves what was there before.

File: `{"models": [{"id", "revision", "aliases": [], "path", "max_model_len", "dtype", "quantization",
"default"}]}`. One id
may appear with several revisions: `default` (else the last) says which one the bare id means; each is also
named by its revision, `id@rev`.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from dataclasses import dataclass
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


class CatalogueEntry(BaseModel):
    """One model of the file."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    id: str = Field(min_length=1)
    revision: str = Field(min_length=1)
    path: str
    aliases: tuple[str, ...] = ()
    max_model_len: int = 0  # 0 = the model's own
    dtype: str = "auto"
    quantization: str = ""
    default: bool = False


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
        self.loaded = False

    def resolve(self, name: str) -> ServedModel:
        """By id, alias or revision. Raises ApiError 404 model_not_found."""
        model = self._names.get(name)
        if model is None:
            raise model_not_found(name)
        return model

    def models(self) -> list[ServedModel]:
        """What the bare ids mean, in the file's order."""
        return [model for model in self._served if self._names.get(model.id) is model]

    def revisions(self) -> list[ServedModel]:
        return list(self._served)

    async def run(self) -> None:
        """Follows the file until cancelled."""
        while True:
            await asyncio.sleep(self._settings.catalogue_poll_seconds)
            await self.load()

    async def load(self) -> bool:
        """Reads the file if it changed. Returns whether the catalogue is what the file says."""
        try:
            stat = await asyncio.to_thread(self._path.stat)
        except OSError as error:
            if self._state is not None or not self.loaded:
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
        complete = await self._replace(parsed)
        # A model that failed (its file may still be coming) is tried again at the next look.
        self._state = state if complete else None
        metrics.CATALOGUE.labels("ok" if complete else "partial").inc()
        metrics.CATALOGUE_MODELS.set(len(self._names))
        self.loaded = True
        return complete

    async def _replace(self, file: CatalogueFile) -> bool:
        known = {model.entry.revision: model for model in self._served}
        served: list[ServedModel] = []
        complete = True
        for entry in file.models:
            old = known.get(entry.revision)
            if old is not None and old.entry == entry:
                served.append(old)
                continue
            try:
                served.append(await asyncio.to_thread(self._open, entry))
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

    def _open(self, entry: CatalogueEntry) -> ServedModel:
        """Blocking: builds or reads the card, makes the tokenizer."""
        card = build_card(entry.path)
        tokenizer = Tokenizer.from_buffer(card.tokenizer_json)
        template = None
        if card.chat_template is not None:
            template = ChatTemplate(card, seconds=self._settings.template_seconds)
        try:
            created = int(Path(entry.path).stat().st_mtime)
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
