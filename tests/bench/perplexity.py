"""What a weight precision costs in quality: perplexity of a fixed text, beside float32.

    python -m tests.bench.perplexity [--quick] [--json PATH] [--precisions bf16 int8 int4]

The text is shipped (`tests/data`), so that figures of different days and machines compare. It is cut into
windows, each scored from its second token on, by the executor that serves. Beside perplexity stands what
it can hide: how far single tokens' log-probabilities move, and how often the most likely token changes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from controlplane.gateway.modelcard import build_card
from controlplane.nodeagent.sources import fetch
from controlplane.nodeagent.uri import DEFAULT_MODEL_URI
from flowserve.executor.interface import SequenceSlice
from flowserve.executor.local import LocalExecutor, open_executor
from tests.bench import common

TEXT = common.ROOT / "tests" / "data" / "moby_dick_chapter_1.txt"
REFERENCE = "f32"
WINDOW = 512  # tokens
QUICK_WINDOWS = 2
MOST_LOSS = {"bf16": 0.01, "int8": 0.01, "int4": 0.1}  # of perplexity (ours)


@dataclass(frozen=True, slots=True)
class Scores:
    """Of every scored token of the text: its log-probability, and the token that was most likely there."""

    logprobs: list[float]
    best: list[int]

    @property
    def perplexity(self) -> float:
        return math.exp(-common.mean(self.logprobs))


def windows(model: Path) -> list[list[int]]:
    card = build_card(model)
    ids = Tokenizer.from_str(card.tokenizer_json.decode()).encode(TEXT.read_text()).ids
    return [ids[at : at + WINDOW] for at in range(0, len(ids), WINDOW) if len(ids[at : at + WINDOW]) > 1]


def score(executor: LocalExecutor, texts: Sequence[Sequence[int]]) -> Scores:
    logprobs: list[float] = []
    best: list[int] = []
    for tokens in texts:
        blocks = range(-(-len(tokens) // executor.store.layout.block_tokens))
        item = SequenceSlice(tokens=tokens, start=0, block_table=blocks, prompt_logprobs=1)
        found = executor.execute([item])[0].prompt_logprobs or []
        assert len(found) == len(tokens) - 1
        logprobs += [entry.logprob for entry in found]
        best += [entry.top[0][0] for entry in found]
    return Scores(logprobs, best)


def run(model: Path, precision: str, threads: int, texts: Sequence[Sequence[int]]) -> Scores:
    how = common.PRECISIONS[precision]
    executor = open_executor(
        model,
        revision="bench",
        dtype=how.dtype,
        quantization=how.quantization,
        kv_cache_bytes=256 << 20,
        threads=threads,
    )
    try:
        return score(executor, texts)
    finally:
        executor.close()


def main() -> int:
    parser = common.parser(str(__doc__).splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    others = [name for name in common.PRECISIONS if name != REFERENCE]
    parser.add_argument("--precisions", nargs="*", default=others, choices=others, help=f"beside {REFERENCE}")
    args = parser.parse_args()
    report = common.Report("perplexity")
    model = fetch(DEFAULT_MODEL_URI).path
    texts = windows(model)[: QUICK_WINDOWS if args.quick else None]
    reference = run(model, REFERENCE, args.threads, texts)
    for precision in (REFERENCE, *args.precisions):
        scores = reference if precision == REFERENCE else run(model, precision, args.threads, texts)
        moves = [abs(a - b) for a, b in zip(scores.logprobs, reference.logprobs, strict=True)]
        same = sum(a == b for a, b in zip(scores.best, reference.best, strict=True)) / len(moves)
        loss = scores.perplexity / reference.perplexity - 1
        report.add(
            precision=precision,
            tokens=len(moves),
            perplexity=f"{scores.perplexity:.4f}",
            loss_percent=100 * loss,
            mean_logprob_move=common.mean(moves),
            max_logprob_move=max(moves),
            same_best_percent=100 * same,
        )
        if precision in MOST_LOSS:
            most = MOST_LOSS[precision]
            report.check(
                f"perplexity that {precision} costs", 100 * loss, "%", f"< {100 * most:.0f}", loss < most
            )
    return report.finish(args.json)


if __name__ == "__main__":
    sys.exit(main())
