"""Finding preserved KV: the prefix index over block identities and the index by context id.

The prefix index is a radix tree over tokens whose edges are whole blocks. A block's identity is a
hash chained over everything before it (`kvtransfer.blockhash`), so an identity *is* the path from
the root, and the tree's nodes lie in one dictionary: walking down is one lookup per block, and no
node needs its children (DeepServe section 4.3: hybrid index = radix over tokens + index by id).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass


class PrefixIndex:
    """Identity <-> device block, one to one."""

    def __init__(self) -> None:
        self._block_of: dict[bytes, int] = {}
        self._identity_of: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._block_of)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._block_of)

    def __contains__(self, identity: bytes) -> bool:
        return identity in self._block_of

    def block(self, identity: bytes) -> int | None:
        return self._block_of.get(identity)

    def identity(self, block: int) -> bytes | None:
        return self._identity_of.get(block)

    def add(self, identity: bytes, block: int) -> None:
        """Raises ValueError if either side is taken."""
        if identity in self._block_of or block in self._identity_of:
            raise ValueError(f"block {block} or identity {identity.hex()} is indexed already")
        self._block_of[identity] = block
        self._identity_of[block] = identity

    def remove(self, block: int) -> bytes:
        identity = self._identity_of.pop(block)
        del self._block_of[identity]
        return identity


@dataclass(frozen=True, slots=True)
class _Context:
    identities: tuple[bytes, ...]
    expires: float


class ContextIndex:
    """Explicit context ids of a tenant -> block identities, least recently used out first.

    Entries are soft: they name blocks and pin none, so what a match finds depends on what the tiers
    still hold.
    """

    def __init__(self, max_contexts: int, clock: Callable[[], float]) -> None:
        self._max = max_contexts
        self._clock = clock
        self._contexts: OrderedDict[tuple[bytes, str], _Context] = OrderedDict()

    def __len__(self) -> int:
        return len(self._contexts)

    def put(self, salt: bytes, context_id: str, identities: Sequence[bytes], ttl_seconds: float) -> None:
        key = (salt, context_id)
        self._contexts.pop(key, None)
        if self._max < 1:
            return
        self._drop_expired()
        while len(self._contexts) >= self._max:
            self._contexts.popitem(last=False)
        self._contexts[key] = _Context(tuple(identities), self._clock() + ttl_seconds)

    def get(self, salt: bytes, context_id: str) -> tuple[bytes, ...]:
        """Identities of the context's blocks; empty for an unknown or expired one."""
        key = (salt, context_id)
        context = self._contexts.get(key)
        if context is None:
            return ()
        if context.expires <= self._clock():
            del self._contexts[key]
            return ()
        self._contexts.move_to_end(key)
        return context.identities

    def remove(self, salt: bytes, context_id: str) -> bool:
        return self._contexts.pop((salt, context_id), None) is not None

    def _drop_expired(self) -> None:
        now = self._clock()
        for key in [key for key, context in self._contexts.items() if context.expires <= now]:
            del self._contexts[key]
