"""The local stack's errors, apart from their rooms so that the CLI can name them at no cost."""

from __future__ import annotations


class StackError(Exception):
    """The stack cannot start or be reached; `str()` says why and what to do."""


class NotRunning(Exception):
    """No supervisor answers on the control socket."""


class AlreadyRunning(Exception):
    """Another supervisor holds this state folder."""
