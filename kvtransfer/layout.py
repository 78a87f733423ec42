"""How KV lies in memory: the layout both ends of a transfer must agree on.

Pages are `(block, layer, K/V, kv_head, token, dim)` in C order, one page per block (FlowKV section
"layout": a block is contiguous over all layers and over K and V, so a run of blocks is one copy).
Device pools (`flowserve.devices`) allocate by it, the handshake compares it, and it never changes
during a pool's life.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from deepflow.v1 import kvtransfer_pb2 as pb

PAGE_ORDER = "block,layer,kv,head,token,dim"
LAYOUT_VERSION = 1
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Bytes of one element by torch name."""


def _span(heads: range) -> str:
    return f"{heads.start}-{heads.stop - 1}"


class LayoutMismatch(Exception):
    """Two pools cannot exchange blocks. `reason` names every field that differs, ours first."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class KVSpec:
    """Attention kind of a group of layers; "full" is the only one so far."""

    kind: str
    first_layer: int
    layers: int


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Layout of one pool. `specs` empty = one group of full attention over all layers."""

    model_revision: str
    dtype: str  # torch name, a key of DTYPE_BYTES
    block_tokens: int
    layers: int
    kv_heads: int
    head_dim: int
    order: str = PAGE_ORDER
    version: int = LAYOUT_VERSION
    specs: tuple[KVSpec, ...] = ()
    first_head: int = 0  # of `kv_heads`, within the model's: a rank of a tensor-parallel group holds some
    total_heads: int = 0  # the model's KV heads; 0 = `kv_heads`, all are here

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"dtype {self.dtype!r} is none of {', '.join(DTYPE_BYTES)}")
        for name in ("block_tokens", "layers", "kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, is {getattr(self, name)}")
        if not self.total_heads:
            object.__setattr__(self, "total_heads", self.kv_heads)
        if self.first_head < 0 or self.first_head + self.kv_heads > self.total_heads:
            raise ValueError(f"heads {_span(self.heads)} of {self.total_heads}")
        if not self.specs:
            object.__setattr__(self, "specs", (KVSpec("full", 0, self.layers),))

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """Shape of one page: (layers, 2, kv_heads, block_tokens, head_dim)."""
        return (self.layers, 2, self.kv_heads, self.block_tokens, self.head_dim)

    @property
    def block_bytes(self) -> int:
        """Bytes of one page."""
        elements = self.layers * 2 * self.kv_heads * self.block_tokens * self.head_dim
        return elements * DTYPE_BYTES[self.dtype]

    @property
    def head_bytes(self) -> int:
        """Bytes of one head's tokens in one layer, of K or of V: the least contiguous piece of a page."""
        return self.block_tokens * self.head_dim * DTYPE_BYTES[self.dtype]

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold `tokens` tokens; the last one may be partly filled."""
        return -(-tokens // self.block_tokens)

    def digest(self) -> bytes:
        """32 bytes that are equal exactly for equal layouts; pools carry it in their header."""
        hasher = hashlib.blake2b(digest_size=32, person=b"deepflow.layout")
        for part in (
            self.model_revision,
            self.dtype,
            self.order,
            *(str(n) for n in (self.version, self.block_tokens, self.layers, self.kv_heads, self.head_dim)),
            *(str(n) for n in (self.first_head, self.total_heads)),
            *(f"{spec.kind}:{spec.first_layer}:{spec.layers}" for spec in self.specs),
        ):
            encoded = part.encode()
            hasher.update(len(encoded).to_bytes(4, "little") + encoded)
        return hasher.digest()

    def check_compatible(self, other: KVLayout) -> None:
        """Raises LayoutMismatch unless `other`'s blocks can be put into a pool of this layout.

        Block size and dtype may differ (`kvtransfer.reshape` converts), and so may the heads that a rank
        of a tensor-parallel group holds, if the two have some in common. The reason names every field
        that stands in the way.
        """
        differing = [
            f"{name} {getattr(self, name)!r} here, {getattr(other, name)!r} there"
            for name in ("version", "order", "model_revision", "layers", "total_heads", "head_dim", "specs")
            if getattr(self, name) != getattr(other, name)
        ]
        if self.total_heads == other.total_heads and not self.common_heads(other):
            differing.append(f"heads {_span(self.heads)} here, {_span(other.heads)} there")
        if differing:
            raise LayoutMismatch("KV layouts differ: " + "; ".join(differing))

    @property
    def heads(self) -> range:
        """The model's KV heads that this pool holds."""
        return range(self.first_head, self.first_head + self.kv_heads)

    def common_heads(self, other: KVLayout) -> range:
        """The model's KV heads that both pools hold."""
        return range(
            max(self.first_head, other.first_head),
            min(self.first_head + self.kv_heads, other.first_head + other.kv_heads),
        )

    def to_proto(self) -> pb.KVLayout:
        return pb.KVLayout(
            model_revision=self.model_revision,
            dtype=self.dtype,
            block_tokens=self.block_tokens,
            layers=self.layers,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            order=self.order,
            version=self.version,
            first_head=self.first_head,
            total_heads=self.total_heads,
            specs=[pb.KVSpec(kind=s.kind, first_layer=s.first_layer, layers=s.layers) for s in self.specs],
        )

    @classmethod
    def from_proto(cls, message: pb.KVLayout) -> KVLayout:
        """Raises LayoutMismatch for a message that describes no layout known here."""
        try:
            return cls(
                model_revision=message.model_revision,
                dtype=message.dtype,
                block_tokens=message.block_tokens,
                layers=message.layers,
                kv_heads=message.kv_heads,
                head_dim=message.head_dim,
                order=message.order,
                version=message.version,
                first_head=message.first_head,
                total_heads=message.total_heads,
                specs=tuple(KVSpec(s.kind, s.first_layer, s.layers) for s in message.specs),
            )
        except ValueError as error:
            raise LayoutMismatch(f"KV layout not understood: {error}") from error
