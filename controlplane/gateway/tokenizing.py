"""Templates and tokenizers, off the event loop: a bounded number of threads, calls and seconds. Short texts
of words met before are the exception (`encode_now`): they cost less than the way to a thread and back.

`tokenizers` releases the interpreter lock in its batch calls (not in `encode`), so they are used for single
texts too: the loop goes on streaming while a long prompt is encoded (measured: a 160,000-token text leaves
the loop its turns).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from controlplane.api.errors import ApiError, context_length_exceeded
from controlplane.gateway import metrics
from controlplane.gateway.settings import GatewaySettings
from controlplane.gateway.words import Words

INLINE_CHARS = 16_384
"""Texts up to this length may be rendered and encoded on the event loop, if their words are known (ours: some
150 us of look-ups; handing work to a thread and back costs 100 us of processor time by itself)."""
INLINE_NEW_CHARS = 256
"""Characters of new words that may be encoded there (ours: some 60 us)."""

T = TypeVar("T")


class TokenizerPool:
    """Runs short blocking calls in its threads. Own one per process; `close` it."""

    def __init__(self, settings: GatewaySettings) -> None:
        self._settings = settings
        self._threads = ThreadPoolExecutor(settings.tokenizer_threads, thread_name_prefix="tokenizer")
        self._calls = 0

    async def run(self, call: Callable[[], T]) -> T:
        """The call's answer. Raises ApiError 429 (too many calls wait) or 504 (the deadline passed).

        A call that overstays keeps its thread until it ends (a thread cannot be stopped); that is why the
        size of what is encoded is bounded before.
        """
        if self._calls >= self._settings.tokenizer_waiting:
            metrics.LIMITED.labels("tokenizer").inc()
            raise ApiError(429, "Too many prompts wait to be tokenized.", code="queue_full", retry_after=1)
        self._calls += 1
        metrics.TOKENIZER_WAITING.inc()
        future = asyncio.get_running_loop().run_in_executor(self._threads, call)
        future.add_done_callback(self._done)
        try:
            async with asyncio.timeout(self._settings.tokenize_seconds):
                return await asyncio.shield(future)
        except TimeoutError:
            future.cancel()  # if it has not begun
            raise ApiError(
                504, "The prompt could not be tokenized in time.", code="deadline_exceeded"
            ) from None
        except asyncio.CancelledError:
            future.cancel()
            raise

    def _done(self, future: asyncio.Future[T]) -> None:
        self._calls -= 1
        metrics.TOKENIZER_WAITING.dec()
        if not future.cancelled():
            future.exception()  # seen: the waiter may have left

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def encode(words: Words, text: str, *, special: bool, longest: int, limit: int | None) -> list[int]:
    """The ids of `text`. Runs in a tokenizer thread.

    `longest`: bytes of the vocabulary's longest token. With `limit` (the context length) a text that
    cannot fit, because even tokens of that size would be too many, is refused unencoded.
    """
    if limit is not None and len(text) > limit:
        at_least = -(-len(text.encode("utf-8", "surrogatepass")) // longest)
        if at_least > limit:
            raise context_length_exceeded(limit, at_least, 0, at_least=True)
    try:
        ids = words.ids(text, special=special)
    except UnicodeEncodeError as error:
        raise _not_unicode(error) from None
    assert ids is not None  # no bound was given
    return ids


def encode_now(words: Words, text: str, *, special: bool) -> list[int] | None:
    """The ids of a short text of words known before, on the event loop; None: it is a thread's work."""
    if len(text) > INLINE_CHARS:
        return None
    try:
        return words.ids(text, special=special, most_new=INLINE_NEW_CHARS)
    except UnicodeEncodeError as error:
        raise _not_unicode(error) from None


def _not_unicode(error: UnicodeEncodeError) -> ApiError:
    return ApiError(400, f"The text is not valid Unicode: {error.reason}.", param="prompt")
