"""A model cut over ranks (Megatron-LM, arXiv 1909.08053, section 3): heads and inner columns are shared
out, norms and the embedding are everywhere.

`q`, `k`, `v`, `gate` and `up` are cut by output rows, `output` and `down` by input columns: a layer needs
two sums over the ranks and nothing else. The head is cut by vocabulary rows, its logits are put together.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
from torch.nn import functional

from flowserve.models.config import ModelConfig
from flowserve.models.errors import UnsupportedModel
from flowserve.models.weights import WeightSource

_BY_ROWS = frozenset({"q", "k", "v", "q_bias", "k_bias", "v_bias", "gate", "up"})
_BY_COLUMNS = frozenset({"output", "down"})


class Collective(Protocol):
    """What a sharded model asks of its ranks (`flowserve.devices.collective`). All call in one order."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks; `values` may be overwritten."""
        ...

    def join_columns(self, values: torch.Tensor) -> torch.Tensor:
        """`[rows, n]` of every rank side by side, in the order of ranks: `[rows, size * n]`."""
        ...


def shard_config(config: ModelConfig, size: int) -> ModelConfig:
    """The shape of one rank's part. Raises UnsupportedModel where something cannot be shared out evenly."""
    uneven = [
        f"{getattr(config, name)} {words}"
        for name, words in (
            ("heads", "query heads"),
            ("kv_heads", "KV heads"),
            ("intermediate", "columns of the feed-forward layer"),
        )
        if getattr(config, name) % size
    ]
    if uneven:
        raise UnsupportedModel(f"{', '.join(uneven)} cannot be shared out over {size} ranks")
    return replace(
        config,
        heads=config.heads // size,
        kv_heads=config.kv_heads // size,
        intermediate=config.intermediate // size,
    )


class ShardedSource:
    """One rank's part of a weight source, as a weight source."""

    def __init__(self, source: WeightSource, rank: int, size: int) -> None:
        """Raises UnsupportedModel."""
        self._source, self._rank, self._size = source, rank, size
        self._config = shard_config(source.config, size)

    @property
    def config(self) -> ModelConfig:
        return self._config

    def tensor(self, name: str) -> torch.Tensor:
        tensor = self._source.tensor(name)
        part = name.rpartition(".")[2]
        if part in _BY_ROWS:
            return tensor.chunk(self._size, dim=0)[self._rank]
        if part in _BY_COLUMNS:
            return tensor.chunk(self._size, dim=1)[self._rank].contiguous()
        return tensor


def shard_head(head: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """One rank's rows of `head` [vocab, hidden]; zero rows fill the last part up."""
    rows = -(-len(head) // size)
    part = head[rank * rows : (rank + 1) * rows]
    return functional.pad(part, (0, 0, 0, rows - len(part))) if len(part) < rows else part
