"""What the environment says of the policy, and what is refused at the start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from controlplane.jobs.settings import RuntimeSettings


def test_tenants_weights_come_as_json() -> None:
    settings = RuntimeSettings.from_env({"DEEPFLOW_JOBS_TENANT_WEIGHTS": '{"gold": 4}'})
    assert settings.tenant_weights == {"gold": 4.0}


@pytest.mark.parametrize("text", ["gold=4", "[4]", '{"gold": 0}', '{"gold": NaN}', '{"gold": "much"}'])
def test_weights_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ValidationError, match="tenant_weights"):
        RuntimeSettings.from_env({"DEEPFLOW_JOBS_TENANT_WEIGHTS": text})


def test_the_heat_maps_file_becomes_the_policys_map(tmp_path: Path) -> None:
    path = tmp_path / "heat.json"
    path.write_text(json.dumps({"prefills": [64, 128], "ratios": [0.5, 1], "summed": [[1, -1], [None, 2]]}))
    heat = RuntimeSettings.from_env({"DEEPFLOW_JOBS_HEAT_MAP": str(path)}).scheduling.heat_map
    assert heat is not None and heat.value(64, 32) == 1
    assert RuntimeSettings().scheduling.heat_map is None


@pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"prefills": [64], "ratios": [1], "summed": 3}'])
def test_a_heat_map_that_is_none_is_refused_at_the_start(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "heat.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValidationError, match="is no heat map"):
        RuntimeSettings(heat_map=str(path))
