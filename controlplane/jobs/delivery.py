"""From executors' events to the one consumer of a job: deltas merged per choice, one wake-up per event.

Bounded without blocking anyone: a slow consumer finds one merged delta a choice, whose tokens are at most
max_output_tokens.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from controlplane.jobs.serving import ChoiceDelta, ServingError, TokenLogprobs


class Delivery:
    def __init__(self, choices: int) -> None:
        self._open = set(range(choices))
        self._ready: dict[int, ChoiceDelta] = {}
        self._wake = asyncio.Event()

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
        self._wake.set()

    def close(self, index: int, finish: str, error: ServingError | None = None) -> None:
        """The choice's last delta; later calls for it do nothing."""
        if index not in self._open:
            return
        delta = self._delta(index)
        delta.finish, delta.error = finish, error
        self._open.discard(index)
        self._wake.set()

    async def deltas(self, on_end: Callable[[], None] = lambda: None) -> AsyncIterator[ChoiceDelta]:
        """`on_end` is called whatever ends the consumption."""
        try:
            while True:
                while self._ready:
                    index = next(iter(self._ready))
                    yield self._ready.pop(index)
                if not self._open:
                    return
                self._wake.clear()
                await self._wake.wait()
        finally:
            on_end()

    def _delta(self, index: int) -> ChoiceDelta:
        delta = self._ready.get(index)
        if delta is None:
            delta = self._ready[index] = ChoiceDelta(index)
        return delta
