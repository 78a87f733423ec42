"""Which free blocks to hand out: the pool's free list, kept as runs of adjacent block ids.

Only `flowserve.rtc.cache` calls this. Long runs matter beyond locality: a KV transfer costs one
copy per run of blocks (FlowKV section A2), so the list merges neighbours on free and allocates best
fit. It knows nothing of references, caching or memory: ids in, ids out.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable


class BlockAllocator:
    """Free block ids `0 … num_blocks-1` as maximal runs.

    Misuse (freeing a free block) raises ValueError: it is a fault of the caller that would
    otherwise hand one block to two owners.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be positive, is {num_blocks}")
        self.num_blocks = num_blocks
        self._free = num_blocks
        self._taken = bytearray(num_blocks)
        self._length_at: dict[int, int] = {0: num_blocks}  # first block of a run -> its length
        self._start_of_end: dict[int, int] = {num_blocks: 0}  # block after a run -> its first block
        self._by_length: list[tuple[int, int]] = [(num_blocks, 0)]  # sorted (length, first block)

    @property
    def free(self) -> int:
        """Blocks on the free list."""
        return self._free

    def runs(self) -> list[tuple[int, int]]:
        """The maximal runs of free blocks, (first block, length), ascending."""
        return sorted(self._length_at.items())

    def take(self, count: int) -> list[int] | None:
        """`count` blocks, from the shortest run that holds them all, else from the longest runs.

        Returns None, and takes nothing, where fewer are free.
        """
        if count > self._free:
            return None
        taken: list[int] = []
        while len(taken) < count:
            wanted = count - len(taken)
            at = bisect_left(self._by_length, (wanted, -1))
            length, start = self._by_length[at if at < len(self._by_length) else -1]
            used = min(length, wanted)
            self._remove(start, length)
            if used < length:
                self._insert(start + used, length - used)
            taken.extend(range(start, start + used))
        for block in taken:
            self._taken[block] = 1
        self._free -= count
        return taken

    def take_after(self, block: int) -> int | None:
        """One block: the right neighbour of `block` if free, so that growing tables stay one run."""
        length = self._length_at.get(block + 1)
        if length is None:
            got = self.take(1)
            return None if got is None else got[0]
        self._remove(block + 1, length)
        if length > 1:
            self._insert(block + 2, length - 1)
        self._taken[block + 1] = 1
        self._free -= 1
        return block + 1

    def give(self, blocks: Iterable[int]) -> None:
        """Takes blocks back and merges them with free neighbours."""
        for block in blocks:
            self._give(block)

    def _give(self, block: int) -> None:
        if not 0 <= block < self.num_blocks or not self._taken[block]:
            raise ValueError(f"block {block} is not in use")
        self._taken[block] = 0
        start, end = block, block + 1
        left = self._start_of_end.get(start)
        if left is not None:
            self._remove(left, start - left)
            start = left
        right = self._length_at.get(end)
        if right is not None:
            self._remove(end, right)
            end += right
        self._insert(start, end - start)
        self._free += 1

    def _insert(self, start: int, length: int) -> None:
        self._length_at[start] = length
        self._start_of_end[start + length] = start
        insort(self._by_length, (length, start))

    def _remove(self, start: int, length: int) -> None:
        del self._length_at[start]
        del self._start_of_end[start + length]
        del self._by_length[bisect_left(self._by_length, (length, start))]
