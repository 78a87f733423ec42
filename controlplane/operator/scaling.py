"""The scaling loop: reads demand and load, wakes from zero (activator), follows the load (autoscaler).

Two writers with two names: the activator owns the step from zero to one, the autoscaler everything else; both
write `spec.replicas` of RoleScalers and nothing more. What somebody else wrote there is left alone.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from deepflow.v1 import common_pb2
from pydantic import ValidationError
from redis.exceptions import RedisError

from controlplane.api.resources.modelserving import MAX_HISTORY, ModelServing, Role, ScalingMode, Targets
from controlplane.api.resources.names import (
    ANNOTATION_PAUSED,
    ANNOTATION_RESUME,
    OWNER_ACTIVATOR,
    OWNER_AUTOSCALER,
    PodState,
    Reason,
)
from controlplane.fleet import autoscale, cron
from controlplane.fleet.autoscale import Autoscaler, Bounds, Change, ScalePolicy, Signals, Window
from controlplane.fleet.demand import Demand, DemandReader
from controlplane.fleet.loads import DEFAULT_STEP_SECONDS, loads_of
from controlplane.kube.client import Conflict, KubeError, NotFound
from controlplane.kube.resources import MODEL_SERVINGS, ROLE_SCALERS, Json, Key, key_of, uid_of, version_of
from controlplane.operator import metrics, scalers
from controlplane.operator.cluster import Cluster
from controlplane.operator.plan.values import Pod, TeState
from controlplane.operator.pods import format_time, profile
from controlplane.operator.scalers import ScalingState
from controlplane.scheduling.types import ExecutorView
from controlplane.scheduling.types import Role as TaskRole

YIELD_EVERY = 20
MAX_EXECUTOR_TASKS = 256  # of an executor that does not say (its default)

log = logging.getLogger(__name__)


def model_key(key: Key) -> str:
    """What gateways call a ModelServing in their reports."""
    return f"{key[0]}/{key[1]}"


@dataclass(slots=True)
class _Model:
    """What the loop remembers of one ModelServing."""

    uid: str
    version: str = ""
    serving: ModelServing | None = None
    policy: ScalePolicy | None = None
    scaler: Autoscaler = field(default_factory=Autoscaler)
    zero_since: float | None = None  # demand's clock, when it was first seen at zero
    wake_began: float | None = None
    advised: tuple[tuple[Role, int], ...] = ()


class ScalingLoop:
    """`run` until cancelled; a failure of one model is reported and does not stop the others."""

    def __init__(self, cluster: Cluster, reader: DemandReader | None) -> None:
        self._cluster = cluster
        self._reader = reader
        self._wall = cluster.wall
        self._models: dict[Key, _Model] = {}
        self._counts: dict[str, Mapping[str, Mapping[int, int]]] = {}  # gateway+kind -> model -> counts
        self._wake = asyncio.Event()
        self._failed = False

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            if self._reader is not None:
                group.create_task(self._reader.follow(lambda _: self._wake.set()), name="demand-hints")
            group.create_task(self._loop(), name="scaling")

    async def _loop(self) -> None:
        settings = self._cluster.settings
        next_scale = 0.0
        while True:
            self._wake.clear()
            demand = await self._read()
            now = time.monotonic()
            scale = now >= next_scale
            if scale:
                next_scale = now + settings.scale_seconds
            await self.turn(demand, scale=scale)
            try:
                async with asyncio.timeout(settings.demand_seconds):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def _read(self) -> Demand | None:
        """None while Redis cannot be reached: then nobody is woken, and nobody goes to zero."""
        if self._reader is None:
            return None
        try:
            demand = await self._reader.read()
        except (RedisError, OSError, TimeoutError) as error:
            metrics.DEMAND_READS.labels("failed").inc()
            if not self._failed:
                log.warning("demand cannot be read: %s", error)
            self._failed = True
            return None
        metrics.DEMAND_READS.labels("ok").inc()
        self._failed = False
        return demand

    async def turn(self, demand: Demand | None, *, scale: bool = True) -> None:
        """One look at all models."""
        self._cluster.demand = demand
        fresh = self._answers(demand) if scale else {}
        keys = set()
        for number, obj in enumerate(self._cluster.servings):
            if number % YIELD_EVERY == 0:
                await asyncio.sleep(0)  # a thousand models are looked at in one turn
            key = key_of(obj)
            keys.add(key)
            if obj["metadata"].get("deletionTimestamp"):
                continue
            try:
                await self._model(key, obj, demand, fresh.get(model_key(key), ({}, {})), scale=scale)
            except KubeError as error:
                level = logging.DEBUG if isinstance(error, Conflict) else logging.WARNING
                log.log(level, "scaling %s: %s", model_key(key), error)
                await self._refresh(key)
            except Exception:  # a task boundary: one model's failure is reported
                log.exception("scaling %s failed", model_key(key))
        for key in self._models.keys() - keys:
            del self._models[key]
            self._cluster.scaling.pop(key, None)

    async def _refresh(self, key: Key) -> None:
        for obj in self._cluster.scalers.by("serving", model_key(key)):
            try:
                await self._cluster.refresh(ROLE_SCALERS, self._cluster.scalers, key_of(obj), uid_of(obj))
            except KubeError as error:
                log.debug("%s cannot be read: %s", key_of(obj), error)

    async def _model(
        self,
        key: Key,
        obj: Json,
        demand: Demand | None,
        answers: tuple[Mapping[int, int], Mapping[int, int]],
        *,
        scale: bool,
    ) -> None:
        model = self._remember(key, obj)
        serving, policy = model.serving, model.policy
        if serving is None or policy is None or serving.metadata.annotations.get(ANNOTATION_PAUSED) == "true":
            return
        found = {role: self._cluster.scaler(key, role) for role, _ in serving.spec.roles.items()}
        objects = {role: scaler for role, scaler in found.items() if scaler is not None}
        if len(objects) < len(found):
            return  # being made
        replicas = {role: scalers.replicas_of(scaler) for role, scaler in objects.items()}
        if not scale and any(replicas.values()) and model.wake_began is None:
            model.zero_since = None
            return  # between two looks at the load only zero matters
        state = self._cluster.scaling.setdefault(key, ScalingState())
        overridden = scalers.overrides(self._cluster, key, serving, self._wall())
        pods = self._cluster.pods_of_serving(key)
        if await self._activate(key, obj, model, serving, demand=demand, objects=objects,
                                overridden=overridden, replicas=replicas, pods=pods):  # fmt: skip
            return
        if not scale:
            return
        mode = serving.spec.scaling.mode
        signals = self._signals(key, policy, demand, replicas=replicas, pods=pods, answers=answers)
        decision = model.scaler.step(policy, signals)
        recommended = {Role(role.value): count for role, count in decision.wanted.items()}
        changed = (state.signals, state.at_limit, state.recommended) != (
            decision.signals, decision.at_limit, recommended
        )  # fmt: skip
        state.signals, state.at_limit, state.recommended = decision.signals, decision.at_limit, recommended
        if changed:
            self._cluster.on_serving(key)
        if mode is ScalingMode.MANUAL:
            return
        free = [change for change in decision.changes if Role(change.role.value) not in overridden]
        if mode is ScalingMode.ADVISORY:
            advice = tuple((Role(change.role.value), change.after) for change in free)
            if advice != model.advised:
                model.advised = advice
                await self._history(obj, free, advisory=True, by="autoscaler")
            return
        at_zero = not any(replicas.values())
        done: list[Change] = []
        for change in free:
            role = Role(change.role.value)
            manager = OWNER_ACTIVATOR if at_zero else OWNER_AUTOSCALER
            await scalers.set_replicas(self._cluster, objects[role], change.after, manager, clear_resume=True)
            metrics.SCALINGS.labels(change.cause.value, "false").inc()
            done.append(change)
        changed_roles = {Role(change.role.value) for change in free}
        for role, scaler in objects.items():  # given back by hand or by time, with nothing to change
            given_back = ANNOTATION_RESUME in (scaler["metadata"].get("annotations") or {})
            over = scalers.replicas_owner(scaler) not in {"", *scalers.OURS} and role not in overridden
            if (given_back or over) and role not in changed_roles:
                await scalers.set_replicas(
                    self._cluster, scaler, replicas[role], OWNER_AUTOSCALER, clear_resume=True
                )
        if done:
            await self._history(obj, done, advisory=False, by="autoscaler")

    # -- the activator -------------------------------------------------------------------------------------

    async def _activate(
        self, key: Key, obj: Json, model: _Model, serving: ModelServing, *, demand: Demand | None,
        objects: Mapping[Role, Json], overridden: Mapping[Role, Json], replicas: Mapping[Role, int],
        pods: list[Pod],
    ) -> bool:  # fmt: skip
        """0 -> 1. True if it acted; its next step is seen at the next turn."""
        state = self._cluster.scaling[key]
        serves = any(pod.serves for pod in pods)
        if model.wake_began is not None and serves:
            self._woken(model, state, pods)
            self._cluster.on_serving(key)
        if any(replicas.values()):
            model.zero_since = None
            return False
        state.waking = False
        if demand is None:
            return False
        if model.zero_since is None:
            model.zero_since = demand.now
        last = demand.last.get(model_key(key))
        held = demand.held(model_key(key))
        if not held and (last is None or last <= model.zero_since):
            return False
        # Zero that somebody set in Auto mode is his word; where others set all counts, it only means idle.
        if overridden and serving.spec.scaling.mode is not ScalingMode.MANUAL:
            return False
        waits = f"{held} requests wait" if held else "a request came"
        # Said first: a wake that is cut off between two roles is one all the same (the autoscaler ends it).
        model.wake_began = self._wall()
        state.waking = True
        asleep = any(pod.state is PodState.ASLEEP for pod in pods)
        path = "wake" if asleep else "warm" if self._warm(key, serving) else "cold"
        state.wake = {"startedAt": format_time(self._wall()), "path": path, "progress": 0.0}
        changes = []
        for role, scaler in objects.items():
            await scalers.set_replicas(self._cluster, scaler, 1, OWNER_ACTIVATOR)
            changes.append(Change(TaskRole(role.value), 0, 1, autoscale.Cause.QUEUE_TIME, waits))
        model.zero_since = None
        metrics.ACTIVATIONS.inc()
        self._cluster.events.record(
            obj,
            MODEL_SERVINGS.kind,
            MODEL_SERVINGS.api_version,
            Reason.ACTIVATED.value,
            waits,
        )
        await self._history(obj, changes, advisory=False, by="activator", reason=Reason.ACTIVATED.value)
        self._cluster.on_serving(key)
        return True

    def _woken(self, model: _Model, state: ScalingState, pods: list[Pod]) -> None:
        took = round(self._wall() - (model.wake_began or self._wall()), 1)
        model.wake_began = None
        state.waking = False
        began = state.wake or {"startedAt": format_time(self._wall()), "path": "warm"}
        told = next((pod.te.start_path for pod in pods if pod.serves and pod.te is not None), "")
        path = began["path"] if began["path"] == "cold" else told or began["path"]
        state.wake = {**began, "path": path, "seconds": took, "progress": 1.0}

    def _warm(self, key: Key, serving: ModelServing) -> bool:
        return any(
            pod.state is PodState.WARM and pod.ready
            for pool in self._cluster.pools_of(
                key[0], profile(serving.spec.accelerator, serving.spec.engine.value)
            )
            for pod in self._cluster.warm_pods((key[0], pool["metadata"]["name"]))
        )

    # -- signals -------------------------------------------------------------------------------------------

    def _remember(self, key: Key, obj: Json) -> _Model:
        model = self._models.get(key)
        if model is None or model.uid != uid_of(obj):
            model = self._models[key] = _Model(uid_of(obj))
        if model.version != version_of(obj):
            model.version = version_of(obj)
            try:
                model.serving = ModelServing.model_validate(obj)
                model.policy = policy_of(model.serving)
            except (ValidationError, cron.BadCron) as error:
                log.warning("%s: %s", model_key(key), error)
                model.policy = None
        return model

    def _signals(
        self,
        key: Key,
        policy: ScalePolicy,
        demand: Demand | None,
        *,
        replicas: Mapping[Role, int],
        pods: list[Pod],
        answers: tuple[Mapping[int, int], Mapping[int, int]],
    ) -> Signals:
        views: list[ExecutorView] = []
        ready: Counter[TaskRole] = Counter()
        running = 0
        for pod in pods:
            if pod.te is not None and pod.te.state in (TeState.READY, TeState.DRAINING):
                running += pod.te.tasks
            report = self._cluster.executors.load_report(pod.uid)
            if not pod.serves or pod.role is None:
                continue
            ready[TaskRole(pod.role.value)] += 1
            if report is not None:
                views.append(view_of(pod, report))
        targets = self._targets(key)
        loads = loads_of(
            views,
            queue_seconds=targets.queue_seconds,
            step_seconds=policy.tpot or DEFAULT_STEP_SECONDS,
            kv_target=targets.kv_utilization,
        )
        name = model_key(key)
        last = demand.last.get(name) if demand is not None else None
        held = demand.held(name) if demand is not None else None
        return Signals(
            now=self._wall(),
            replicas={TaskRole(role.value): count for role, count in replicas.items()},
            ready=ready,
            score=loads.score,
            ttft=answers[0],
            tpot=answers[1],
            idle=max(0.0, demand.now - last) if demand is not None and last is not None else None,
            held=1 if held is None else held,  # unknown: nobody goes to zero
            running=running,
            tasks={role: count + (held or 0) for role, count in loads.tasks.items()} if views else None,
            kv=loads.kv,
        )

    def _targets(self, key: Key) -> Targets:
        serving = self._models[key].serving
        return serving.spec.scaling.targets if serving is not None else Targets()

    def _answers(self, demand: Demand | None) -> dict[str, tuple[dict[int, int], dict[int, int]]]:
        """Answers since the last look, by model: (first tokens, further tokens), by bucket."""
        fresh: dict[str, tuple[dict[int, int], dict[int, int]]] = {}
        if demand is None:
            return fresh
        counts: dict[str, Mapping[str, Mapping[int, int]]] = {}
        for gateway, report in demand.gateways.items():
            for index, (kind, histograms) in enumerate((("ttft", report.ttft), ("tpot", report.tpot))):
                name = f"{gateway}|{kind}"
                counts[name] = histograms
                before = self._counts.get(name)
                if before is None:
                    continue  # its whole past, at our start: not "since the last look"
                for model, buckets in histograms.items():
                    mine = fresh.setdefault(model, ({}, {}))[index]
                    for bucket, count in buckets.items():
                        more = count - before.get(model, {}).get(bucket, 0)
                        if more > 0:
                            mine[bucket] = mine.get(bucket, 0) + more
        self._counts = counts
        return fresh

    # -- history -------------------------------------------------------------------------------------------

    async def _history(
        self, obj: Json, changes: list[Change], *, advisory: bool, by: str, reason: str = ""
    ) -> None:
        """Puts the changes in front of status.scalingHistory, which the autoscaler's name owns."""
        if not changes:
            return
        fresh = self._cluster.servings.get(key_of(obj)) or obj
        now = format_time(self._wall())
        added = [
            {
                "time": now,
                "role": change.role.value,
                "from": change.before,
                "to": change.after,
                "reason": reason or change.cause.value,
                "message": change.message[:1024],
                "by": by,
                "advisory": advisory,
            }
            for change in changes
        ]
        kept = (fresh.get("status") or {}).get("scalingHistory") or []
        meta = {"namespace": fresh["metadata"].get("namespace", ""), "name": fresh["metadata"]["name"]}
        body = {"metadata": meta, "status": {"scalingHistory": [*added, *kept][:MAX_HISTORY]}}
        try:
            written = await self._cluster.api.apply(
                MODEL_SERVINGS, body, manager=OWNER_AUTOSCALER, force=True, subresource="status"
            )
        except NotFound:
            return
        written["metadata"].pop("managedFields", None)
        self._cluster.servings.assume(written)


def view_of(pod: Pod, report: common_pb2.LoadReport) -> ExecutorView:
    """As schedulers see an executor."""
    role = TaskRole((pod.role or Role.COLOCATED).value)
    return ExecutorView(
        te_id=pod.uid,
        incarnation="",
        role=role,
        model_revision="",
        ready=True,
        draining=report.draining,
        link_up=True,
        step_age_seconds=report.age_seconds,
        tasks=report.waiting + report.running,
        max_tasks=MAX_EXECUTOR_TASKS,
        queued_tokens=report.queued_prefill_tokens,
        prefill_tokens_per_second=report.prefill_tokens_per_second,
        decode_step_seconds=report.decode_step_seconds,
        kv_blocks_total=report.kv_blocks_total,
        kv_blocks_free=report.kv_blocks_free,
        block_tokens=16,
        max_model_len=0,
    )


def policy_of(serving: ModelServing) -> ScalePolicy:
    """The rules of a ModelServing. Raises BadCron."""
    spec, scaling = serving.spec, serving.spec.scaling
    slo = spec.slo
    return ScalePolicy(
        bounds={TaskRole(role.value): Bounds(bounds.min, bounds.max) for role, bounds in spec.roles.items()},
        ttft=slo.ttft_milliseconds / 1000 if slo is not None and slo.ttft_milliseconds else None,
        tpot=slo.tpot_milliseconds / 1000 if slo is not None and slo.tpot_milliseconds else None,
        allowed_violations=slo.allowed_violations if slo is not None else 0.05,
        stable_window=float(scaling.stable_window_seconds),
        panic_window=float(scaling.panic_window_seconds),
        panic_threshold=scaling.panic_threshold,
        scale_down_delay=float(scaling.scale_down_delay_seconds),
        scale_to_zero_after=float(scaling.scale_to_zero_after_seconds),
        max_scale_up_rate=scaling.max_scale_up_rate,
        ratio_min=scaling.ratio.min,
        ratio_max=scaling.ratio.max,
        schedules=[
            Window(
                schedule.name,
                cron.parse(schedule.cron, schedule.time_zone),
                float(schedule.duration_seconds),
                {TaskRole(role.value): count for role, count in schedule.min_replicas.items()},
            )
            for schedule in scaling.schedules
        ],
    )
