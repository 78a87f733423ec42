"""The custom resources' types and the definitions that are made of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, Field, ValidationError

from controlplane.api.resources import KINDS, ModelServing, RoleScaler, WarmPool, parse_quantity
from controlplane.api.resources.base import Resource
from controlplane.api.resources.generate import definition, definitions, differences, files
from controlplane.api.resources.modelserving import Role
from controlplane.api.resources.reference import reference
from controlplane.api.resources.schema import SchemaError, structural

ROOT = Path(__file__).parents[5]
SERVING = {
    "apiVersion": "deepflow.dev/v1alpha1",
    "kind": "ModelServing",
    "metadata": {"name": "small", "namespace": "models", "uid": "u", "resourceVersion": "7", "generation": 2},
    "spec": {
        "model": {"uri": "pypi://p/m.gguf"},
        "roles": {"prefill": {"min": 1}, "decode": {"min": 1, "max": 3}},
    },
}


def nodes(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema below `schema`, with its path."""
    yield path, schema
    for name, child in schema.get("properties", {}).items():
        yield from nodes(child, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            yield from nodes(schema[key], f"{path}[]")


def root(kind: type[Resource]) -> dict[str, Any]:
    found: dict[str, Any] = definition(kind)["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return found


def test_the_chart_holds_what_the_types_say() -> None:
    assert differences(ROOT / "charts/deepflow/crds", ROOT / "docs/resources.md") == []


def test_drift_is_named(tmp_path: Path) -> None:
    for name, text in files().items():
        (tmp_path / name).write_text(text)
    document = tmp_path / "resources.md"
    document.write_text(reference(definitions()))
    assert differences(tmp_path, document) == []
    (tmp_path / "warmpools.deepflow.dev.yaml").write_text("{}")
    (tmp_path / "rolescalers.deepflow.dev.yaml").unlink()
    (tmp_path / "extra.yaml").write_text("{}")
    document.write_text("")
    found = " ".join(differences(tmp_path, document))
    assert "resources.md differs" in found
    assert "warmpools.deepflow.dev.yaml differs" in found
    assert "rolescalers.deepflow.dev.yaml is missing" in found
    assert "extra.yaml is not generated" in found


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_schemas_are_structural_bounded_and_described(kind: type[Resource]) -> None:
    for path, schema in nodes(root(kind)):
        assert not {"$ref", "title", "const", "oneOf", "allOf", "$defs"} & schema.keys(), path
        assert "type" in schema or schema.get("x-kubernetes-int-or-string"), path
        assert not ({"properties", "additionalProperties"} <= schema.keys()), path
        if schema.get("type") == "array":
            assert "maxItems" in schema, path
        if schema.get("type") == "string":
            assert {"maxLength", "enum", "format"} & schema.keys() or path in (".apiVersion", ".kind"), path
        for name, child in schema.get("properties", {}).items():
            assert "description" in child or name == "metadata", f"{path}.{name}"
            # A default that is not taken because an object above it is absent is no default.
            if "default" in child and path.startswith(".spec"):
                assert name not in schema.get("required", []), f"{path}.{name}"
        for rule in schema.get("x-kubernetes-validations", []):
            assert rule["rule"]
            assert rule["message"]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_conditions_are_a_map_and_statuses_say_their_generation(kind: type[Resource]) -> None:
    status = root(kind)["properties"]["status"]["properties"]
    assert status["conditions"]["x-kubernetes-list-type"] == "map"
    assert status["conditions"]["x-kubernetes-list-map-keys"] == ["type"]
    assert {"type", "status", "reason", "lastTransitionTime"} <= set(
        status["conditions"]["items"]["required"]
    )
    assert "observedGeneration" in status
    columns = [
        column["name"] for column in definition(kind)["spec"]["versions"][0]["additionalPrinterColumns"]
    ]
    assert "Ready" in columns
    assert columns[-1] == "Age"


def test_map_lists_require_their_keys() -> None:
    for made in definitions():
        for path, schema in nodes(made["spec"]["versions"][0]["schema"]["openAPIV3Schema"]):
            if schema.get("x-kubernetes-list-type") == "map":
                assert set(schema["x-kubernetes-list-map-keys"]) <= set(schema["items"]["required"]), path


def test_scale_is_where_one_count_is() -> None:
    for kind in KINDS:
        has_scale = "scale" in definition(kind)["spec"]["versions"][0]["subresources"]
        assert has_scale == (kind in (RoleScaler, WarmPool))


def test_names_of_definitions_are_distinct_and_no_anchor_is_written() -> None:
    spec = [made["spec"]["names"] for made in definitions()]
    short = [name for names in spec for name in names["shortNames"]]
    assert len(set(short)) == len(short)
    for text in files().values():
        assert "&id" not in text
        assert yaml.safe_load(text)["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}


def test_an_object_is_read_with_its_defaults_and_written_in_camel_case() -> None:
    serving = ModelServing.model_validate(SERVING)
    assert serving.model_id == "small"
    assert serving.key == ("models", "small")
    assert [(role, spec.min, spec.max) for role, spec in serving.spec.roles.items()] == [
        (Role.PREFILL, 1, 1),
        (Role.DECODE, 1, 3),
    ]
    assert serving.spec.scaling.stable_window_seconds == 60
    assert serving.metadata.resource_version == "7"
    wire = serving.wire()
    assert wire["spec"]["scaling"]["scaleToZeroAfterSeconds"] == 0
    assert "slo" not in wire["spec"]


def test_defaults_of_the_definition_are_those_of_the_type() -> None:
    """What the API server fills in and what a reader of an older object fills in must not differ."""

    def filled(schema: dict[str, Any]) -> Any:
        if "properties" in schema:
            made = {name: filled(child) for name, child in schema["properties"].items()}
            return {name: value for name, value in made.items() if value is not None}
        return schema.get("default")

    spec = root(ModelServing)["properties"]["spec"]["properties"]
    for name in ("options", "scaling", "limits"):
        mine = ModelServing.model_validate(SERVING).wire()["spec"][name]
        assert {key: value for key, value in mine.items() if value not in ([], {})} == filled(spec[name])


def test_a_newer_definition_s_fields_are_no_error() -> None:
    newer = {**SERVING, "spec": {**SERVING["spec"], "novelty": {"a": 1}}}  # type: ignore[dict-item]  # a dict
    assert ModelServing.model_validate(newer).spec == ModelServing.model_validate(SERVING).spec


def test_out_of_bounds_is_refused() -> None:
    wrong = {**SERVING, "spec": {**SERVING["spec"], "priority": 101}}  # type: ignore[dict-item]  # a dict
    with pytest.raises(ValidationError):
        ModelServing.model_validate(wrong)


@pytest.mark.parametrize(
    ("text", "units"), [("1Gi", 2**30), ("1.5k", 1500), (17, 17), ("250m", 0), ("2M", 2_000_000)]
)
def test_quantities(text: str | int, units: int) -> None:
    assert parse_quantity(text) == units


@pytest.mark.parametrize("text", ["", "1Xi", "-1", "Gi", "1 Gi", "1e3"])
def test_what_is_no_quantity_is_said(text: str) -> None:
    with pytest.raises(ValueError, match="no quantity"):
        parse_quantity(text)


def test_what_a_structural_schema_cannot_say_is_an_error() -> None:
    class Choice(BaseModel):
        either: bool | list[int] = Field(description="Two types.")

    class Unbounded(BaseModel):
        many: list[int] = Field(description="No bound.")

    class Silent(BaseModel):
        quiet: int

    for model, message in (
        (Choice, "choice of types"),
        (Unbounded, "max_length"),
        (Silent, "no description"),
    ):
        with pytest.raises(SchemaError, match=message):
            structural(model)
