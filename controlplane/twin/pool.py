"""KV blocks of a simulated executor, counted: free, held by tasks, or kept as prefixes until they are needed.

The counts of `flowserve.rtc`: a prefix unit is one block or several that are matched together (the traces
name prefixes in units of 512 tokens); what ends stays cached, the end of a sequence first to go. When blocks
run short the least recently used entries are evicted, but one that was used again stays longer than one that
never was, as `flowserve.rtc.placement` values them. Only units named by a workload can be found again; the
rest of a sequence takes its place in the queue like any other cached block.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from controlplane.twin.task import Task

REUSED_STAYS = 0.8
"""How much longer an entry stays that was used again, in pools of blocks handed out: placement.py's first
guesses of reuse are 0.9 and 0.1, and what a block is worth halves in a quarter of a pool (log2(9) / 4)."""


class Pool:
    """One executor's blocks. `gone` collects evicted units for whoever reports them."""

    def __init__(self, kv_tokens: int, block_tokens: int, unit_tokens: int, *, caches: bool) -> None:
        """`caches`: whether the workload names prefixes; without any, nothing needs to be kept."""
        if unit_tokens % block_tokens:
            raise ValueError(
                f"prefix units of {unit_tokens} tokens are no multiple of blocks of {block_tokens}"
            )
        self.total = kv_tokens // block_tokens
        self.free = self.total
        self.idle_blocks = 0
        self.gone: list[int] = []
        self._block_tokens = block_tokens
        self._unit_tokens = unit_tokens
        self._unit_blocks = unit_tokens // block_tokens
        self._caches = caches
        self._refs: dict[int, int] = {}  # unit -> tasks that hold it
        # Units and other entries held by nobody -> (blocks, age they are counted as being of); oldest first.
        self._idle: OrderedDict[int, tuple[int, float]] = OrderedDict()
        self._idle_again: OrderedDict[int, tuple[int, float]] = OrderedDict()  # those that were used again
        self._again: set[int] = set()
        self._age = 0  # blocks handed out
        self._others = -1  # number of the next entry that is no unit

    @property
    def available(self) -> int:
        """Blocks an allocation can get: free now, or idle."""
        return self.free + self.idle_blocks

    def match(self, units: Sequence[int], most: int) -> int:
        """How many leading units, `most` at most, are cached."""
        refs, count = self._refs, 0
        if refs:
            for unit in units:
                if count >= most or unit not in refs:
                    break
                count += 1
        return count

    def hold(self, task: Task, match: int, reserve: int) -> bool:
        """Reserves all blocks of its tokens, the first `match` units shared; False: `reserve` would be
        touched."""
        held = list(task.units[:match])
        refs = self._refs
        blocks = -(-task.length // self._block_tokens) - match * self._unit_blocks
        woken = sum([refs[unit] == 0 for unit in held]) * self._unit_blocks
        if blocks + reserve > self.available - woken:
            return False
        for unit in held:
            if refs[unit] == 0:
                queue = self._idle_again if unit in self._again else self._idle
                self.idle_blocks -= queue.pop(unit)[0]
                self._again.add(unit)
            refs[unit] += 1
        self.take(blocks)
        task.held, task.blocks = held, blocks
        return True

    def take(self, blocks: int) -> None:
        """From what is available, evicting as needed."""
        while blocks > self.free:
            entry, (count, _) = self._oldest().popitem(last=False)
            self.idle_blocks -= count
            self.free += count
            if entry >= 0:
                del self._refs[entry]
                self._again.discard(entry)
                self.gone.append(entry)
        self.free -= blocks
        self._age += blocks

    def _oldest(self) -> OrderedDict[int, tuple[int, float]]:
        """The queue whose head goes first."""
        if not self._idle or not self._idle_again:
            return self._idle or self._idle_again
        plain, again = (next(iter(queue.values()))[1] for queue in (self._idle, self._idle_again))
        return self._idle if plain <= again else self._idle_again

    def own_blocks(self, task: Task, tokens: int) -> int:
        """Blocks beside its shared units that so many of its tokens need."""
        return -(-tokens // self._block_tokens) - len(task.held) * self._unit_blocks

    def resize(self, task: Task, tokens: int) -> None:
        """Gives back what it holds beyond `tokens`."""
        blocks = self.own_blocks(task, tokens)
        self.free += task.blocks - blocks
        task.blocks = blocks

    def commit(self, task: Task) -> list[int]:
        """Units that its computed tokens complete can be shared from now on; returns the new ones.

        One that another task committed first stays private, and so does what follows it.
        """
        held, units = task.held, task.units
        full = min(task.computed // self._unit_tokens, len(units))
        stored: list[int] = []
        for unit in units[len(held) : full]:
            if unit in self._refs:
                break
            self._refs[unit] = 1
            held.append(unit)
            task.blocks -= self._unit_blocks
            stored.append(unit)
        return stored

    def release(self, task: Task) -> None:
        """It ends, or loses its blocks: full ones stay cached, the end of the sequence first to go."""
        if self._caches:
            full = (task.length - 1) // self._block_tokens - len(task.held) * self._unit_blocks
            full = max(0, min(task.blocks, full))
            if full:
                self._idle[self._others] = (full, self._age)
                self._others -= 1
                self.idle_blocks += full
                task.blocks -= full
        self.free += task.blocks
        task.blocks = 0
        for unit in reversed(task.held):
            self._refs[unit] -= 1
            if self._refs[unit] == 0:
                if unit in self._again:
                    stays = self._age + REUSED_STAYS * self.total
                    self._idle_again[unit] = (self._unit_blocks, stays)
                else:
                    self._idle[unit] = (self._unit_blocks, self._age)
                self.idle_blocks += self._unit_blocks
        task.held = []
