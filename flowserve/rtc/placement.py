"""Where a table goes: which free blocks it gets, and which cached ones are evicted for it.

Called by `flowserve.rtc.cache` alone. A KV transfer costs one call per run of blocks, and a prefix
cache fills a pool with blocks that are evicted one by one: plain best fit over what least-recent-use
eviction frees shatters it (FlowKV solves the free list only). So eviction and placement are one choice:

    cost of a plan = sum of what its cached blocks are worth + RUN_PRICE * its runs

What a cached block is worth is the chance that it is used again: learned apart for blocks that were
used again before and those that never were, fading with age. Age is counted in blocks handed out, so no
clock is read and an idle executor forgets nothing. Plans compared: the free segment that fits best
(nothing is lost), the cheapest single window, and pieces out of the least valuable blocks.

Decode tables grow by a block at a time: into the neighbour if that is cheap, else all of them into one
small gap after the other, so that long gaps stay long. Blocks kept clear behind each table were tried
instead and made more runs: what is kept clear splits the next table.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from flowserve.rtc import metrics
from flowserve.rtc.allocator import SegmentAllocator
from kvtransfer.runs import Run

RUN_PRICE = 0.25
"""One more run in a table, in blocks that are surely used again (ours): `tests/bench/kv_fragmentation.py`
shows runs against prefix hits. 0 evicts by age whatever it shatters."""
FIT_PRICE = 1.0
"""Of a bad fit, in prices of a run (ours): what is left over makes a later table split."""
HALF_LIFE = 0.25
"""Blocks handed out, as a part of the pool, in which what a cached block is worth halves (ours)."""
LEARNING = 0.0005
"""Weight of one block's fate in the learned chance of reuse (ours): about the last 2,000 of them."""
MIN_CHANCE = 0.005
"""Floor of that chance (ours): age decides where nothing is ever used again."""
HEAD_BONUS = 0.25
"""A table's first block is worth so much more than its last (ours): without it the others are of no use."""
GAP_BLOCKS = 64
"""Blocks for growth that one search finds (ours): 1,024 tokens of 16."""
SEARCH_BLOCKS = 16384
"""Blocks a plan looks at (ours): bounds the search in large pools to about 0.3 ms; the place moves on."""
_COLD = (1, 4)
"""Pieces are looked for among the least valuable blocks: so many times what is needed, then all (ours)."""
_MAX_EXPONENT = 256.0

Evict = Callable[[list[int]], None]
Floats = npt.NDArray[np.float64]


class Placement:
    """Every block is free, idle (cached, unreferenced) or held. Hands out the first two."""

    def __init__(self, num_blocks: int, evict: Evict, *, run_price: float = RUN_PRICE) -> None:
        """`evict` is told which idle blocks are about to be handed out, before they are."""
        self._allocator = SegmentAllocator(num_blocks)
        self._evict = evict
        self._run_price = run_price
        self._blocks = num_blocks
        self._idle = bytearray(num_blocks)
        self._idle_count = 0
        self._held = bytearray(num_blocks)
        self._reused = bytearray(num_blocks)  # used again since it was filled
        self._values = array("d", bytes(8 * num_blocks))  # of idle blocks, at `_base`; else 0
        self._gaps: list[int] = []  # blocks of small gaps that growth goes into, the next one last
        self._chance = [0.1, 0.9]  # of reuse: never reused so far, reused before
        self._age = 0  # blocks handed out
        self._base = 0  # the age that `_values` are of
        self._half_life = max(1.0, HALF_LIFE * num_blocks)
        self._cursor = 0

    # -- numbers ---------------------------------------------------------------------------------

    @property
    def free(self) -> int:
        return self._allocator.free

    @property
    def idle(self) -> int:
        return self._idle_count

    @property
    def available(self) -> int:
        """Blocks that can be handed out."""
        return self._allocator.free + self._idle_count

    @property
    def longest_free(self) -> int:
        return self._allocator.longest

    def is_idle(self, block: int) -> bool:
        return bool(self._idle[block])

    def is_free(self, block: int) -> bool:
        return self._allocator.is_free(block)

    def idle_blocks(self) -> list[int]:
        return [block for block, idle in enumerate(self._idle) if idle]

    # -- changes of state ------------------------------------------------------------------------

    def take(self, count: int) -> list[int]:
        """`count` blocks in as few runs as pays, now held. Raises ValueError where fewer are available."""
        if count > self.available:
            raise ValueError(f"{count} blocks are wanted, {self.available} are available")
        if count < 1:
            return []
        runs = self._plan(count)
        for run in runs:
            self._hold(run.start, run.count)
        self._age += count
        metrics.TABLE_RUNS.observe(len(runs))
        return [block for run in runs for block in range(run.start, run.start + run.count)]

    def take_after(self, block: int) -> int:
        """One block to grow the table that ends with `block`. Raises ValueError where none is available."""
        if not self.available:
            raise ValueError("no block is available to grow a table by")
        after = block + 1
        # A run more is cheaper than any prefix while there are blocks that hold nothing.
        limit = 0.0 if self._allocator.free else self._price()
        cheap = after < self._blocks and not self._held[after] and self._values[after] <= limit
        chosen = after if cheap else self._gap(limit)
        self._hold(chosen, 1)
        self._age += 1
        return chosen

    def revive(self, block: int) -> None:
        """An idle block was matched: held again."""
        self._learn(block, 1.0)
        self._reused[block] = 1
        self._set_held(block)

    def rest(self, blocks: Sequence[int]) -> None:
        """Held blocks of one table, in its order, that can be matched and that nobody refers to now."""
        if not blocks:
            return
        scale = self._scale()
        length = len(blocks)
        for index, block in enumerate(blocks):
            chance = max(MIN_CHANCE, self._chance[self._reused[block]])
            self._values[block] = scale * chance * (1 + HEAD_BONUS * (length - index) / length)
            self._idle[block] = 1
            self._held[block] = 0
        self._idle_count += length

    def release(self, blocks: Sequence[int]) -> None:
        """Held blocks that hold nothing worth keeping: free."""
        for start, count in _runs(sorted(blocks)):
            self._allocator.give(start, count)
            stop = start + count
            self._held[start:stop] = bytes(count)
            self._reused[start:stop] = bytes(count)

    def forget(self, block: int) -> None:
        """An idle block is idle no more, because its content was dropped: free."""
        self._set_held(block)
        self.release((block,))

    # -- inside ----------------------------------------------------------------------------------

    def _set_held(self, block: int) -> None:
        self._idle[block] = 0
        self._idle_count -= 1
        self._values[block] = 0.0
        self._held[block] = 1

    def _hold(self, start: int, count: int) -> None:
        """Free and idle blocks become held."""
        stop = start + count
        idle = [block for block in range(start, stop) if self._idle[block]]
        if idle:
            for block in idle:
                self._learn(block, 0.0)
            self._evict(idle)
            metrics.EVICTED_BLOCKS.inc(len(idle))
            self._idle_count -= len(idle)
        at = start
        while at < stop:  # the parts in between are free
            if self._idle[at]:
                at = _or(self._idle.find(0, at, stop), stop)
                continue
            end = _or(self._idle.find(1, at, stop), stop)
            self._allocator.take_at(at, end - at)
            at = end
        self._idle[start:stop] = self._reused[start:stop] = bytes(count)
        self._held[start:stop] = b"\1" * count
        self._values[start:stop] = array("d", bytes(8 * count))

    def _learn(self, block: int, reused: float) -> None:
        kind = self._reused[block]
        self._chance[kind] += LEARNING * (reused - self._chance[kind])

    def _scale(self) -> float:
        """What 1 was worth at `_base` in units of now: values are kept as of then, so none is ever faded."""
        exponent = (self._age - self._base) / self._half_life
        if exponent > _MAX_EXPONENT:
            np.frombuffer(self._values)[:] *= 2.0**-exponent
            self._base = self._age
            return 1.0
        return float(2.0**exponent)

    # -- plans -----------------------------------------------------------------------------------

    def _plan(self, count: int) -> list[Run]:
        segment = self._allocator.best_fit(count)
        if segment is not None:
            return [Run(segment.start, count)]
        for view in self._views(count):
            runs = self._cheapest(count, view)
            if runs:
                return runs
        raise AssertionError("as many blocks are available")

    def _views(self, count: int) -> Iterator[_View]:
        """Parts of the pool from the cursor on, then all of it."""
        size = max(SEARCH_BLOCKS, 4 * count)
        if size < self._blocks:
            for _ in range(-(-self._blocks // size)):
                start = min(self._cursor, self._blocks - size)
                self._cursor = (start + size) % self._blocks
                yield _View(self, start, start + size)
        yield _View(self, 0, self._blocks)

    def _gap(self, limit: float) -> int:
        """A block worth at most `limit` in a small gap, looked for so rarely that growth stays cheap."""
        while self._gaps:
            block = self._gaps.pop()
            if not self._held[block] and self._values[block] <= limit:
                return block
        if not self._idle_count:
            return self._plan(1)[0].start
        view = next(self._views(1))
        starts, lengths = view.segments(limit)
        for at in np.argsort(lengths, kind="stable"):
            first = view.start + int(starts[at])
            self._gaps.extend(range(first, first + min(int(lengths[at]), GAP_BLOCKS)))
            if len(self._gaps) >= GAP_BLOCKS:
                break
        self._gaps.reverse()
        return self._gaps.pop() if self._gaps else self._plan(1)[0].start

    def _price(self) -> float:
        return self._run_price * self._scale()

    def _cheapest(self, count: int, view: _View) -> list[Run]:
        """The cheapest plan within `view`; empty where it has too few blocks."""
        price = self._price()
        window = view.window(count, FIT_PRICE * price)
        best = None if window is None else (window[0] + price, [window[1]])
        usable = view.values[view.held == 0]
        if len(usable) < count:
            return []
        usable.sort()
        floor = float(usable[:count].sum())
        for factor in (*_COLD, len(usable)):
            if best is not None and best[0] <= floor + 2 * price:
                break  # no plan of two runs can be cheaper
            rank = factor * count
            limit = float(usable[rank - 1]) if rank < len(usable) else np.inf
            lost, runs = self._pieces(count, view, limit)
            if runs and (best is None or lost + price * len(runs) < best[0]):
                best = (lost + price * len(runs), runs)
            if limit == np.inf:
                break
        return [] if best is None else best[1]

    def _pieces(self, count: int, view: _View, limit: float) -> tuple[float, list[Run]]:
        """The longest runs of blocks worth at most `limit`, the last one cut where least is lost."""
        starts, lengths = view.segments(limit)
        if int(lengths.sum()) < count:
            return 0.0, []
        runs: list[Run] = []
        lost = 0.0
        order = np.argsort(-lengths, kind="stable")
        for index, at in enumerate(order):
            start, length = int(starts[at]), int(lengths[at])
            if length < count:
                runs.append(Run(view.start + start, length))
                lost += view.lost(start, start + length)
                count -= length
                continue
            fitting = [int(a) for a in order[index:] if lengths[a] >= count]
            cuts = [view.cut(int(starts[a]), int(lengths[a]), count) for a in fitting]
            cost, _, first = min(cuts)
            runs.append(Run(view.start + first, count))
            return lost + cost, runs
        raise AssertionError("the segments hold as many blocks as were counted")


class _View:
    """A part of the pool as arrays, with running sums."""

    def __init__(self, placement: Placement, start: int, stop: int) -> None:
        self.start = start
        self.held = np.frombuffer(placement._held, np.uint8)[start:stop]
        self.values: Floats = np.frombuffer(placement._values)[start:stop]
        self._sums: Floats = np.zeros(stop - start + 1)
        np.cumsum(self.values, out=self._sums[1:])

    def lost(self, start: int, stop: int) -> float:
        return float(self._sums[stop] - self._sums[start])

    def window(self, count: int, fit_price: float) -> tuple[float, Run] | None:
        """(what is lost, run) of the cheapest `count` blocks in a row; None if no `count` are usable.

        `fit_price`: of the most waste in the segment it is cut from, and of leaving two pieces of it.
        """
        starts, lengths = self.segments(np.inf)
        fits = lengths >= count
        starts, lengths = starts[fits], lengths[fits]
        if not len(starts):
            return None
        positions = lengths - count + 1  # in each segment
        ends = np.cumsum(positions)
        offsets = np.arange(ends[-1]) - np.repeat(ends - positions, positions)
        at = np.repeat(starts, positions) + offsets
        costs = self._sums[at + count] - self._sums[at]
        waste = 1 - count / np.repeat(lengths, positions)
        apart = (offsets > 0) & (offsets < np.repeat(positions, positions) - 1)
        best = int((costs + fit_price * (waste + apart)).argmin())
        return float(costs[best]), Run(self.start + int(at[best]), count)

    def segments(self, limit: float) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Starts (within the view) and lengths of the maximal runs of usable blocks worth at most `limit`."""
        usable = np.zeros(len(self.held) + 2, np.int8)
        usable[1:-1] = (self.held == 0) & (self.values <= limit)
        edges = np.flatnonzero(np.diff(usable))
        return edges[::2], edges[1::2] - edges[::2]

    def cut(self, start: int, length: int, count: int) -> tuple[float, int, int]:
        """(cost, waste, first block) of the cheapest `count` blocks of a segment."""
        sums = self._sums[start : start + length + 1]
        costs = sums[count:] - sums[:-count]
        best = int(costs.argmin())
        return float(costs[best]), length - count, start + best


def _or(found: int, otherwise: int) -> int:
    return otherwise if found < 0 else found


def _runs(blocks: Sequence[int]) -> list[tuple[int, int]]:
    """(start, count) of the runs of ascending `blocks`."""
    runs: list[tuple[int, int]] = []
    for block in blocks:
        if runs and block == runs[-1][0] + runs[-1][1]:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((block, 1))
    return runs
