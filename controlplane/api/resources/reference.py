"""docs/resources.md: every field of every kind, out of the definitions. `generate` writes and compares it."""

from __future__ import annotations

import json
from collections.abc import Iterator

from controlplane.api.resources.base import Json

HEADER = """\
# Custom resources: every field

Generated from `controlplane/api/resources` by `python -m controlplane.api.resources.generate`.
How they are used stands in [kubernetes.md](kubernetes.md).
"""


def reference(definitions: list[Json]) -> str:
    """The document's text."""
    parts = [HEADER]
    for made in definitions:
        names, version = made["spec"]["names"], made["spec"]["versions"][0]
        schema = version["schema"]["openAPIV3Schema"]
        group = made["spec"]["group"]
        parts.append(f"## {names['kind']}\n\n{schema['description']}\n")
        parts.append(
            f"`apiVersion: {group}/{version['name']}`, `kind: {names['kind']}`; "
            f"`kubectl get {names['plural']}`, short `{names['shortNames'][0]}`; "
            f"all kinds: `kubectl get {names['categories'][0]}`.\n"
        )
        for name in ("spec", "status"):
            rows = list(_rows(schema["properties"][name], name))
            parts.append(
                "\n".join(["| field | type | default | meaning |", "|---|---|---|---|", *rows]) + "\n"
            )
        said = list(dict.fromkeys(_rules(schema)))
        if said:
            parts.append(
                "Refused, with these words:\n\n" + "\n".join(f"- {message}" for message in said) + "\n"
            )
    return "\n".join(parts)


def _rows(schema: Json, path: str) -> Iterator[str]:
    """A row for each field below `schema`, in the order of the type."""
    for name, child in schema.get("properties", {}).items():
        at = f"{path}.{name}"
        default = "required" if name in schema.get("required", ()) else _default(child)
        yield f"| `{at}` | {_type(child)} | {default} | {child['description'].replace('|', '/')} |"
        inner = child.get("items", child)
        below = f"{at}[]" if "items" in child else at
        yield from _rows(inner, below)


def _default(schema: Json) -> str:
    if "default" not in schema or "properties" in schema or schema["default"] == "":
        return ""  # an object's is that of its fields
    return f"`{json.dumps(schema['default'])}`".replace('"', "")


def _type(schema: Json) -> str:
    if schema.get("x-kubernetes-int-or-string"):
        return "quantity"
    if "enum" in schema:
        return " or ".join(f"`{value}`" if value else '`""`' for value in schema["enum"])
    if schema["type"] == "array":
        kind = _type(schema["items"])
        keys = schema.get("x-kubernetes-list-map-keys")
        return f"list of {kind}" + (f" by {', '.join(keys)}" if keys else "")
    if schema["type"] in ("integer", "number"):
        low, high = schema.get("minimum"), schema.get("maximum")
        bounds = f", {low} to {high}" if high is not None else f", from {low}" if low is not None else ""
        return f"{schema['type']}{bounds}"
    if "additionalProperties" in schema:
        return f"map of {_type(schema['additionalProperties'])}"
    return "time" if schema.get("format") == "date-time" else str(schema["type"])


def _rules(schema: Json) -> Iterator[str]:
    for rule in schema.get("x-kubernetes-validations", ()):
        yield str(rule["message"])
    for child in schema.get("properties", {}).values():
        yield from _rules(child)
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            yield from _rules(schema[key])
