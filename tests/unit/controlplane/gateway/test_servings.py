"""From ModelServings to the catalogue's entries, and to what waiting clients are told."""

from __future__ import annotations

from typing import Any

from controlplane.api.resources.modelserving import ModelServing
from controlplane.gateway.servings import UNTOLD, named, stage_of


def serving(name: str, *, created: int = 0, **changes: Any) -> ModelServing:
    spec = {"model": {"uri": "file:///models/m.gguf"}, "roles": {"colocated": {"min": 0, "max": 1}}}
    spec |= changes.pop("spec", {})
    return ModelServing.model_validate(
        {
            "metadata": {
                "name": name,
                "namespace": "ns",
                "creationTimestamp": f"2026-01-01T00:00:{created:02}Z",
            },
            "spec": spec,
            "status": {"revision": f"{name}@0123456789ab"} | changes.pop("status", {}),
        }
    )


def condition(kind: str, status: str, reason: str, message: str = "") -> dict[str, str]:
    at = "2026-01-01T00:00:00Z"
    return {"type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": at}


def test_a_serving_becomes_an_entry_that_wakes_with_its_own_limits() -> None:
    limits = {"heldRequests": 3, "heldBytes": "1Ki", "holdSeconds": 7}
    model = {"uri": "file:///models/m.gguf", "id": "Big:Model", "aliases": ["b"]}
    options = {"maxModelLen": 512, "quantization": "int8", "dtype": "float32"}
    found, pending = named([serving("m", spec={"limits": limits, "model": model, "options": options})])
    assert not pending
    entry = found[0].entry
    assert (entry.id, entry.aliases, entry.revision) == ("Big:Model", ("b",), "m@0123456789ab")
    assert (entry.max_model_len, entry.dtype, entry.quantization) == (512, "float32", "int8")
    assert entry.wakes and entry.demand_key == "ns/m"
    assert entry.hold is not None
    assert (entry.hold.requests, entry.hold.bytes, entry.hold.seconds) == (3, 1024, 7)
    assert str(found[0].path) == "/models/m.gguf"


def test_of_two_that_want_a_name_the_older_has_it() -> None:
    model = {"uri": "file:///m", "id": "same", "aliases": ["also"]}
    young = serving("a", created=9, spec={"model": model})
    old = serving("b", created=1, spec={"model": {**model, "aliases": []}})
    third = serving("c", created=2, spec={"model": {"uri": "file:///m", "id": "other", "aliases": ["same"]}})
    found, _ = named([young, third, old])
    assert [(item.entry.id, item.entry.aliases, item.key) for item in found] == [
        ("same", (), "ns/b"), ("other", (), "ns/c"),
    ]  # fmt: skip


def test_one_that_was_never_started_has_no_revision_and_a_refused_one_says_why() -> None:
    refused = {
        "revision": "",
        "conditions": [condition("Accepted", "False", "InvalidSource", "no such file")],
    }
    found, pending = named([serving("m", status={"revision": ""}), serving("n", status=refused)])
    assert [(item.entry.id, item.entry.revision, item.uri) for item in found] == [
        ("m", UNTOLD, "file:///models/m.gguf")
    ]
    assert [(item.id, item.demand) for item in pending] == [("n", "ns/n")]
    assert "no such file" in pending[0].why


def test_the_stage_is_what_keeps_it_from_being_ready() -> None:
    wake = {"startedAt": "2026-01-01T00:00:00Z", "path": "warm", "progress": 0.5}
    status = {"conditions": [condition("Ready", "False", "Waking", "claimed a pod")], "lastWake": wake}
    stage = stage_of(serving("m", status=status))
    assert (stage.name, stage.detail, stage.progress, stage.typical) == ("Waking", "claimed a pod", 0.5, None)
    status["conditions"].append(condition("CapacityAvailable", "False", "PoolEmpty", "no warm pod"))  # type: ignore[attr-defined]  # a list
    status["lastWake"] = {**wake, "seconds": 12.5, "progress": 1}
    stage = stage_of(serving("m", status=status))
    assert (stage.name, stage.detail, stage.progress, stage.typical) == (
        "PoolEmpty",
        "no warm pod",
        None,
        12.5,
    )
    assert stage_of(serving("m")).name == "Unknown"
