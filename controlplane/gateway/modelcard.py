"""The model card: everything the gateway must know of a model, without its weights.

Built once from a GGUF file's metadata or from a Hugging Face folder, and kept as content-addressed JSON
under `$DEEPFLOW_CACHE/cards/<sha256>.json`. Called by `catalogue.py` when a model appears, and by the
supervisor to warm the cache. A hit costs a stat, one small read and one JSON parse.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import os
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson

log = logging.getLogger(__name__)

CARD_VERSION = 1  # raise it when the meaning of a field or the way of building one changes
_HASH_CHUNK = 4 << 20
# The files of a Hugging Face folder that a card is made of.
_FOLDER_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


class CardError(ValueError):
    """No card can be made of this path; the message says what is missing or not supported."""


@dataclass(frozen=True, slots=True)
class ModelCard:
    """Tokenizer, chat template, special ids and context length of one model."""

    sha256: str  # of the GGUF file, or of the folder's metadata files
    architecture: str
    tokenizer_json: bytes
    chat_template: str | None
    context_length: int  # tokens, prompt and output together
    vocab_size: int  # rows of the embedding: ids below it are valid
    bos_id: int | None
    eos_ids: tuple[int, ...]  # any of them ends an answer
    special_ids: tuple[int, ...]  # never rendered as text
    bos_token: str
    eos_token: str
    name: str = ""


def cards_dir() -> Path:
    """`$DEEPFLOW_CACHE/cards`, by default in the user's cache folder."""
    root = os.environ.get("DEEPFLOW_CACHE") or os.path.join(os.path.expanduser("~"), ".cache", "deepflow")
    return Path(root) / "cards"


def build_card(path: str | Path, *, sha256: str | None = None, cache_dir: Path | None = None) -> ModelCard:
    """The card of a GGUF file or of a Hugging Face folder. Blocking: call it off the event loop.

    `sha256`, where the caller knows the file's digest already, saves reading the whole file. Raises
    CardError (what is wrong with the model) or OSError (the path cannot be read).
    """
    path = Path(path)
    cache = cache_dir or cards_dir()
    digest = _folder_digest(path) if path.is_dir() else sha256 or _file_digest(path, cache)
    cached = cache / f"{digest}.json"
    card = _read(cached)
    if card is not None:
        return card
    card = _from_folder(path, digest) if path.is_dir() else _from_gguf(path, digest)
    _write(cached, encode_card(card))
    return card


# -- cache -----------------------------------------------------------------------------------------


def _to_json(card: ModelCard) -> dict[str, Any]:
    fields = asdict(card)
    fields["tokenizer_json"] = base64.b64encode(card.tokenizer_json).decode()
    return {"version": CARD_VERSION, **fields}


def _read(path: Path) -> ModelCard | None:
    try:
        return decode_card(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("model card %s is unreadable and made anew: %s", path.name, error)
        return None


def encode_card(card: ModelCard) -> bytes:
    """For `controlplane.fleet.cards`: whoever has the model's files makes it, gateways read it."""
    return orjson.dumps(_to_json(card))


def decode_card(data: bytes) -> ModelCard | None:
    """None where another version made it. Raises ValueError, KeyError or TypeError for what is no card."""
    fields = orjson.loads(data)
    if fields.pop("version") != CARD_VERSION:
        return None
    fields["tokenizer_json"] = base64.b64decode(fields["tokenizer_json"])
    fields["eos_ids"] = tuple(fields["eos_ids"])
    fields["special_ids"] = tuple(fields["special_ids"])
    return ModelCard(**fields)


def _write(path: Path, data: bytes) -> None:
    """Atomic, so that readers never see half a card. A cache that cannot be written is only slower."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(data)
        os.replace(file.name, path)
    except OSError as error:
        log.warning("model card cache %s cannot be written: %s", path.parent, error)


def _file_digest(path: Path, cache: Path) -> str:
    """SHA-256 of the file; remembered by what stat says of it, because weights are large."""
    stat = path.stat()
    state = f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\0{stat.st_ino}"
    memo = cache / "digests" / hashlib.sha256(state.encode("utf-8", "surrogateescape")).hexdigest()
    try:
        known = memo.read_text()
        if len(known) == 64:
            return known
    except OSError:
        pass
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK):
            digest.update(chunk)
    _write(memo, digest.hexdigest().encode())
    return digest.hexdigest()


def _folder_digest(path: Path) -> str:
    digest = hashlib.sha256()
    for name in _FOLDER_FILES:
        try:
            data = (path / name).read_bytes()
        except FileNotFoundError:
            continue
        digest.update(f"{name}\0{len(data)}\0".encode())
        digest.update(data)
    return digest.hexdigest()


# -- GGUF ------------------------------------------------------------------------------------------


def _from_gguf(path: Path, digest: str) -> ModelCard:
    from gguf import GGUFReader

    from controlplane.gateway.bpe import ADDS_BOS, CONTROL, UnsupportedTokenizer, Vocabulary, build_tokenizer

    try:
        reader = GGUFReader(str(path))
    except (ValueError, IndexError, KeyError) as error:
        raise CardError(f"{path.name} is not a readable GGUF file: {error}") from error

    def value(name: str, default: Any = None) -> Any:
        field = reader.fields.get(name)
        return default if field is None else field.contents()

    architecture = value("general.architecture", "")
    tokens = value("tokenizer.ggml.tokens")
    context = value(f"{architecture}.context_length")
    if not tokens or not context:
        raise CardError(f"{path.name} holds no tokenizer or no context length")
    types = value("tokenizer.ggml.token_type") or [1] * len(tokens)
    pre = value("tokenizer.ggml.pre", "default")
    bos_id = value("tokenizer.ggml.bos_token_id")
    eos_id = value("tokenizer.ggml.eos_token_id")
    eos_ids = [eos_id, value("tokenizer.ggml.eot_token_id"), value("tokenizer.ggml.eom_token_id")]
    try:
        tokenizer = build_tokenizer(
            Vocabulary(
                model=value("tokenizer.ggml.model", ""),
                pre=pre,
                tokens=tokens,
                types=types,
                merges=value("tokenizer.ggml.merges") or [],
                bos_id=bos_id,
                add_bos=bool(value("tokenizer.ggml.add_bos_token", pre in ADDS_BOS)),
            )
        )
    except UnsupportedTokenizer as error:
        raise CardError(f"{path.name}: {error}") from error
    return ModelCard(
        sha256=digest,
        architecture=architecture,
        tokenizer_json=tokenizer.to_str().encode(),
        chat_template=value("tokenizer.chat_template"),
        context_length=int(context),
        vocab_size=int(value(f"{architecture}.vocab_size", len(tokens))),
        bos_id=None if bos_id is None else int(bos_id),
        eos_ids=_ids(eos_ids),
        special_ids=tuple(index for index, kind in enumerate(types) if kind == CONTROL),
        bos_token="" if bos_id is None else tokens[bos_id],
        eos_token="" if eos_id is None else tokens[eos_id],
        name=str(value("general.name", "")),
    )


def _ids(values: Iterable[Any]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(int(value) for value in values if value is not None))


# -- Hugging Face folder -----------------------------------------------------------------------------


def _from_folder(path: Path, digest: str) -> ModelCard:
    from tokenizers import Tokenizer

    config = _json(path / "config.json")
    if config is None:
        raise CardError(f"{path.name} holds no config.json")
    try:
        tokenizer_json = (path / "tokenizer.json").read_bytes()
    except FileNotFoundError as error:
        raise CardError(f"{path.name} holds no tokenizer.json") from error
    tokenizer_config = _json(path / "tokenizer_config.json") or {}
    generation = _json(path / "generation_config.json") or {}
    tokenizer = Tokenizer.from_buffer(tokenizer_json)
    specials = {index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    bos_token = _token_text(tokenizer_config.get("bos_token"))
    eos_token = _token_text(tokenizer_config.get("eos_token"))
    eos = [*_listed(generation.get("eos_token_id")), *_listed(config.get("eos_token_id"))]
    if eos_token:
        eos.append(tokenizer.token_to_id(eos_token))
    context = config.get("max_position_embeddings")
    if not isinstance(context, int):
        raise CardError(f"{path.name}/config.json holds no max_position_embeddings")
    return ModelCard(
        sha256=digest,
        architecture=str(config.get("model_type", "")),
        tokenizer_json=tokenizer_json,
        chat_template=_folder_template(path, tokenizer_config),
        context_length=context,
        vocab_size=int(config.get("vocab_size") or tokenizer.get_vocab_size()),
        bos_id=tokenizer.token_to_id(bos_token) if bos_token else None,
        eos_ids=_ids(eos),
        special_ids=tuple(sorted(specials)),
        bos_token=bos_token,
        eos_token=eos_token,
        name=path.name,
    )


def _folder_template(path: Path, tokenizer_config: dict[str, Any]) -> str | None:
    try:
        return (path / "chat_template.jinja").read_text(encoding="utf-8")
    except FileNotFoundError:
        pass
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):  # several named templates
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _json(path: Path) -> dict[str, Any] | None:
    try:
        parsed = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except orjson.JSONDecodeError as error:
        raise CardError(f"{path.name} is not valid JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise CardError(f"{path.name} is not a JSON object")
    return parsed


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _token_text(value: Any) -> str:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""
