"""The client that every serving bench drives its servers with: streamed completions, timed token by token.

Prompts are ready-made token ids, so that any OpenAI server of the same model gets the same work, and they
differ between requests, so that no prefix is found in a cache.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.support.http_client import stream

VOCABULARY = (1000, 40_000)  # ids of ordinary tokens
REQUEST_SECONDS = 600.0


@dataclass
class Sample:
    """One request's figures, in seconds."""

    first: float
    rest: list[float] = field(default_factory=list)  # arrivals after the first, from the start
    tokens: int = 0
    error: str = ""

    @property
    def per_token(self) -> float:
        return (self.rest[-1] - self.first) / (self.tokens - 1) if self.tokens > 1 and self.rest else 0.0

    @property
    def longest_gap(self) -> float:
        times = [0.0, self.first, *self.rest]
        return max(b - a for a, b in itertools.pairwise(times))


class Prompts:
    """Random token ids, never the same twice."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def next(self, tokens: int) -> list[int]:
        return [self._random.randrange(*VOCABULARY) for _ in range(tokens)]


async def complete(
    port: int,
    model: str,
    prompt: Sequence[int],
    output_tokens: int,
    extra: Mapping[str, object] | None = None,
) -> Sample:
    """One greedy completion of exactly `output_tokens` tokens from an OpenAI server on loopback.

    A token counts as arrived with the first event that carries it; an event without choices (usage), or
    one that only tells the end, carries none.
    """
    payload: dict[str, object] = {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **(extra or {}),
    }
    run = await stream("127.0.0.1", port, "/v1/completions", payload, timeout=REQUEST_SECONDS)
    error = run.error()
    if error is not None or not run.done:
        return Sample(0.0, error=str(error or "cut"))
    times, tokens = [], 0
    parsed: list[dict[str, Any]] = run.parsed()
    for at, event in zip(run.arrivals, parsed, strict=True):
        choices = event.get("choices")
        if choices and (choices[0].get("text") or not choices[0].get("finish_reason")):
            times.append(at - run.started)
        tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    if len(times) < 2 or tokens != output_tokens:
        return Sample(0.0, error=f"{tokens} tokens in {len(times)} events, {output_tokens} asked for")
    return Sample(times[0], times[1:], tokens)


async def batch(
    ask: Callable[[], Awaitable[Sample]], concurrency: int, requests: int
) -> tuple[list[Sample], float]:
    """`requests` requests, `concurrency` at a time; their samples and the wall seconds of all."""
    left = requests
    samples: list[Sample] = []

    async def client() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            samples.append(await ask())

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(concurrency)))
    return samples, time.perf_counter() - started
