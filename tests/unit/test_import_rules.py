"""The rooms' import rules, read off the sources: also imports inside functions, also of rooms not yet listed.

`./dev check` runs import-linter on the contracts in pyproject.toml, which follow chains of imports. This test
needs no tool, and fails when somebody loosens those contracts.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = ("controlplane", "flowserve", "kvtransfer")

# Room -> what of ours it may import (besides itself). DESIGN: pure policy and wire types import no sibling.
MAY_IMPORT = {
    "controlplane.scheduling": (),
    "controlplane.api": (),
    "controlplane.twin": ("controlplane.scheduling",),
    "kvtransfer": (),
    "flowserve": ("kvtransfer",),
}


def _imports(path: Path, package: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_what_it_may(room: str) -> None:
    folder = ROOT / room.replace(".", "/")
    allowed = (room, *MAY_IMPORT[room])
    broken = []
    for path in folder.rglob("*.py"):
        package = ".".join(path.relative_to(ROOT).parent.parts)
        for name in _imports(path, package):
            if name.split(".")[0] in OURS and not any(f"{name}.".startswith(f"{ok}.") for ok in allowed):
                broken.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not broken


def test_policy_touches_no_clock_no_randomness_and_no_network() -> None:
    """scheduling decides over values: time and randomness are passed in."""
    forbidden = {
        "time",
        "random",
        "secrets",
        "socket",
        "asyncio",
        "threading",
        "redis",
        "grpc",
        "httpx",
        "os",
    }
    folder = ROOT / "controlplane" / "scheduling"
    broken = [
        f"{path.name} imports {name}"
        for path in folder.rglob("*.py")
        for name in _imports(path, "controlplane.scheduling")
        if name.split(".")[0] in forbidden
    ]
    assert not broken
