"""A task executor whose steps take the time of a cost profile instead of computing: everything else is real.

    DEEPFLOW_PACED_PROFILE=profile.json python -m tests.fakes.paced_executor <options of flowserve.shell>

Shell, engine, cache, pool and KV transfer are the executor's own; only the model is replaced. So one
machine runs topologies it has not the cores for, over the real control plane. Used by
`tests/bench/twin_real.py`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from flowserve.executor.interface import ModelInfo, SequenceSlice, SliceResult

PROFILE_ENV = "DEEPFLOW_PACED_PROFILE"
TOKEN = 7


class PacedExecutor:
    """Sleeps until a step's time is over; every sampled token is the same."""

    def __init__(self, info: ModelInfo, num_blocks: int, block_tokens: int) -> None:
        from controlplane.twin.costs import load_profile
        from flowserve.devices.cpu import CpuPool
        from kvtransfer.layout import KVLayout

        self._profile = load_profile(os.environ[PROFILE_ENV])
        layout = KVLayout(info.revision, info.dtype, block_tokens, info.layers, info.kv_heads, info.head_dim)
        self._pool = CpuPool(layout, num_blocks)
        self.info = info

    @property
    def store(self) -> object:
        return self._pool.store

    def execute(self, batch: Sequence[SequenceSlice]) -> list[SliceResult]:
        started = time.perf_counter()
        pairs = context = tokens = 0
        for piece in batch:
            count = len(piece.tokens)
            tokens += count
            if count == 1:
                context += piece.start + 1
            else:
                pairs += count * piece.start + count * (count + 1) // 2
        sampled = sum(piece.sample is not None for piece in batch)
        seconds = self._profile.step(tokens, sampled, pairs, context)
        time.sleep(max(0.0, started + seconds - time.perf_counter()))
        return [SliceResult(token=TOKEN if piece.sample is not None else None) for piece in batch]

    def close(self) -> None:
        self._pool.close()


def open_paced(
    path: str | Path, *, revision: str, kv_cache_bytes: int, block_tokens: int = 16, **_: object
) -> PacedExecutor:
    """In place of `flowserve.executor.local.open_executor`."""
    from flowserve.models.loader import open_model

    config = open_model(path).config
    info = ModelInfo(
        revision, config.layers, config.kv_heads, config.head_dim, config.vocab_size, config.max_len,
        config.eos_token_ids, "bfloat16",
    )  # fmt: skip
    block_bytes = 2 * 2 * config.layers * config.kv_heads * config.head_dim * block_tokens
    return PacedExecutor(info, kv_cache_bytes // block_bytes, block_tokens)


if __name__ == "__main__":
    import flowserve.executor.local as local
    from flowserve.shell.__main__ import main

    local.open_executor = open_paced  # type: ignore[assignment]  # the loader asks this module for it
    main()
