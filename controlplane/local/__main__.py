"""`python -m controlplane.local SETTINGS.json`: a detached supervisor. `deepflow up --detach` starts it."""

from __future__ import annotations

import asyncio
import logging
import sys
from pathlib import Path

from controlplane.local.errors import AlreadyRunning, StackError
from controlplane.local.settings import StackSettings, read_json
from controlplane.local.supervisor import Supervisor


def main() -> int:
    value = read_json(Path(sys.argv[1])) if len(sys.argv) == 2 else None
    if value is None:
        print("usage: python -m controlplane.local SETTINGS.json", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        asyncio.run(Supervisor(StackSettings.load(value)).run())
    except AlreadyRunning:
        print(f"a supervisor already runs in {value['state_dir']}", file=sys.stderr)
        return 3
    except StackError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
