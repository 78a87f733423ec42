"""Decode steps recorded once and replayed: a device graph launches a step's hundreds of kernels as one.

A graph's shapes and memory are fixed, so there is one for each bucket of batch sizes, over one buffer of
inputs. A batch that is smaller than its bucket is filled up with copies of its first sequence: they
compute what it computes and write what it writes, so no block is set aside for them. Everything else
(prompts, mixed batches, batches beyond the largest bucket) runs as it did.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch

from flowserve.executor.batch import Ints, RaggedBatch
from flowserve.models.config import ModelConfig
from flowserve.models.llama import Spans, TorchLlama

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
"""Batch sizes with a graph of their own (ours): at most half of a small bucket's rows are padding, a third
of a large one's. 64 tasks run at once by default."""
GRAPHS_ENV = "DEEPFLOW_GRAPHS"
"""Set to 0 to run every step without graphs (to compare, or where a driver misbehaves)."""


class Captured(Protocol):
    """A recorded step; `logits` is overwritten by each replay."""

    @property
    def logits(self) -> torch.Tensor: ...

    def replay(self, lengths: Sequence[int]) -> None:
        """`lengths` are the host's copy of the sequences' ends, for kernels that take them by value."""
        ...


Capture = Callable[[Callable[[], torch.Tensor]], Captured]
"""Runs a step to warm up, then records it."""


class GraphedLlama:
    """A TorchLlama whose decodes are replayed. `prepare` comes first, and first again after `wake`."""

    def __init__(self, model: TorchLlama, capture: Capture) -> None:
        self._model, self._capture = model, capture
        self._steps: dict[int, Captured] = {}
        self._inputs = torch.zeros(0)
        self._block_tokens = 0
        self._replayed: torch.Tensor | None = None  # logits of the last step, where it was replayed

    @property
    def config(self) -> ModelConfig:
        return self._model.config

    def prepare(self, pages: torch.Tensor, max_len: int) -> None:
        """Records all buckets over `pages`, which hold no KV yet: the recording writes into block 0.

        `max_len` is the longest sequence in tokens.
        """
        self._block_tokens = pages.shape[4]
        width = -(-max_len // self._block_tokens)
        # A row is what a sequence needs: its token, that token's position, its block table.
        self._inputs = torch.zeros(BUCKETS[-1], 2 + width, dtype=torch.int32, device=self._model.device)
        for size in reversed(BUCKETS):  # the largest first: the smaller ones fit into its memory
            inputs = self._inputs[:size]
            longest = [width * self._block_tokens] * size

            def step(inputs: torch.Tensor = inputs, longest: list[int] = longest) -> torch.Tensor:
                ids, positions = inputs[:, 0].long(), inputs[:, 1].long()
                spans = Spans(inputs[:, 2:].contiguous(), inputs[:, 1] + 1, longest)
                return self._model.decode(ids, positions, spans, pages)

            self._steps[size] = self._capture(step)

    @torch.inference_mode()
    def forward(self, batch: RaggedBatch, pages: torch.Tensor) -> torch.Tensor:
        """Float32 logits [rows, vocab]; `pages` are those of `prepare`."""
        count = len(batch.ids)
        size = next((size for size in BUCKETS if size >= count), None)
        # One token each, and each is sampled from: a decode.
        if size not in self._steps or not count == len(batch.first) == len(batch.rows):
            self._replayed = None
            return self._model.forward(batch, pages)
        used = batch.tables.shape[1]
        rows = np.zeros((size, self._inputs.shape[1]), np.int32)
        rows[:count, 0], rows[:count, 1], rows[:count, 2 : 2 + used] = (
            batch.ids,
            batch.positions,
            batch.tables,
        )
        rows[count:] = rows[0]
        self._inputs[:size].copy_(torch.from_numpy(rows))
        step = self._steps[size]
        step.replay((rows[:, 1] + 1).tolist())
        self._replayed = step.logits[:count].clone()  # the next replay may start before these are read
        return self._replayed

    def logits(self, rows: Ints) -> torch.Tensor:
        """Float32 logits [len(rows), vocab] of tokens of the last `forward`."""
        if self._replayed is None:
            return self._model.logits(rows)
        return self._replayed[torch.from_numpy(rows).long()]

    def sleep(self) -> None:
        self._forget()
        self._model.sleep()

    def wake(self) -> None:
        self._model.wake()

    def close(self) -> None:
        self._forget()
        self._model.close()

    def _forget(self) -> None:
        """What was recorded reads weights and pages where they lay then."""
        self._steps.clear()
        self._inputs, self._replayed = torch.zeros(0), None
