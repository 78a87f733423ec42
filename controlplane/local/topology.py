"""How many executors of which role serve a model: `1C`, `2C`, `1P1D`, `2P2D`, `1C1P1D`.

C serves whole requests (colocated), P prefers prefills, D prefers decodes. Roles are preferences:
every executor can run every task, and roles change live (`deepflow roles set`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

MAX_EXECUTORS = 64  # ours: per model on one machine; beyond it the mistake is likelier than the wish


class RoleName(StrEnum):
    """Roles as the CLI and the executors' command line write them."""

    COLOCATED = "colocated"
    PREFILL = "prefill"
    DECODE = "decode"


_LETTERS = {"C": RoleName.COLOCATED, "P": RoleName.PREFILL, "D": RoleName.DECODE}
_GROUP = re.compile(r"([0-9]{1,4})([A-Za-z])")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")


class TopologyError(ValueError):
    """The text is no topology; `str()` says what is wrong with which text."""


@dataclass(frozen=True, slots=True)
class Topology:
    """Roles in the order their executors are numbered."""

    roles: tuple[RoleName, ...]

    def __str__(self) -> str:
        letters = {role: letter for letter, role in _LETTERS.items()}
        groups = dict.fromkeys(self.roles)
        return "".join(f"{self.roles.count(role)}{letters[role]}" for role in groups)


def parse_topology(text: str) -> Topology:
    """Parses e.g. `1P1D` (letters in any case, each at most once). Raises TopologyError."""
    groups = _GROUP.findall(text)
    if not groups or "".join(count + letter for count, letter in groups) != text:
        raise TopologyError(f"'{text}' is no topology: write counts and roles, as in 1C, 2C, 1P1D or 1C1P1D")
    roles: list[RoleName] = []
    for count, letter in groups:
        role = _LETTERS.get(letter.upper())
        if role is None:
            raise TopologyError(f"'{text}': unknown role '{letter}' (C = colocated, P = prefill, D = decode)")
        if role in roles:
            raise TopologyError(f"'{text}' names {letter.upper()} twice")
        if int(count) == 0:
            raise TopologyError(f"'{text}': a count of 0 means nothing; leave {letter.upper()} out")
        if len(roles) + int(count) > MAX_EXECUTORS:
            raise TopologyError(f"'{text}' asks for more than {MAX_EXECUTORS} executors")
        roles += [role] * int(count)
    kinds = set(roles)
    if kinds == {RoleName.PREFILL}:
        raise TopologyError(f"'{text}' has nobody to decode: add a D or a C")
    if kinds == {RoleName.DECODE}:
        raise TopologyError(f"'{text}' has nobody to prefill: add a P or a C")
    return Topology(tuple(roles))


def split_model(text: str) -> tuple[str, str | None]:
    """Splits `URI[=id]`. A `==version` in the URI is none of ours: an id holds no `/`."""
    uri, separator, model_id = text.rpartition("=")
    if separator and _ID.fullmatch(model_id) and not uri.endswith(("=", "#sha256")):
        return uri, model_id
    return text, None


def split_topology(text: str) -> tuple[str | None, Topology]:
    """Splits `[id=]TOPOLOGY`."""
    model_id, separator, topology = text.rpartition("=")
    return (model_id if separator else None), parse_topology(topology)


def assign(model_ids: Sequence[str], texts: Sequence[str], default: str) -> dict[str, Topology]:
    """The topology of every model: `ID=T` for one, a bare `T` for all others. Raises TopologyError."""
    everyone = parse_topology(default)
    own: dict[str, Topology] = {}
    bare = 0
    for text in texts:
        model_id, topology = split_topology(text)
        if model_id is None:
            everyone, bare = topology, bare + 1
        elif model_id not in model_ids:
            raise TopologyError(f"'{text}': no model '{model_id}' here (there are: {', '.join(model_ids)})")
        else:
            own[model_id] = topology
    if bare > 1:
        raise TopologyError("several topologies without a model: write ID=TOPOLOGY for each model")
    return {model_id: own.get(model_id, everyone) for model_id in model_ids}
