"""A pydantic type as a structural schema of Kubernetes (OpenAPI v3, a subset with extensions of its own).

Structural schemas know no `$ref`, no `null`, no `const`, no `title`; a default of an object is written out
with those of its fields. What a schema could say in a way that is not supported is an error here, not a
definition that the API server refuses later.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from controlplane.api.resources.base import Json

_KEPT = {
    "type", "description", "default", "enum", "format", "pattern", "minimum", "maximum", "minLength",
    "maxLength", "minItems", "maxItems", "minProperties", "maxProperties", "required",
}  # fmt: skip
_DROPPED = {"title", "$defs", "discriminator"}


class SchemaError(Exception):
    """The type cannot be said as a structural schema; `str()` names the place."""


def structural(model: type[BaseModel], leave_out: frozenset[str] = frozenset()) -> Json:
    """The schema of `model`, references resolved, the named properties left out. Raises SchemaError."""
    raw = model.model_json_schema(by_alias=True, mode="validation")
    raw["properties"] = {name: child for name, child in raw["properties"].items() if name not in leave_out}
    return _convert(raw, raw.get("$defs", {}), model.__name__)


def _convert(raw: Json, definitions: Json, where: str) -> Json:
    raw = _resolved(raw, definitions, where)
    out: Json = {}
    for key, value in raw.items():
        if key in _KEPT or key.startswith("x-kubernetes-"):
            out[key] = value
        elif key == "const":
            out["enum"] = [value]
        elif key == "properties":
            out["properties"] = {
                name: _property(child, definitions, f"{where}.{name}") for name, child in value.items()
            }
        elif key == "items":
            out["items"] = _convert(value, definitions, f"{where}[]")
        elif key == "additionalProperties":
            if isinstance(value, dict) and "x-kubernetes-preserve-unknown-fields" not in raw:
                out["additionalProperties"] = _convert(value, definitions, f"{where}{{}}")
        elif key == "propertyNames":
            continue  # structural schemas cannot say it; a rule stands beside such a map
        elif key not in _DROPPED:
            raise SchemaError(f"{where}: '{key}' has no place in a structural schema")
    if out.get("x-kubernetes-int-or-string"):
        # The pattern holds for strings; a number is a quantity whatever it is.
        out.pop("type", None)
        out["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    elif "type" not in out:
        raise SchemaError(f"{where}: no type")
    if out.get("type") == "array" and "maxItems" not in out:
        raise SchemaError(f"{where}: a list needs max_length, or rules below it cost too much")
    if out.get("type") == "string" and not {"maxLength", "enum", "format"} & out.keys():
        out["maxLength"] = 256
    if out.get("default", ...) is None:
        del out["default"]
    return out


def _property(raw: Json, definitions: Json, where: str) -> Json:
    out = _convert(raw, definitions, where)
    # An absent object is one of its own defaults where the type makes one. They are written out: the API
    # server holds a default against the object's rules as it stands, before it fills in the fields below.
    if "default" in out and "properties" in out:
        fields = out["properties"].items()
        out["default"] = {name: child["default"] for name, child in fields if "default" in child}
    elif out.get("default") in ([], {}):
        del out["default"]
    if "description" not in out:
        raise SchemaError(f"{where}: no description")
    return out


def _resolved(raw: Json, definitions: Json, where: str) -> Json:
    """`raw` with its `$ref` or `anyOf [x, null]` put in; what stands beside wins."""
    beside: Json = {key: value for key, value in raw.items() if key not in ("$ref", "anyOf", "allOf")}
    inner: Any = None
    if "$ref" in raw:
        inner = definitions[raw["$ref"].rsplit("/", 1)[-1]]
    elif "allOf" in raw and len(raw["allOf"]) == 1:
        inner = raw["allOf"][0]
    elif "anyOf" in raw:
        choices = [choice for choice in raw["anyOf"] if choice.get("type") != "null"]
        kinds = {choice.get("type") for choice in choices}
        if raw.get("x-kubernetes-int-or-string") or kinds == {"string", "integer"}:
            return beside
        if len(choices) != 1:
            raise SchemaError(f"{where}: a choice of types has no place in a structural schema")
        inner = choices[0]
    if inner is None:
        return beside
    return {**_resolved(inner, definitions, where), **beside}
