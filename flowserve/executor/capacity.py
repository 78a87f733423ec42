"""How much KV an executor takes where nobody says: what its device has room for, less what a step needs.

What a step needs is measured once, by a prompt of the largest step over a small pool, and noted beside the
model in the node's weight cache: later starts of the same model, form, device and version read it.
"""

from __future__ import annotations

import logging

import torch
from prometheus_client import Counter

from flowserve.devices import Device, Model
from flowserve.executor.batch import flatten
from flowserve.executor.interface import SequenceSlice
from flowserve.models.weight_cache import CachedSource
from kvtransfer.layout import KVLayout
from kvtransfer.pool import PoolError

MARGIN = 1.25
"""Of the measured need (ours): batches of other shapes, allocators' rounding, what graphs record."""
PROFILES = Counter(
    "deepflow_te_capacity_profiles", "What a step needs, as it was found: `measured` or `noted`.", ("source",)
)

log = logging.getLogger(__name__)


def pool_bytes(
    where: Device, model: Model, layout: KVLayout, *, tokens: int, source: CachedSource | None
) -> int:
    """Bytes of a KV pool that leaves room for steps of `tokens`. Raises PoolError where there is none."""
    name = f"{where.name} {torch.__version__} {layout.digest().hex()} {tokens}"
    noted = source.profile(name) if source is not None else None
    need = noted if noted is not None else step_bytes(where, model, layout, tokens)
    PROFILES.labels("measured" if noted is None else "noted").inc()
    if source is not None and noted is None:
        source.keep_profile(name, need)
    room = where.room()
    found = room - int(MARGIN * need)
    log.info("room for %d MiB, of which a step of %d tokens needs %d", room >> 20, tokens, need >> 20)
    if found < layout.block_bytes:
        raise PoolError(f"no memory for KV: {room} bytes are free, of which a step needs {need}")
    return found


def step_bytes(where: Device, model: Model, layout: KVLayout, tokens: int) -> int:
    """Bytes that a prompt of `tokens` takes beyond weights and pool."""
    blocks = -(-tokens // layout.block_tokens)
    pool = where.make_pool(layout, blocks)
    try:
        batch = flatten(
            [SequenceSlice([0] * tokens, 0, list(range(blocks)))],
            block_tokens=layout.block_tokens,
            num_blocks=blocks,
            max_len=tokens,
        )
        return where.peak(lambda: model.forward(batch, pool.pages))
    finally:
        pool.close()
