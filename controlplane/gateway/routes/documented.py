"""OpenAPI of the routes: bodies are read by `body.py`, so their schemas are declared, not inferred."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from controlplane.api.errors import ErrorResponse

_MEANINGS = {
    400: "The request is wrong; `param` names the field.",
    401: "No or an invalid API key.",
    403: "Not allowed with this key.",
    404: "Unknown model, job or route.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is not declared as JSON.",
    429: "A bound is reached; `Retry-After` says when to try again.",
    500: "A fault of the server.",
    503: "Nothing can serve this now.",
    504: "A deadline passed.",
}
GENERATION = (400, 401, 404, 408, 413, 415, 429, 500, 503, 504)
READING = (400, 401, 404, 500, 503)


def body_of(model: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra` of a route that reads `model` itself."""
    reference = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}}


def answers(
    model: type[BaseModel] | None, errors: tuple[int, ...], *, stream: bool = False
) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route."""
    ok: dict[str, Any] = {"description": "The answer."}
    if model is not None:
        ok["model"] = model
    if stream:
        ok["description"] = "The answer; with `stream: true`, server-sent events that end with `[DONE]`."
        ok["content"] = {"text/event-stream": {}}
    documented: dict[int | str, dict[str, Any]] = {200: ok}
    for status in errors:
        documented[status] = {"description": _MEANINGS[status], "model": ErrorResponse}
    return documented


def add_schemas(document: dict[str, Any], *models: type[BaseModel]) -> None:
    """Puts the bodies' schemas, and all that they refer to, among the document's components."""
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for model in models:
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(schema.pop("$defs", {}))
        schemas[model.__name__] = schema
