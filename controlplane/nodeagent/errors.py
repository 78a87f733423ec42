"""What can go wrong while a model is fetched, typed so that callers can act on it."""

from __future__ import annotations

from enum import StrEnum


class SourceFault(StrEnum):
    """The kinds of failure; each needs another action of the caller."""

    BAD_URI = "bad_uri"  # fix the URI
    NOT_FOUND = "not_found"  # file, repository, package or revision does not exist
    UNREACHABLE = "unreachable"  # hub or index cannot be reached: retry, or use another source
    MISSING_MEMBER = "missing_member"  # the package or repository lacks the file asked for
    WRONG_CHECKSUM = "wrong_checksum"  # the source is not what was promised
    DISK_FULL = "disk_full"  # free space in the cache folder
    FAILED = "failed"  # the fetching tool failed otherwise; its words are in the message


class SourceError(Exception):
    """A model could not be fetched. `str()` is one line: what failed, which URI, what to do."""

    def __init__(self, fault: SourceFault, uri: str, message: str) -> None:
        super().__init__(f"{uri}: {message}")
        self.fault = fault
        self.uri = uri
