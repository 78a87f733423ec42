"""Models that sleep in this process: weights in host memory, no KV memory, no engine.

Several models share one executor's memory by sleeping in turn: bounded by number, and given up, the longest
asleep first, where another needs the memory. A model that was given up is loaded like any other.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from flowserve.shell import metrics
from flowserve.shell.settings import DEFAULT_MAX_ASLEEP

if TYPE_CHECKING:
    from flowserve.shell.loading import Asleep, LoadSpec

log = logging.getLogger(__name__)


class Sleepers:
    """One thread at a time, where it does not say otherwise."""

    def __init__(self, bound: int = DEFAULT_MAX_ASLEEP) -> None:
        self._bound = bound
        self._by_revision: dict[str, Asleep] = {}  # in the order in which they fell asleep

    def __len__(self) -> int:
        return len(self._by_revision)

    @property
    def revisions(self) -> list[str]:
        """The last to fall asleep last. Any thread."""
        return list(self._by_revision)

    def __iter__(self) -> Iterator[Asleep]:
        """Any thread."""
        return iter(list(self._by_revision.values()))

    def add(self, asleep: Asleep) -> None:
        """Blocks while one is given up for it."""
        while len(self) >= max(1, self._bound):
            self.give_up("too many sleep")
        self._by_revision[asleep.spec.revision] = asleep
        metrics.ASLEEP.set(len(self))

    def take(self, spec: LoadSpec) -> Asleep | None:
        """The model of `spec`, no longer kept here. One of the same revision with other options is given up:
        it would lie there twice. Blocks while that happens."""
        asleep = self._by_revision.pop(spec.revision, None)
        metrics.ASLEEP.set(len(self))
        # The revision says what lies at the path, which may be another now.
        if asleep is None or replace(asleep.spec, path=spec.path) == spec:
            return asleep
        _drop(asleep, "it is loaded with other options")
        return None

    def give_up(self, why: str) -> bool:
        """Frees the one that has slept longest; False where none sleeps. Blocks."""
        for revision in self.revisions[:1]:
            _drop(self._by_revision.pop(revision), why)
            metrics.ASLEEP.set(len(self))
            return True
        return False


def _drop(asleep: Asleep, why: str) -> None:
    log.info("%s sleeps no longer, its weights are given back: %s", asleep.spec.revision, why)
    metrics.SLEEPS.labels("dropped").inc()
    asleep.close()
