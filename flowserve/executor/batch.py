"""A step's slices flattened into arrays: what models take.

Built once per step from `SequenceSlice`s; no per-token Python after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flowserve.executor.interface import SequenceSlice

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class RaggedBatch:
    """Tokens of all slices one after the other."""

    ids: Ints  # [tokens]
    positions: Ints  # [tokens]
    first: Ints  # [sequences] index of a slice's first token
    count: Ints  # [sequences] its tokens
    tables: Ints  # [sequences, width] block ids, padded with 0
    rows: Ints  # [rows] last tokens of the slices that sample, ascending


def flatten(
    batch: Sequence[SequenceSlice], *, block_tokens: int, num_blocks: int, max_len: int
) -> RaggedBatch:
    """Raises ValueError for a slice that is empty, outside its block table, or outside the pool.

    `max_len` is the model's length in tokens.
    """
    counts = np.array([len(item.tokens) for item in batch], np.int32)
    starts = np.array([item.start for item in batch], np.int64)
    first = np.zeros(len(batch), np.int32)
    np.cumsum(counts[:-1], out=first[1:])
    width = max(len(item.block_table) for item in batch)
    tables = np.zeros((len(batch), max(width, 1)), np.int32)
    for index, item in enumerate(batch):
        tables[index, : len(item.block_table)] = item.block_table
        end = item.start + len(item.tokens)
        if not item.tokens or item.start < 0 or end > len(item.block_table) * block_tokens or end > max_len:
            raise ValueError(
                f"slice {index} covers positions {item.start} to {end}, its {len(item.block_table)} blocks "
                f"hold {len(item.block_table) * block_tokens} (model length {max_len})"
            )
    if tables.min() < 0 or tables.max() >= num_blocks:
        raise ValueError(f"a block table names a block outside the pool of {num_blocks}")
    ids = np.fromiter((token for item in batch for token in item.tokens), np.int32, int(counts.sum()))
    offsets = np.arange(len(ids)) - np.repeat(first, counts)
    sampled = np.array([item.sample is not None for item in batch])
    return RaggedBatch(
        ids=ids,
        positions=(np.repeat(starts, counts) + offsets).astype(np.int32),
        first=first,
        count=counts,
        tables=tables,
        rows=(first + counts - 1)[sampled].astype(np.int32),
    )
