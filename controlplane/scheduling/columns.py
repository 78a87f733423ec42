"""The cluster view as columns: one row an executor, so that a decision is a few passes over numbers.

Kept by whoever watches the executors (the gateway's fleet view, the twin): `put` on each change, which
touches one row; `decide` reads. Derived columns hold what every decision would compute anew. Rows are dense
and move when one leaves; an executor's *slot* stays, and is its bit in the prefix index.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from controlplane.scheduling.types import ExecutorView, Policy, Role

Floats = npt.NDArray[np.float64]

(LIMIT, ROOM, ROLE, REVISION, QUEUE, TOKEN, STEP, TASKS, FREE, TOTAL, BLOCK, RATE, QUEUED, ALL) = range(14)
"""Columns. LIMIT tokens that a sequence may have there at most, CLOSED where nothing may start; ROOM tokens
that a new task may take now (infinite where none runs); QUEUE seconds ahead of a new task; TOKEN seconds of
one prompt token; STEP seconds of one step; FREE and TOTAL blocks, of BLOCK tokens; RATE prompt tokens per
second as reported, 0 = not yet; QUEUED prompt tokens still to compute. ALL is their number."""
CLOSED = -1.0
ROLES = {Role.COLOCATED: 0.0, Role.PREFILL: 1.0, Role.DECODE: 2.0}
INF = float("inf")
FIRST_ROWS = 16


class Slots:
    """Small numbers for executors: taken at the first mention, reused after `release`."""

    def __init__(self) -> None:
        self._of: dict[str, int] = {}
        self._free: list[int] = []
        self.size = 0  # one above the highest ever given

    def take(self, te_id: str) -> int:
        slot = self._of.get(te_id)
        if slot is None:
            if self._free:
                slot = self._free.pop()
            else:
                slot, self.size = self.size, self.size + 1
            self._of[te_id] = slot
        return slot

    def get(self, te_id: str) -> int | None:
        return self._of.get(te_id)

    def release(self, te_id: str) -> None:
        slot = self._of.pop(te_id, None)
        if slot is not None:
            self._free.append(slot)

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return iter(self._of.items())


class Columns:
    """A mutable view. Not thread safe; one owner."""

    def __init__(self, policy: Policy | None = None, slots: Slots | None = None) -> None:
        self.slots = slots or Slots()
        self.views: list[ExecutorView] = []
        self.salts = np.zeros(FIRST_ROWS, dtype=np.uint64)  # fixed per executor id, for ties and affinity
        self.data = np.zeros((ALL, FIRST_ROWS))
        self.slot_of = np.zeros(FIRST_ROWS, dtype=np.intp)
        self._policy = policy or Policy()
        self._rows: dict[str, int] = {}
        self._revisions: dict[str, int] = {}
        self._rates_known = True  # every row's TOKEN is up to date

    @classmethod
    def of(cls, executors: Iterable[ExecutorView], policy: Policy) -> Columns:
        columns = cls(policy)
        for executor in executors:
            columns.put(executor)
        return columns

    def __len__(self) -> int:
        return len(self.views)

    @property
    def executors(self) -> tuple[ExecutorView, ...]:
        return tuple(self.views)

    def row(self, te_id: str) -> int | None:
        return self._rows.get(te_id)

    def executor(self, te_id: str) -> ExecutorView | None:
        row = self._rows.get(te_id)
        return None if row is None else self.views[row]

    @property
    def revisions(self) -> int:
        return len(self._revisions)

    def revision(self, name: str) -> int:
        """-1: nobody has it."""
        return self._revisions.get(name, -1)

    def put(self, view: ExecutorView) -> None:
        """Adds the executor, or replaces what was known of it."""
        row = self._rows.get(view.te_id)
        if row is None:
            row = self._new_row(view)
        self.views[row] = view
        revision = self._revisions.get(view.model_revision)
        if revision is None:
            revision = self._revisions[view.model_revision] = len(self._revisions)
        policy, total, block = self._policy, view.kv_blocks_total, max(view.block_tokens, 1)
        rate = view.prefill_tokens_per_second
        token = 1.0 / (rate or policy.default_prefill_rate)
        step = view.decode_step_seconds or policy.default_step_seconds
        closed = (
            not view.ready
            or view.draining
            or not view.link_up
            or view.tasks >= view.max_tasks
            or view.step_age_seconds > policy.max_step_age_seconds
        )
        self.data[:, row] = (
            CLOSED if closed else min(total * block or INF, view.max_model_len or INF),
            view.kv_blocks_free * block if view.tasks and total else INF,
            ROLES[view.role],
            revision,
            view.queued_tokens * token + view.tasks * step * policy.task_share,
            token,
            step,
            view.tasks,
            view.kv_blocks_free,
            total or 1,
            block,
            rate,
            view.queued_tokens,
        )
        self._rates_known = False

    def _new_row(self, view: ExecutorView) -> int:
        row = len(self.views)
        if row == self.data.shape[1]:
            self.data = np.concatenate((self.data, np.zeros_like(self.data)), axis=1)
            self.salts = np.concatenate((self.salts, np.zeros_like(self.salts)))
            self.slot_of = np.concatenate((self.slot_of, np.zeros_like(self.slot_of)))
        self._rows[view.te_id] = row
        self.views.append(view)
        self.salts[row] = _salt(view.te_id)
        self.slot_of[row] = self.slots.take(view.te_id)
        return row

    def settle(self) -> None:
        """Executors that have not told their prefill rate get the fastest told by another.

        One that only decodes tells none; with a default far from what this hardware does, it would look
        faster or slower than the prefill executor beside it. Too good a guess is corrected by its first use.
        """
        if self._rates_known:
            return
        self._rates_known = True
        data = self.data[:, : len(self.views)]
        unknown = data[RATE] == 0
        if not np.count_nonzero(unknown):
            return
        rate = float(data[RATE].max()) or self._policy.default_prefill_rate
        data[TOKEN, unknown] = 1.0 / rate
        share = self._policy.task_share
        data[QUEUE, unknown] = (
            data[QUEUED, unknown] / rate + data[TASKS, unknown] * data[STEP, unknown] * share
        )

    def remove(self, te_id: str) -> None:
        """Forgets the executor; its slot stays until the slots' owner releases it."""
        row = self._rows.pop(te_id, None)
        if row is None:
            return
        last = len(self.views) - 1
        if row != last:
            self.views[row] = self.views[last]
            self.data[:, row] = self.data[:, last]
            self.salts[row] = self.salts[last]
            self.slot_of[row] = self.slot_of[last]
            self._rows[self.views[row].te_id] = row
        self.views.pop()
        self._rates_known = False

    def by_row(self, by_slot: Floats) -> Floats:
        """What is known per slot, in the order of the rows."""
        return by_slot[self.slot_of[: len(self.views)]]


def _salt(te_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(te_id.encode(), digest_size=8).digest(), "little")


_LOW = 0xFFFF_FFFF_FFFF_FFFF


def mixed(salts: npt.NDArray[np.uint64], seed: int) -> npt.NDArray[np.uint64]:
    """A number per executor that looks random and depends on both alone (splitmix64's finalizer)."""
    x = salts ^ np.uint64(seed & _LOW)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def mixed_one(salt: int, seed: int) -> int:
    """`mixed` of one."""
    x = salt ^ (seed & _LOW)
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _LOW
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _LOW
    return x ^ (x >> 31)
