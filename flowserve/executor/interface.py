"""The border between the engine's master and its SPMD executors: one batch in, sampled tokens out.

The master decides *what* runs (counts, blocks); an executor runs it on one device. Many executors
(tensor parallel) receive the same batch (DeepServe section 4, SPMD master-executor).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from flowserve.engine.types import SamplingParams, TokenLogprobs

QUANTIZATIONS = ("", "int8", "int4")
"""How weights may be kept instead of in the model's dtype; "" is not at all."""


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """Sample one token after a slice's last token.

    `index` is the position in the output of the token to draw (draws depend on seed and index alone).
    """

    params: SamplingParams
    prompt: Sequence[int]
    output: Sequence[int]  # tokens so far, before the one to draw
    index: int
    eos_token_ids: tuple[int, ...] = ()  # masked while index < params.min_tokens
    processor: object | None = None  # a logit processor bound to this sequence (flowserve.engine.processors)


@dataclass(frozen=True, slots=True)
class SequenceSlice:
    """Tokens of one sequence to run in this step: positions `start … start+len(tokens)-1`.

    KV of positions below `start` is already in the blocks of `block_table`; the slice's own KV is
    written there too. `block_table[i]` holds positions `[i*block_tokens, (i+1)*block_tokens)`.
    """

    tokens: Sequence[int]
    start: int
    block_table: Sequence[int]
    sample: SampleSpec | None = None
    prompt_logprobs: int | None = None  # log-probabilities of the tokens *after* each slice token
    next_token: int | None = None  # with prompt_logprobs: the prompt token after this slice, if any
    adapter_id: str = ""


@dataclass(slots=True)
class SliceResult:
    token: int | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    error: str | None = None  # why a slice that was to sample has no token; the others have theirs


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the master must know of a loaded model."""

    revision: str
    layers: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_model_len: int  # tokens
    eos_token_ids: tuple[int, ...]
    dtype: str  # "bfloat16" | "float16" | "float32"
    quantization: str = ""  # of the weights, one of QUANTIZATIONS


class ExecutorLost(RuntimeError):
    """The executor cannot take another step; what is left to its process is to end."""


class Executor(Protocol):
    """Runs batches. Called from one thread, the engine's step loop."""

    @property
    def info(self) -> ModelInfo: ...

    def execute(self, batch: Sequence[SequenceSlice]) -> list[SliceResult]:
        """Runs the slices as one batch; results in the same order.

        Raises ValueError for a slice outside its block table, ExecutorLost; device errors pass through.
        """
        ...

    def close(self) -> None: ...
