"""Filter, choose the mode, score, pick: a few passes over the columns of the view.

`decide` places a new (or replayed) task, `decide_decode` the decode task of a finished prefill. DeepServe's
combined policy (section 5) with its three parts as one estimate in seconds: a candidate costs the queue in
front of it plus the prompt's uncached part at its own rate, so that a cached prefix counts for exactly what
it saves. The choice between unified and split looks at uncached tokens, the heat map and, where the paper's
policy loses, at load. Decode executors are chosen late because load has moved on by then.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from controlplane.scheduling import columns as c
from controlplane.scheduling.columns import Columns, Floats, mixed, mixed_one
from controlplane.scheduling.prefix import Matches
from controlplane.scheduling.types import (
    MAX_TOLD,
    ClusterView,
    Decision,
    Draw,
    Drop,
    ExecutorView,
    Mode,
    Policy,
    PolicyName,
    Reason,
    RequestView,
    Role,
    Terms,
    Unplaceable,
)

Mask = npt.NDArray[np.bool_]


def decide(
    view: ClusterView | Columns, request: RequestView, policy: Policy, draw: Draw | None = None
) -> Decision | Unplaceable:
    """Where the task runs first. Never raises; the same arguments give the same answer."""
    look = _Look(view, request, policy, draw or Draw())
    fit = look.fit(decode=False)
    if fit is None:
        return look.unplaceable()
    heat: float | None = None
    reason = "unified asked for" if request.unified_only else "no prefill executor is fit"
    prefills = fit & look.role(Role.PREFILL)
    if not request.unified_only and np.count_nonzero(prefills):
        decoders = look.open & look.has_room(decode=True)
        row = look.pick(prefills)
        uncached = request.tokens - int(look.cached[row])
        reason, heat = look.split_or_not(row, fit, decoders, uncached)
        if reason in _SPLITS:
            return look.decision(Mode.DISAGGREGATED, row, prefills, reason, heat)
    candidates = look.unified(fit, short=reason in _WHOLE_AT_DECODE)
    return look.decision(Mode.UNIFIED, look.pick(candidates), candidates, reason, heat)


def decide_decode(
    view: ClusterView | Columns, request: RequestView, policy: Policy, draw: Draw | None = None
) -> Decision | Unplaceable:
    """Where the KV of a finished prefill goes. Put the prefill's executor into `request.never`.

    Decode and colocated executors are candidates; prefill ones only if there is no other.
    """
    look = _Look(view, request, policy, draw or Draw())
    fit = look.fit(decode=True)
    if fit is None:
        return look.unplaceable(decode=True)
    if policy.name is PolicyName.COMBINED:
        candidates = fit & ~look.role(Role.PREFILL)  # a colocated one may be the less loaded
    else:
        candidates = fit & look.role(Role.DECODE)
    if not np.count_nonzero(candidates):
        candidates = fit & look.role(Role.COLOCATED)
    if not np.count_nonzero(candidates):
        candidates = fit
    row = look.pick_decode(candidates)
    return look.decision(Mode.DISAGGREGATED, row, candidates, "least pressure", None, decode=True)


FEW = 12
"""Rows up to which a loop is faster than numpy (measured)."""
COLOCATED_PRESSURE = 1.25
"""Steps of executors that do not prefer decoding carry prefills too: by so much they must be less loaded
(ours)."""
SHORT = "short uncached prompt"
GUARD = "run whole it starts sooner"
MAP_AGAINST = "heat map: run whole"
MAP_FOR = "heat map: split"
BOTH_FIT = "both roles fit"
NO_DECODE = "no decode executor is fit"
_SPLITS = (BOTH_FIT, MAP_FOR)
_WHOLE_AT_DECODE = (SHORT, GUARD, MAP_AGAINST)


class _Look:
    """One decision's work: masks and costs over the rows, each computed once."""

    def __init__(self, view: ClusterView | Columns, request: RequestView, policy: Policy, draw: Draw) -> None:
        table = view if isinstance(view, Columns) else Columns.of(view.executors, policy)
        table.settle()
        self.table, self.request, self.policy, self.draw = table, request, policy, draw
        self.data = table.data[:, : len(table)]
        self.cached = self._cached()
        self.all_fit = False
        self.held_back = False  # somebody is fit but for the length of its queue
        self._roles: dict[Role, Mask] = {}
        self._cost: Floats | None = None
        self._pressure: Floats | None = None

    # -- filter ----------------------------------------------------------------------------------------

    def fit(self, *, decode: bool) -> Mask | None:
        """Rows that can take the task now, those to be avoided only if there is no other. None: nobody."""
        data, request = self.data, self.request
        if not len(self.table):
            return None
        usable = data[c.LIMIT] >= request.tokens
        if self.table.revisions > 1 or self.table.revision(request.model_revision) < 0:
            usable &= data[c.REVISION] == self.table.revision(request.model_revision)
        for te_id in request.never:
            row = self.table.row(te_id)
            if row is not None:
                usable[row] = False
        self.open = usable  # but for room, which the two halves need differently
        fit = usable & self.has_room(decode=decode)
        if not np.count_nonzero(fit):
            return None
        policy = self.policy
        if (policy.hold_seconds or policy.hold_step_seconds) and not decode:
            if policy.hold_seconds:
                fit &= data[c.QUEUED] * data[c.TOKEN] <= policy.hold_seconds
            if not np.count_nonzero(fit) or self._decoders_slow():
                self.held_back = True
                return None
        self.all_fit = not request.excluded and np.count_nonzero(fit) == len(self.table)
        if request.excluded:
            others = fit.copy()
            for te_id in request.excluded:
                row = self.table.row(te_id)
                if row is not None:
                    others[row] = False
            if np.count_nonzero(others):
                fit = others
        return self._sampled(fit)

    def _decoders_slow(self) -> bool:
        """All executors that prefer decoding take long steps: who starts now slows everyone there."""
        bound = self.policy.hold_step_seconds
        decoders = self.open & self.role(Role.DECODE)
        if not bound or not np.count_nonzero(decoders):
            return False
        quick = (self.data[c.STEP] <= bound) | (self.data[c.TASKS] == 0)
        return not np.count_nonzero(decoders & quick)

    def has_room(self, *, decode: bool) -> Mask:
        request = self.request
        grow = min(request.output_left, self.policy.decode_growth_tokens) if decode else 1
        return self.data[c.ROOM] >= request.tokens + grow  # type: ignore[no-any-return]  # numpy

    def _sampled(self, fit: Mask) -> Mask:
        """Power of k: the k that a seeded shuffle puts first, and whoever caches the prompt."""
        k = self.policy.sample
        if not k or np.count_nonzero(fit) <= k:
            return fit
        order = mixed(self.table.salts[: len(self.table)], self.draw.seed)
        order[~fit] = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
        kept = np.zeros(len(self.table), dtype=bool)
        kept[np.argpartition(order, k)[:k]] = True
        return fit & (kept | (self.cached > 0))

    def role(self, role: Role) -> Mask:
        mask = self._roles.get(role)
        if mask is None:
            mask = self._roles[role] = self.data[c.ROLE] == c.ROLES[role]
        return mask

    def _cached(self) -> Floats:
        table, known = self.table, self.request.cached_tokens
        if isinstance(known, Matches) and known.slots is table.slots:
            found = table.by_row(known.by_slot())
        else:
            found = np.zeros(len(table))
            for te_id, tokens in known.items():
                row = table.row(te_id)
                if row is not None:
                    found[row] = tokens
        return np.minimum(found, self.request.tokens)

    # -- mode ------------------------------------------------------------------------------------------

    def split_or_not(self, row: int, fit: Mask, decoders: Mask, uncached: int) -> tuple[str, float | None]:
        """Why the task is split, with `row` for its prefill, or run whole; and the heat map's opinion."""
        request, policy = self.request, self.policy
        combined = policy.name is PolicyName.COMBINED
        partners = self.role(Role.DECODE)
        if combined:
            partners = partners | self.role(Role.COLOCATED)
        elsewhere = decoders & partners
        if request.excluded:
            for te_id in request.excluded:
                other = self.table.row(te_id)
                if other is not None:
                    elsewhere[other] = False
        if not np.count_nonzero(elsewhere):
            return NO_DECODE, None
        if uncached < policy.min_uncached_tokens:
            return SHORT, None
        heat = None
        if policy.heat_map is not None:
            expected = request.predicted_output or request.output_left
            heat = policy.heat_map.value(uncached, expected)
            if heat is not None and heat < 0:
                return MAP_AGAINST, heat
        if combined:
            cost = self.prefill_cost()
            if float(cost[row]) <= policy.guard_seconds:
                return (BOTH_FIT, None) if heat is None else (MAP_FOR, heat)
            # Rates told after short prompts are low: what is compared is queues and caches, at one rate.
            slower = np.maximum(self.data[c.TOKEN], self.data[c.TOKEN, row])
            whole = self.data[c.QUEUE] + (request.tokens - self.cached) * slower
            whole = np.where(fit & partners, whole, c.INF)
            bound = float(whole[whole.argmin()]) * policy.guard_ratio + policy.guard_seconds
            if float(cost[row]) > bound:
                return GUARD, heat
        return (BOTH_FIT, None) if heat is None else (MAP_FOR, heat)

    def unified(self, fit: Mask, *, short: bool) -> Mask:
        """Colocated executors first. A short prompt beside a P/D pair goes where decoding happens anyway;
        the combined policy lets decode executors help where the colocated ones have nothing over them."""
        colocated = fit & self.role(Role.COLOCATED)
        if self.policy.name is PolicyName.COMBINED:
            if short or (not self.request.unified_only and np.count_nonzero(colocated)):
                colocated = fit & ~self.role(Role.PREFILL)
        elif short and not np.count_nonzero(colocated):
            colocated = fit & self.role(Role.DECODE)
        return colocated if np.count_nonzero(colocated) else fit

    # -- scores ----------------------------------------------------------------------------------------

    def prefill_cost(self) -> Floats:
        """Estimated seconds until the first token: the queue, then the uncached prompt."""
        if self._cost is None:
            self._cost = self.data[c.QUEUE] + (self.request.tokens - self.cached) * self.data[c.TOKEN]
        return self._cost

    def pressure(self) -> Floats:
        """Of a decode: the step it joins, over the share of KV left when it has grown as predicted."""
        if self._pressure is not None:
            return self._pressure
        data, request = self.data, self.request
        needed = np.ceil((request.tokens + (request.predicted_output or 0)) / data[c.BLOCK])
        share = np.minimum(np.maximum(data[c.FREE] - needed, 1) / data[c.TOTAL], 1.0)
        mixed_steps = np.where(self.role(Role.DECODE), 1.0, COLOCATED_PRESSURE)
        self._pressure = data[c.STEP] * (data[c.TASKS] + 1) / share * mixed_steps
        return self._pressure

    def pick(self, candidates: Mask) -> int:
        """Row of the best for a prefill or a whole task."""
        policy, request = self.policy, self.request
        if policy.name is PolicyName.ROUND_ROBIN and not self._prefers(candidates):
            return self._turn(candidates)
        if request.prefer is not None or policy.name is PolicyName.PREFIX_AFFINITY:
            queue = np.where(candidates, self.data[c.QUEUE], c.INF)
            bound = float(queue.min()) * policy.affinity_slack_ratio + policy.affinity_slack_seconds
            row = self.table.row(request.prefer) if request.prefer is not None else None
            if row is not None and candidates[row] and queue[row] <= bound:
                return row
        if policy.name is PolicyName.ROUND_ROBIN:
            return self._turn(candidates)
        if policy.name is PolicyName.PREFIX_AFFINITY:
            near = np.where(queue <= bound, self.cached, -1.0)
            candidates = near == near.max()
        cost = np.where(candidates, self.prefill_cost(), c.INF)
        best = int(cost.argmin())
        slack = 0.0
        if policy.name is PolicyName.COMBINED and request.affinity is not None:
            slack = policy.tie_share * request.tokens * float(self.data[c.TOKEN, best])
        return self._among((cost <= cost[best] + slack).nonzero()[0], affine=slack > 0)

    def pick_decode(self, candidates: Mask) -> int:
        policy, request = self.policy, self.request
        row = self.table.row(request.prefer) if request.prefer is not None else None
        preferred = row is not None and bool(candidates[row])
        if policy.name is PolicyName.ROUND_ROBIN and not preferred:
            return self._turn(candidates)
        score = np.where(candidates, self.pressure(), c.INF)
        least = float(score.min())
        bound = least * policy.affinity_slack_ratio + policy.affinity_slack_seconds
        if preferred and row is not None and score[row] <= bound:
            return row
        return self._among((score == least).nonzero()[0], affine=False)

    def _prefers(self, candidates: Mask) -> bool:
        row = self.table.row(self.request.prefer) if self.request.prefer is not None else None
        return row is not None and bool(candidates[row])

    def _among(self, rows: npt.NDArray[np.intp], *, affine: bool) -> int:
        """Of equals: the one that the prompt hashes to (each gateway finds the same), else a seeded draw."""
        if len(rows) == 1:
            return int(rows[0])
        seed = self.request.affinity if affine and self.request.affinity is not None else self.draw.seed
        salts = self.table.salts
        if len(rows) <= FEW:
            return int(min(rows.tolist(), key=lambda row: mixed_one(int(salts[row]), seed)))
        return int(rows[mixed(salts[rows], seed).argmin()])

    def _turn(self, candidates: Mask) -> int:
        views = self.table.views
        ordered = sorted(np.flatnonzero(candidates).tolist(), key=lambda row: views[row].te_id)
        return int(ordered[self.draw.turn % len(ordered)])

    # -- answers ---------------------------------------------------------------------------------------

    def decision(
        self, mode: Mode, row: int, candidates: Mask, reason: str, heat: float | None, *, decode: bool = False
    ) -> Decision:
        chosen = self.table.views[row]
        rows = candidates.nonzero()[0]
        cost = self.pressure() if decode else self.prefill_cost()
        told = [int(r) for r in (rows if len(rows) <= MAX_TOLD else self._tops(rows, cost))]
        if row not in told:
            told.append(row)
        data = self.data
        terms = {}
        for r in told:
            cached = int(self.cached[r])
            token = float(data[c.TOKEN, r])
            terms[self.table.views[r].te_id] = (
                Terms(0.0, 0.0, float(cost[r]), cached)
                if decode
                else Terms(float(data[c.QUEUE, r]), (self.request.tokens - cached) * token, 0.0, cached)
            )
        dropped = self._dropped(candidates, decode=decode)
        cached = int(self.cached[row])
        return Decision(
            mode, chosen.te_id, chosen.incarnation, cached, reason, terms, dropped, len(rows), heat
        )

    def _tops(self, rows: npt.NDArray[np.intp], cost: Floats) -> list[int]:
        tops = [rows[cost[rows].argmin()], rows[self.data[c.QUEUE, rows].argmin()]]
        if self.cached[longest := self.cached.argmax()] and longest in rows:
            tops.append(longest)
        return list(dict.fromkeys(map(int, tops)))

    def _dropped(self, candidates: Mask, *, decode: bool) -> dict[str, Drop]:
        told: dict[str, Drop] = {}
        if self.all_fit:
            return told
        for row in (~(self.open & self.has_room(decode=decode))).nonzero()[0][:MAX_TOLD].tolist():
            view = self.table.views[row]
            why = dropped_for(view, self.request, self.policy, decode=decode)
            if why is not None:
                told[view.te_id] = why
        for te_id in self.request.excluded:
            row_of = self.table.row(te_id)
            if row_of is not None and not candidates[row_of] and te_id not in told:
                told[te_id] = Drop.EXCLUDED
        return told

    def unplaceable(self, *, decode: bool = False) -> Unplaceable:
        """Nobody: each is asked why, as that decides between waiting and giving up."""
        if self.held_back:
            return Unplaceable(Reason.BUSY, {v.te_id: Drop.HELD_BACK for v in self.table.views[:MAX_TOLD]})
        dropped: dict[str, Drop] = {}
        reasons: set[Drop] = set()
        for view in self.table.views:
            why = dropped_for(view, self.request, self.policy, decode=decode)
            if why is not None:
                reasons.add(why)
                if len(dropped) < MAX_TOLD:
                    dropped[view.te_id] = why
        if any(why.passes for why in reasons):
            return Unplaceable(Reason.BUSY, dropped)
        too_large = Drop.TOO_LARGE in reasons
        return Unplaceable(Reason.TOO_LARGE if too_large else Reason.NO_EXECUTOR, dropped)


def queue_seconds(executor: ExecutorView, policy: Policy, fastest: float = 0.0) -> float:
    """Estimated seconds of work ahead of a new task; every live task counts a share of a step.

    `fastest`: the highest rate that any executor of the group told, assumed of one that told none."""
    rate = executor.prefill_tokens_per_second or fastest or policy.default_prefill_rate
    step = executor.decode_step_seconds or policy.default_step_seconds
    return executor.queued_tokens / rate + executor.tasks * step * policy.task_share


def dropped_for(
    executor: ExecutorView, request: RequestView, policy: Policy, *, decode: bool = False
) -> Drop | None:
    """Why the executor cannot take the task now; None if it can. Says what `decide` filters by."""
    need = request.tokens + (min(request.output_left, policy.decode_growth_tokens) if decode else 1)
    if not executor.ready:
        return Drop.NOT_READY
    if executor.model_revision != request.model_revision:
        return Drop.REVISION
    if executor.draining:
        return Drop.DRAINING
    if not executor.link_up:
        return Drop.LINK
    if executor.step_age_seconds > policy.max_step_age_seconds:
        return Drop.HUNG
    if executor.te_id in request.never:
        return Drop.EXCLUDED
    if executor.kv_blocks_total and _blocks(executor, request.tokens) > executor.kv_blocks_total:
        return Drop.TOO_LARGE
    if executor.max_model_len and request.tokens > executor.max_model_len:
        return Drop.TOO_LARGE
    if executor.tasks >= executor.max_tasks:
        return Drop.TASKS_FULL
    # An executor without tasks takes whatever its pool can hold, or nothing would ever start there.
    if executor.tasks and executor.kv_blocks_total and _blocks(executor, need) > executor.kv_blocks_free:
        return Drop.KV_FULL
    return None


def _blocks(executor: ExecutorView, tokens: int) -> int:
    return -(-tokens // max(executor.block_tokens, 1))
