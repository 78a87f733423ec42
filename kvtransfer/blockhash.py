"""Identity of KV blocks: a 128-bit keyed hash chain over tokens.

One function for everyone that names blocks: the engine's cache (`flowserve.rtc`), the gateways'
prompt trees (`controlplane`), and transfers. Equal identity means equal KV content: same model
revision, same adapter, same tenant salt, same tokens from position 0 to the block's end.

Source: shared formats of the house plan; the chain is the one of prefix caching in vLLM's design
(hash of parent and tokens), keyed so that a tenant cannot guess another tenant's identities.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

HASH_BYTES = 16
"""128 bits: a collision among 2**40 blocks has probability below 2**-48 (birthday bound)."""

DEFAULT_BLOCK_TOKENS = 16
"""Tokens of one KV block (house plan)."""


def chain_seed(model_revision: str, adapter_id: str = "", salt: bytes = b"") -> bytes:
    """The parent of a sequence's first block: everything that KV depends on beside the tokens."""
    digest = hashlib.blake2b(digest_size=HASH_BYTES, key=salt[:64], person=b"deepflow.kv.v1")
    for part in (model_revision.encode(), adapter_id.encode()):
        digest.update(len(part).to_bytes(4, "little") + part)
    return digest.digest()


def next_hash(parent: bytes, tokens: bytes) -> bytes:
    """Identity of the block whose predecessor is `parent`; `tokens` are little-endian uint32 bytes."""
    return hashlib.blake2b(tokens, digest_size=HASH_BYTES, key=parent).digest()


def block_hashes(
    tokens: Sequence[int], seed: bytes, block_tokens: int = DEFAULT_BLOCK_TOKENS, parent: bytes | None = None
) -> list[bytes]:
    """Identities of the full blocks of `tokens` (a partial last block has none).

    `parent` continues a chain: pass the identity of the block before `tokens[0]`.
    """
    data = np.asarray(tokens, dtype="<u4").tobytes()
    step = block_tokens * 4
    hashes: list[bytes] = []
    current = parent if parent is not None else seed
    for offset in range(0, len(data) - step + 1, step):
        current = next_hash(current, data[offset : offset + step])
        hashes.append(current)
    return hashes
