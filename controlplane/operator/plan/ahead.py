"""Which model's weights each warm pod holds before anybody asks for them. Pure, as all plans; formula ours.

A model's chance to be the next that a pool's executor is claimed for:

    1                             a schedule of it opens within SCHEDULE_SECONDS
    2 ** (-idle / HALF_LIFE)      it was last used `idle` seconds ago
    KEPT                          at least, where a ModelCache or the pool names it

times SERVED where executors serve it: another is then fed by those (a fork), which is nearly as fast. One
that has all the executors it may have, sleepers included, has no chance. Warm pods are shared out in
proportion to the chances by the method of highest averages (D'Hondt), one model each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from controlplane.operator.plan.values import Key

HALF_LIFE_SECONDS = 3600.0
"""As the node's weight cache counts uses."""
SCHEDULE_SECONDS = 600.0
"""Ten times a slow fetch and conversion (ours)."""
KEPT = 0.1
SERVED = 0.25
LEAST = 0.01
"""A chance below it is none: used more than six hours ago."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """What is known of one model's near future."""

    key: Key
    room: int  # executors that it may still get
    idle: float | None = None  # seconds since its last use; None: not known
    opens: bool = False  # a schedule of it opens within SCHEDULE_SECONDS
    kept: bool = False  # a ModelCache or the pool names it
    served: bool = False


def chance(outlook: Outlook) -> float:
    """0 to 1."""
    if outlook.room <= 0:
        return 0.0
    used = 0.0 if outlook.idle is None else 2.0 ** (-max(0.0, outlook.idle) / HALF_LIFE_SECONDS)
    best = 1.0 if outlook.opens else max(used, KEPT if outlook.kept else 0.0)
    found = best * (SERVED if outlook.served else 1.0)
    return found if found >= LEAST else 0.0


def assign(outlooks: Sequence[Outlook], pods: Sequence[str], held: Mapping[str, Key]) -> dict[str, Key]:
    """The model of each of `pods` (uids), where there is one; who holds one of those chosen, keeps it."""
    chances = {outlook.key: chance(outlook) for outlook in outlooks}
    room = {outlook.key: outlook.room for outlook in outlooks}
    counts: Counter[Key] = Counter()
    for _ in pods:
        open_to = [key for key, value in chances.items() if value > 0 and counts[key] < room[key]]
        if not open_to:
            break
        counts[max(open_to, key=lambda key: (chances[key] / (counts[key] + 1), key))] += 1
    chosen: dict[str, Key] = {}
    for uid in pods:
        key = held.get(uid)
        if key is not None and counts[key] > 0:
            counts[key] -= 1
            chosen[uid] = key
    left = sorted(counts.elements(), key=lambda key: (-chances[key], key))
    chosen.update(zip((uid for uid in pods if uid not in chosen), left, strict=False))
    return chosen
