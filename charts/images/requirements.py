"""Requirements of an image, out of pyproject.toml: `requirements.py control|worker`, for `pip install -r`.

Gateway and operator do without torch, which is nine tenths of the weight of the rest. Versions are those of
constraints.txt (`-c`). The end-to-end tests assemble root file systems from the same list.
"""

import sys
import tomllib
from pathlib import Path

ONLY_WORKERS = ("torch",)
KINDS = ("control", "worker")


def requirements(kind: str) -> list[str]:
    """Lines for pip. Raises ValueError for an unknown kind."""
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is none of {', '.join(KINDS)}")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    wanted: list[str] = project["dependencies"]
    return [line for line in wanted if kind == "worker" or not line.startswith(ONLY_WORKERS)]


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1])))
