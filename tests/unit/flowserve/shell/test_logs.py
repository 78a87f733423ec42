"""Log lines: one event is one line, whatever it holds. Needs nothing."""

from __future__ import annotations

import logging
import sys

from flowserve.shell.logs import LineFormatter


def test_a_message_with_newlines_and_an_exception_is_one_line() -> None:
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        record = logging.LogRecord("a.b", logging.ERROR, "f.py", 1, 'x "%s"\ny', ("z",), sys.exc_info())
    line = LineFormatter("te-7").format(record)
    assert "\n" not in line
    assert " level=error te_id=te-7 logger=a.b " in line
    assert r'msg="x \"z\"\ny"' in line and "ValueError" in line
