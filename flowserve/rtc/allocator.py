"""Which blocks of the pool are free: contiguous segments, best fit, merged on free.

Only `flowserve.rtc.cache` calls this. FlowKV's segment allocator (arXiv 2504.03775): a KV transfer
costs one call per run of blocks, so tables are cut out of as few segments as can be, each time out
of the one that wastes least, and neighbours merge when they are given back. It knows nothing of
references, caching or memory: ids in, ids out.

Cost. Segments are found by their ends in arrays (boundary tags), and by length in a set of lengths
with one heap per length, so cutting and giving a run back is O(log n) however long the run is.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush

from kvtransfer.runs import Run

_WORD = 64
_HEAP_SLACK = 32
"""Stale entries a heap may hold beyond its living ones before it is rebuilt (ours)."""


class _LengthSet:
    """A set of integers `0 … size`, with the smallest one that is not below a bound.

    Words of 64 bits in levels: each bit of a level says that a word of the level below is not empty.
    """

    def __init__(self, size: int) -> None:
        self._levels: list[list[int]] = []
        while True:
            size = size // _WORD + 1
            self._levels.append([0] * size)
            if size == 1:
                return

    def add(self, value: int) -> None:
        for level in self._levels:
            word, bit = divmod(value, _WORD)
            before = level[word]
            level[word] = before | (1 << bit)
            if before:
                return
            value = word

    def discard(self, value: int) -> None:
        for level in self._levels:
            word, bit = divmod(value, _WORD)
            level[word] &= ~(1 << bit)
            if level[word]:
                return
            value = word

    def at_least(self, bound: int) -> int | None:
        """The smallest member that is not below `bound`; None if there is none."""
        for height, level in enumerate(self._levels):
            word, bit = divmod(bound, _WORD)
            if word >= len(level):
                return None
            found = level[word] >> bit
            if found:
                value = word * _WORD + bit + _lowest_bit(found)
                for below in reversed(self._levels[:height]):
                    value = value * _WORD + _lowest_bit(below[value])
                return value
            bound = word + 1
        return None

    def largest(self) -> int | None:
        top = self._levels[-1][0]
        if not top:
            return None
        value = top.bit_length() - 1
        for below in reversed(self._levels[:-1]):
            value = value * _WORD + below[value].bit_length() - 1
        return value


def _lowest_bit(word: int) -> int:
    return (word & -word).bit_length() - 1


class SegmentAllocator:
    """Free block ids `0 … num_blocks-1` as maximal segments.

    Misuse (giving back a free block, taking a taken one) raises ValueError and changes nothing: it is
    a fault of the caller that would otherwise hand one block to two owners.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be positive, is {num_blocks}")
        self.num_blocks = num_blocks
        self._free = num_blocks
        self._taken = bytearray(num_blocks)
        self._length_from = [0] * (num_blocks + 1)  # at a segment's first block: its length; else 0
        self._length_to = [0] * (num_blocks + 1)  # at the block after a segment: its length; else 0
        self._lengths = _LengthSet(num_blocks)
        self._starts: dict[int, list[int]] = {}  # length -> heap of first blocks, some of them stale
        self._living: dict[int, int] = {}  # length -> segments of that length
        self._insert(0, num_blocks)

    @property
    def free(self) -> int:
        """Free blocks."""
        return self._free

    @property
    def longest(self) -> int:
        """Length of the longest segment; 0 where nothing is free."""
        return self._lengths.largest() or 0

    def runs(self) -> list[Run]:
        """All segments, ascending. O(blocks): for audits and tests."""
        return [Run(start, length) for start, length in enumerate(self._length_from) if length]

    def is_free(self, block: int) -> bool:
        return 0 <= block < self.num_blocks and not self._taken[block]

    def best_fit(self, count: int) -> Run | None:
        """The shortest segment of at least `count` blocks, the first one of that length; None if none."""
        length = self._lengths.at_least(max(1, count))
        return None if length is None else Run(self._first_of(length), length)

    def take(self, count: int) -> list[Run] | None:
        """`count` blocks: cut from the shortest segment that holds them all, else from the longest ones.

        Returns None, and takes nothing, where fewer are free.
        """
        if count > self._free:
            return None
        taken: list[Run] = []
        while count > 0:
            segment = self.best_fit(count)
            if segment is None:
                length = self.longest
                segment = Run(self._first_of(length), length)
            cut = Run(segment.start, min(segment.count, count))
            self.take_at(cut.start, cut.count)
            taken.append(cut)
            count -= cut.count
        return taken

    def take_at(self, start: int, count: int) -> None:
        """Exactly the blocks `start … start+count-1`. Raises ValueError unless all are free."""
        stop = start + count
        if count < 1 or start < 0 or stop > self.num_blocks or self._taken.find(1, start, stop) >= 0:
            raise ValueError(f"blocks {start}+{count} are not all free")
        first, length = self._segment_of(start)
        self._remove(first, length)
        if first < start:
            self._insert(first, start - first)
        if stop < first + length:
            self._insert(stop, first + length - stop)
        self._taken[start:stop] = b"\1" * count
        self._free -= count

    def give(self, start: int, count: int) -> None:
        """Takes `count` blocks from `start` back and merges them with free neighbours."""
        stop = start + count
        if count < 1 or start < 0 or stop > self.num_blocks or self._taken.find(0, start, stop) >= 0:
            raise ValueError(f"blocks {start}+{count} are not in use")
        self._taken[start:stop] = bytes(count)
        self._free += count
        left, right = self._length_to[start], self._length_from[stop]
        if left:
            self._remove(start - left, left)
        if right:
            self._remove(stop, right)
        self._insert(start - left, left + count + right)

    # -- inside ----------------------------------------------------------------------------------

    def _segment_of(self, block: int) -> tuple[int, int]:
        """The segment a free block lies in. A block inside of one is found by the taken block before it."""
        if self._length_from[block]:
            return block, self._length_from[block]
        first = self._taken.rfind(1, 0, block) + 1
        return first, self._length_from[first]

    def _insert(self, start: int, length: int) -> None:
        self._length_from[start] = self._length_to[start + length] = length
        self._living[length] = living = self._living.get(length, 0) + 1
        if living == 1:
            self._lengths.add(length)
        heap = self._starts.setdefault(length, [])
        if len(heap) > 2 * living + _HEAP_SLACK:  # amortized: so many were pushed since the last time
            heap[:] = {first for first in heap if self._length_from[first] == length} - {start}
            heapify(heap)
        heappush(heap, start)

    def _remove(self, start: int, length: int) -> None:
        self._length_from[start] = self._length_to[start + length] = 0
        living = self._living[length] - 1
        if living:
            self._living[length] = living
        else:
            del self._living[length], self._starts[length]
            self._lengths.discard(length)

    def _first_of(self, length: int) -> int:
        """The first segment of a length that exists."""
        heap = self._starts[length]
        while self._length_from[heap[0]] != length:
            heappop(heap)
        return heap[0]
