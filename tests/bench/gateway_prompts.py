"""What it costs to make ids of a prompt: by its words, by the tokenizer, and on the way to a thread and back.

    python -m tests.bench.gateway_prompts [--quick] [--json PATH]

Passages of running text (about 1,000 characters) whose words the gateway has met; ways take turns. Figures
are processor time of this process, medians.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

from tokenizers import Tokenizer

from controlplane.gateway.modelcard import build_card
from controlplane.gateway.words import Words
from controlplane.nodeagent.sources import fetch
from controlplane.nodeagent.uri import DEFAULT_MODEL_URI
from tests.bench import common

PASSAGE = 1000  # characters


async def main() -> int:
    args = common.parser(__doc__.splitlines()[0]).parse_args()
    report = common.Report("gateway_prompts")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    card = build_card(fetch(DEFAULT_MODEL_URI).path)
    tokenizer = Tokenizer.from_buffer(card.tokenizer_json)
    words = Words(tokenizer, card.tokenizer_json)
    book = (common.ROOT / "tests" / "data" / "moby_dick_chapter_1.txt").read_text()
    passages = [book[begin : begin + PASSAGE] for begin in range(0, len(book) - PASSAGE, PASSAGE)]
    for text in passages:
        assert words.ids(text) == tokenizer.encode(text, add_special_tokens=False).ids
    threads, loop = ThreadPoolExecutor(2), asyncio.get_running_loop()

    async def by_words(text: str) -> None:
        assert words.ids(text, most_new=0) is not None

    async def by_tokenizer(text: str) -> None:
        _ = tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids

    async def there_and_back(text: str) -> None:
        await loop.run_in_executor(threads, len, text)

    ways: dict[str, Callable[[str], Awaitable[None]]] = {
        "words": by_words, "tokenizer": by_tokenizer, "a thread and back, no work": there_and_back,
    }  # fmt: skip
    found: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(20 if args.quick else 100):
        for way, call in ways.items():
            started = time.process_time()
            for text in passages:
                await call(text)
            found[way].append(1e6 * (time.process_time() - started) / len(passages))
    middle = {way: common.median(times) for way, times in found.items()}
    for way, cost in middle.items():
        report.add(way=way, us=cost, fastest_us=min(found[way]))
    ratio = middle["words"] / (middle["tokenizer"] + middle["a thread and back, no work"])
    report.check("words / tokenizer in a thread", ratio, "x", "<= 0.25", ratio <= 0.25)
    return report.finish(args.json)


if __name__ == "__main__":
    common.run(main())
