"""The engines this one is measured against: their installation, their weights, their servers.

Used by `tests.bench.engine --peers` only. Each peer lives in a virtual environment of its own below a
folder of the user's cache, so that nothing of it can be imported by mistake. `install` is run by hand once.
"""

from __future__ import annotations

import os
from pathlib import Path

INSTALL = "python -m tests.bench.peers.install"


def home() -> Path:
    """Where peers lie: `$DEEPFLOW_PEERS`, else `deepflow-peers` in the user's cache folder."""
    chosen = os.environ.get("DEEPFLOW_PEERS")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(chosen) if chosen else cache / "deepflow-peers"
