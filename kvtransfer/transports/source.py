"""What a Read may have, and the buffers that hold it: the sending half of sockets and gRPC alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from deepflow.v1 import kvtransfer_pb2 as pb

from kvtransfer.errors import TransferError, TransferErrorCode
from kvtransfer.layout import KVLayout
from kvtransfer.pool import BlockStore, generations_hold
from kvtransfer.runs import Run, blocks_of
from kvtransfer.sender import Sender

Frame = Sequence[tuple[int, int]]
"""(start, count) of blocks that are sent between two checks of their generations."""


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """A Read that was found to be allowed."""

    sender: Sender
    request: pb.ReadRequest
    store: BlockStore
    expected: dict[int, int]  # generation by block
    heads: tuple[int, int]  # (first, count); count 0 = all

    @classmethod
    def make(cls, sender: Sender, request: pb.ReadRequest) -> ReadPlan:
        """Raises TransferError for blocks that the receiver may not have, or that are not any more."""
        runs = [Run(run.start, run.count) for run in request.runs]
        store = sender.check_read(request.transfer_id, request.receiver, runs, request.generations)
        heads = check_heads(store.layout, request.first_head, request.heads)
        plan = cls(
            sender,
            request,
            store,
            dict(zip(blocks_of(runs), request.generations, strict=True)),
            heads,
        )
        plan.verify([(run.start, run.count) for run in runs])
        return plan

    @property
    def block_bytes(self) -> int:
        """Bytes that are sent of one block."""
        layout = self.store.layout
        return layout.block_bytes // layout.kv_heads * (self.heads[1] or layout.kv_heads)

    def runs(self) -> Iterator[tuple[int, int]]:
        return ((run.start, run.count) for run in self.request.runs)

    def buffers(self, frame: Frame) -> list[memoryview]:
        """The frame's bytes where they lie. Blocks for the copy out of a device's memory."""
        return [page for start, count in frame for page in pages_of(self.store, start, count, self.heads)]

    def verify(self, frame: Frame) -> None:
        """After the bytes left the pool. Raises TransferError if a block was reused, or the transfer ended.

        The peer took what was sent before: it lives, so the lease goes on.
        """
        blocks = [block for start, count in frame for block in range(start, start + count)]
        if not generations_hold(self.store, blocks, [self.expected[block] for block in blocks]):
            raise TransferError(
                TransferErrorCode.GENERATION_MOVED, "blocks were reused while they were being read"
            )
        self.sender.renew(self.request.transfer_id, self.request.receiver)


def check_heads(layout: KVLayout, first: int, count: int) -> tuple[int, int]:
    """A slice of heads as `pages_of` takes it. Raises TransferError for one the layout does not have."""
    if first + count > layout.kv_heads:
        raise TransferError(
            TransferErrorCode.LAYOUT_MISMATCH,
            f"heads {first} to {first + count} were asked for, {layout.kv_heads} are here",
        )
    return (first, count) if 0 < count < layout.kv_heads else (0, 0)


def pages_of(store: BlockStore, start: int, count: int, heads: tuple[int, int]) -> Iterator[memoryview]:
    """The bytes of `count` blocks from `start`, of the heads `(first, count)` alone; count 0 is all.

    Device memory is copied to the host first, and the call blocks for it.
    """
    view = store.view(start, count)
    if view is None:
        view = memoryview(store.load(start, count)).cast("B")
    first, wanted = heads
    if not wanted:
        yield view
        return
    layout = store.layout
    for offset in range(0, len(view), layout.kv_heads * layout.head_bytes):
        at = offset + first * layout.head_bytes
        yield view[at : at + wanted * layout.head_bytes]
