"""What others do: the policies that the twin compares ours with, each in its strongest plain form.

| name                 | placement                                                                 |
|----------------------|---------------------------------------------------------------------------|
| round-robin          | executors in turn                                                         |
| least-requests       | fewest requests in flight, as the gateway counts them                     |
| power-of-two         | the less loaded of two drawn at random                                    |
| prefix-affinity      | longest cached prefix within 1.25 x mean load, else fewest requests       |
| static-split         | all disaggregated over fixed roles: prefill by affinity, decode by count  |
| conditional-2048-0.7 | as the split, but short uncached prompts stay on the decode executor      |

Affinity is bounded as in consistent hashing with bounded loads (Mirrokni et al.). Short: fewer than
2,048 uncached tokens that are less than 0.7 of the prompt, NVIDIA Dynamo's `isl_bounding` defaults. All
see exact counts and exact cache contents, which real gateways only approximate.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from controlplane.scheduling.types import Role
from controlplane.twin.cluster import Cluster, Place
from controlplane.twin.executor import SimExecutor
from controlplane.twin.task import Task

LOAD_BOUND = 1.25
"""Load over mean up to which affinity is followed (the usual constant of consistent hashing with bounded
loads)."""
MAX_TASKS = 256
"""Tasks of one executor (EngineConfig.max_tasks)."""
CONDITIONAL_TOKENS = 2048
CONDITIONAL_SHARE = 0.7


class Baseline:
    """What all share: the counts, fixed roles, nothing to do on reports."""

    name = "baseline"

    def __init__(self, seed: int = 0) -> None:
        self._rng = random.Random(seed)
        self._cluster: Cluster
        self._inflight: list[int] = []

    def attach(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._inflight = cluster.inflight
        self._everyone = list(range(len(cluster.tes)))

    def place_decode(self, request: int, source: int, now: float) -> int | None:
        raise AssertionError(f"{self.name} disaggregates nothing")

    def reported(self, te: SimExecutor, now: float) -> None: ...
    def cached(self, te: int, stored: Sequence[int], removed: Sequence[int]) -> None: ...
    def submitted(self, te: int, task: Task, now: float) -> None: ...
    def ended(self, te: int, task: Task, now: float) -> None: ...

    def tick(self, now: float) -> Sequence[tuple[int, Role]]:
        return ()

    def _least(self) -> int | None:
        least = min(self._inflight)
        return self._inflight.index(least) if least < MAX_TASKS else None

    def _least_of(self, numbers: Sequence[int]) -> int | None:
        best = min(numbers, key=self._inflight.__getitem__)
        return best if self._inflight[best] < MAX_TASKS else None


class RoundRobin(Baseline):
    name = "round-robin"
    _turn = -1

    def place(self, request: int, now: float) -> Place | None:
        for _ in self._everyone:
            self._turn = (self._turn + 1) % len(self._inflight)
            if self._inflight[self._turn] < MAX_TASKS:
                return Place(self._turn)
        return None


class LeastRequests(Baseline):
    name = "least-requests"

    def place(self, request: int, now: float) -> Place | None:
        number = self._least()
        return None if number is None else Place(number)


class PowerOfTwo(Baseline):
    name = "power-of-two"

    def place(self, request: int, now: float) -> Place | None:
        draw = self._rng.randrange
        number = self._least_of((draw(len(self._inflight)), draw(len(self._inflight))))
        if number is None:
            number = self._least()
        return None if number is None else Place(number)


class PrefixAffinity(Baseline):
    name = "prefix-affinity"

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self._holders: dict[int, set[int]] = {}

    def cached(self, te: int, stored: Sequence[int], removed: Sequence[int]) -> None:
        for unit in stored:
            self._holders.setdefault(unit, set()).add(te)
        for unit in removed:
            holders = self._holders.get(unit)
            if holders is not None:
                holders.discard(te)
                if not holders:
                    del self._holders[unit]

    def place(self, request: int, now: float) -> Place | None:
        number = self._affine(request, self._everyone)
        return None if number is None else Place(number)

    def _affine(self, request: int, numbers: Sequence[int]) -> int | None:
        inflight = self._inflight
        units = self._cluster.units(request)
        if units and self._holders:
            bound = LOAD_BOUND * (sum([inflight[n] for n in numbers]) / len(numbers) + 1)
            near = {n for n in self._holders.get(units[0], ()) if inflight[n] < bound} & set(numbers)
            longest: set[int] = set()
            for unit in units:
                near = near & self._holders.get(unit, _NONE)
                if not near:
                    break
                longest = near
            if longest:
                number = self._least_of(sorted(longest))
                if number is not None:
                    return number
        return self._least_of(numbers)


_NONE: set[int] = set()


class StaticSplit(PrefixAffinity):
    """Fixed prefill and decode executors; roles come from the cluster."""

    name = "static-split"

    def attach(self, cluster: Cluster) -> None:
        super().attach(cluster)
        self._prefill = [te.number for te in cluster.tes if te.role is Role.PREFILL]
        self._decode = [te.number for te in cluster.tes if te.role is Role.DECODE]
        if not self._prefill or not self._decode:
            raise ValueError(f"{self.name} needs prefill and decode executors")

    def place(self, request: int, now: float) -> Place | None:
        number = self._affine(request, self._prefill)
        return None if number is None else Place(number, disaggregated=True)

    def place_decode(self, request: int, source: int, now: float) -> int | None:
        return self._least_of(self._decode)


class Conditional(StaticSplit):
    name = "conditional-2048-0.7"

    def place(self, request: int, now: float) -> Place | None:
        number = self._affine(request, self._decode)
        if number is not None:
            cluster = self._cluster
            prompt = cluster.prompt(request)
            uncached = prompt - min(cluster.tes[number].matched(cluster.units(request)), prompt - 1)
            if uncached < CONDITIONAL_TOKENS and uncached / prompt < CONDITIONAL_SHARE:
                return Place(number)
        return super().place(request, now)


COLOCATED: tuple[Callable[[int], Baseline], ...] = (RoundRobin, LeastRequests, PowerOfTwo, PrefixAffinity)
SPLIT: tuple[Callable[[int], Baseline], ...] = (StaticSplit, Conditional)


def split_roles(count: int, prefill: int) -> list[Role]:
    """`prefill` prefill executors, the others decode. Raises ValueError for a ratio that leaves a side
    empty."""
    if not 0 < prefill < count:
        raise ValueError(f"{prefill} prefill executors of {count} leave one side empty")
    return [Role.PREFILL] * prefill + [Role.DECODE] * (count - prefill)
