"""From executors' events to the one consumer of a job: deltas merged per choice, a call when there are some.

Bounded without blocking anyone: a slow consumer finds one merged delta a choice, whose tokens are at most
max_output_tokens.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from controlplane.jobs.serving import ChoiceDelta, ServingError, TokenLogprobs


def _nobody() -> None:
    """Nobody listens."""


class Delivery:
    def __init__(self, choices: int) -> None:
        self._open = set(range(choices))
        self._ready: dict[int, ChoiceDelta] = {}
        self._wake: Callable[[], None] = _nobody

    @property
    def ended(self) -> bool:
        """Every choice was closed, and everything was taken."""
        return not self._open and not self._ready

    def listen(self, wake: Callable[[], None]) -> None:
        """`wake` is called whenever something is ready, now if something is. It must not block or raise."""
        self._wake = wake
        if self._ready or not self._open:
            wake()

    def take(self) -> list[ChoiceDelta]:
        """What is ready: one delta a choice at most."""
        if not self._ready:
            return []
        ready, self._ready = self._ready, {}
        return list(ready.values())

    def push(
        self,
        index: int,
        tokens: list[int],
        logprobs: list[TokenLogprobs] | None,
        cached_tokens: int | None = None,
        prompt_logprobs: list[TokenLogprobs | None] | None = None,
    ) -> None:
        delta = self._delta(index)
        delta.tokens.extend(tokens)
        if logprobs is not None:
            if delta.logprobs is None:
                delta.logprobs = []
            delta.logprobs.extend(logprobs)
        if cached_tokens is not None:
            delta.cached_tokens = cached_tokens
        if prompt_logprobs is not None:
            delta.prompt_logprobs = prompt_logprobs
        self._wake()

    def close(self, index: int, finish: str, error: ServingError | None = None) -> None:
        """The choice's last delta; later calls for it do nothing."""
        if index not in self._open:
            return
        delta = self._delta(index)
        delta.finish, delta.error = finish, error
        self._open.discard(index)
        self._wake()

    async def deltas(self, on_end: Callable[[], None] = _nobody) -> AsyncIterator[ChoiceDelta]:
        """The same for a consumer that only iterates. `on_end` is called whatever ends the consumption."""
        woken = asyncio.Event()
        self.listen(woken.set)
        try:
            while True:
                while self._ready:
                    index = next(iter(self._ready))
                    yield self._ready.pop(index)
                if not self._open:
                    return
                woken.clear()
                await woken.wait()
        finally:
            on_end()

    def _delta(self, index: int) -> ChoiceDelta:
        delta = self._ready.get(index)
        if delta is None:
            delta = self._ready[index] = ChoiceDelta(index)
        return delta
