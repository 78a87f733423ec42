"""One log line per event, as key=value pairs: `time=… level=… te_id=… logger=… msg="…"`.

Whatever a message holds (newlines, quotes of a peer's error), it stays one line. Nothing is logged
per token or per step.
"""

from __future__ import annotations

import json
import logging
import sys
import time


class LineFormatter(logging.Formatter):
    def __init__(self, te_id: str) -> None:
        super().__init__()
        self._te_id = te_id

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        parts = [
            f"time={seconds}.{int(record.msecs):03d}Z",
            f"level={record.levelname.lower()}",
            f"te_id={self._te_id}",
            f"logger={record.name}",
            f"msg={json.dumps(record.getMessage(), ensure_ascii=False)}",
        ]
        if record.exc_info:
            parts.append(f"exc={json.dumps(self.formatException(record.exc_info), ensure_ascii=False)}")
        return " ".join(parts)


def configure(te_id: str, level: str) -> None:
    """Logs of the whole process go to stderr in this format."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter(te_id))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
