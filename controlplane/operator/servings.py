"""The controller of ModelServings: reads, plans, acts, says what is.

The finalizer keeps the object until its executors have finished their tasks. Everything else follows from the
plan; a reconcile that is cut off anywhere is made good by the next.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import ValidationError

from controlplane.api.resources.base import parse_quantity
from controlplane.api.resources.modelserving import Engine, ModelServing, Role
from controlplane.api.resources.names import (
    ANNOTATION_PAUSED,
    FINALIZER_DRAIN,
    LABEL_MANAGED_BY,
    LABEL_ROLE,
    LABEL_SERVING,
    MANAGED_BY,
    OWNER_OPERATOR,
    Reason,
)
from controlplane.kube.client import Conflict, NotFound
from controlplane.kube.resources import (
    MODEL_SERVINGS,
    ROLE_SCALERS,
    Json,
    Key,
    owner_reference,
    uid_of,
    version_of,
)
from controlplane.operator import scalers
from controlplane.operator.acting import Actor
from controlplane.operator.cluster import Cluster, scaler_name
from controlplane.operator.executors import Target
from controlplane.operator.plan import plan_serving
from controlplane.operator.plan.claim import Want, claimable, fastest, share
from controlplane.operator.plan.status import Facts, conditions, summary
from controlplane.operator.plan.values import Claim, Plan, Pod, Serving
from controlplane.operator.pods import hash_of, load_hash, profile, template_of
from controlplane.operator.statuses import conditions_of, write_status

LOST_SECONDS = 60.0
"""Past its grace period, a pod of a deleted ModelServing no longer holds it (ours: kubelets kill then)."""
EVERY_SECONDS = 600.0
"""A look without cause: what was missed by a bug is made good (as controller-runtime's resync, 10 hours)."""


class ServingController:
    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._actor = Actor(cluster)
        self._wall = cluster.wall
        self._since: dict[Key, float] = {}  # since when it lacks executors
        self._hashes: dict[str, tuple[str, str]] = {}  # pool uid -> (resourceVersion, template hash)

    async def reconcile(self, key: Key) -> float | None:
        obj = self._cluster.servings.get(key)
        if obj is None:
            return await self._orphans(key)
        deleting = bool(obj["metadata"].get("deletionTimestamp"))
        try:
            serving = ModelServing.model_validate(obj)
        except ValidationError as error:
            await self._say_invalid(obj, str(error.errors()[0]["msg"]))
            return None
        if not deleting and FINALIZER_DRAIN not in (obj["metadata"].get("finalizers") or []):
            obj = await self._finalizer(obj, add=True)
        paused = serving.metadata.annotations.get(ANNOTATION_PAUSED) == "true"
        refusal = self._refusal(key, serving)
        if not deleting and not paused:
            await self._ensure_scalers(key, obj, serving)
        plan, want, pods = self._plan(
            key, obj, serving, deleting=deleting, blocked=paused or refusal is not None
        )
        try:
            if not paused:
                target, digest = target_of(serving), load_hash(serving)
                for action in plan.actions:
                    await self._actor.act(action, obj, target, digest)
        finally:
            self._cluster.reserved -= {action.pod.uid for action in plan.actions if isinstance(action, Claim)}
        if deleting and not any(self._holds(pod) for pod in self._cluster.pods_of_serving(key)):
            self._forget(key)
            await self._finalizer(obj, add=False)
            return None
        await self._say(key, obj, serving, plan=plan, want=want, pods=pods, refusal=refusal, paused=paused)
        # An override ends by time alone, and what is said of it with it.
        held = scalers.overrides(self._cluster, key, serving).values()
        ends = [scalers.seconds_left(override, self._wall()) for override in held]
        return min([plan.again_after or EVERY_SECONDS, *(max(0.0, left) for left in ends)])

    def _holds(self, pod: Pod) -> bool:
        """A pod on a node that is lost stays for ever: nobody is there to say that it ended."""
        return pod.gone_by is None or self._wall() < pod.gone_by + LOST_SECONDS

    # -- planning ----------------------------------------------------------------------------------------

    def _plan(
        self, key: Key, obj: Json, serving: ModelServing, *, deleting: bool, blocked: bool
    ) -> tuple[Plan, dict[Role, int], list[Pod]]:
        """Also notes what is lacked and reserves what will be claimed, before anything is awaited."""
        cluster, now = self._cluster, self._wall()
        accelerator = profile(serving.spec.accelerator, serving.spec.engine.value)
        want = {} if deleting else self._want(key, serving)
        pods = cluster.pods_of_serving(key)
        pools = cluster.pools_of(key[0], accelerator)
        free = [
            pod
            for pool in pools
            for pod in claimable(cluster.warm_pods((key[0], pool["metadata"]["name"])))
            if pod.uid not in cluster.reserved
        ]
        free = fastest(free, serving.spec.model.uri, cluster.ahead, cluster.fetched)
        wanted = Serving(
            key=key,
            uid=uid_of(obj),
            want=want,
            load_hash=load_hash(serving),
            accelerator=accelerator,
            priority=serving.spec.priority,
            drain_seconds=float(serving.spec.drain_seconds),
            sleep_seconds=float(serving.spec.scaling.sleep_seconds),
            crowded=any(other.missing > 0 for other in cluster.competitors(key, accelerator)),
            deleting=deleting,
        )
        since = self._since.get(key, now)
        mine = Want(key, wanted.priority, sum(want.values()), since)
        others = cluster.competitors(key, accelerator)
        plan = plan_serving(
            wanted,
            pods,
            free,
            now,
            may_claim=0 if blocked else share(len(free), mine, others),
            template_hashes=frozenset(self._template_hash(pool) for pool in pools),
            timing=cluster.settings.timing,
        )
        lacks = not blocked and plan.missing > 0
        if lacks:
            self._since[key] = since
        else:
            self._since.pop(key, None)
        cluster.want(key, accelerator, Want(key, wanted.priority, plan.missing, since) if lacks else None)
        cluster.reserved.update(action.pod.uid for action in plan.actions if isinstance(action, Claim))
        return plan, want, pods

    def _want(self, key: Key, serving: ModelServing) -> dict[Role, int]:
        """What the RoleScalers ask for, within the bounds."""
        want: dict[Role, int] = {}
        for role, bounds in serving.spec.roles.items():
            scaler = self._cluster.scaler(key, role)
            asked = scalers.replicas_of(scaler) if scaler is not None else bounds.min
            want[role] = max(bounds.min, min(asked, bounds.max))
        return want

    def _template_hash(self, pool: Json) -> str:
        known = self._hashes.get(uid_of(pool))
        if known is None or known[0] != version_of(pool):
            spec = template_of(scalers.read_pool(pool), self._cluster.settings)
            known = self._hashes[uid_of(pool)] = (version_of(pool), hash_of(spec))
        return known[1]

    def _refusal(self, key: Key, serving: ModelServing) -> tuple[Reason, str] | None:
        """Why it cannot be served at all."""
        spec, engine = serving.spec, serving.spec.engine
        if not self._cluster.pools_of(key[0], profile(spec.accelerator, engine.value)):
            others = [one for one in Engine if one is not engine]
            if any(self._cluster.pools_of(key[0], profile(spec.accelerator, one.value)) for one in others):
                words = f"No WarmPool of the profile {spec.accelerator} runs engine {engine.value}."
                return Reason.ENGINE_UNAVAILABLE, words
            return Reason.PROFILE_UNKNOWN, f"No WarmPool here offers the profile {serving.spec.accelerator}."
        born = serving.metadata.creation_timestamp
        mine = (born.isoformat() if born is not None else "", serving.metadata.uid)
        for name in sorted({serving.model_id, *serving.spec.model.aliases}):
            for other in self._cluster.servings.by("model", name):
                meta = other["metadata"]
                created = str(meta.get("creationTimestamp", "")).replace("Z", "+00:00")
                if (meta.get("namespace", ""), meta["name"]) != key and (created, meta["uid"]) < mine:
                    owner = f"{meta.get('namespace')}/{meta['name']}"
                    return Reason.NAME_CONFLICT, f"{owner} has the model name {name} already."
        return None

    # -- objects -----------------------------------------------------------------------------------------

    async def _finalizer(self, obj: Json, *, add: bool) -> Json:
        meta = obj["metadata"]
        others = [name for name in meta.get("finalizers") or [] if name != FINALIZER_DRAIN]
        if not add and len(others) == len(meta.get("finalizers") or []):
            return obj
        patch = {
            "metadata": {
                "uid": meta["uid"],
                "resourceVersion": meta["resourceVersion"],
                "finalizers": [*others, FINALIZER_DRAIN] if add else others,
            }
        }
        key = (meta.get("namespace", ""), meta["name"])
        try:
            changed = await self._cluster.api.patch(MODEL_SERVINGS, *key, patch, manager=OWNER_OPERATOR)
        except NotFound:
            return obj
        except Conflict:
            await self._cluster.refresh(MODEL_SERVINGS, self._cluster.servings, key, meta["uid"])
            raise
        changed["metadata"].pop("managedFields", None)
        if add:
            self._cluster.servings.assume(changed)
        return changed

    async def _ensure_scalers(self, key: Key, obj: Json, serving: ModelServing) -> None:
        cluster = self._cluster
        roles = dict(serving.spec.roles.items())
        for role, bounds in roles.items():
            if cluster.scaler(key, role) is not None:
                continue
            body: Json = {
                "apiVersion": ROLE_SCALERS.api_version,
                "kind": ROLE_SCALERS.kind,
                "metadata": {
                    "namespace": key[0],
                    "name": scaler_name(key[1], role),
                    "labels": {
                        LABEL_SERVING: key[1],
                        LABEL_ROLE: role.value,
                        LABEL_MANAGED_BY: MANAGED_BY,
                    },
                    "ownerReferences": [owner_reference(obj, MODEL_SERVINGS)],
                },
                "spec": {"modelServing": key[1], "role": role.value, "replicas": bounds.min},
            }
            try:
                made = await cluster.api.create(ROLE_SCALERS, body, manager=OWNER_OPERATOR)
            except Conflict:  # made already: the watch is behind, or a namesake's that is going away
                uid = ""
                found = await cluster.api.get(ROLE_SCALERS, key[0], scaler_name(key[1], role))
                uid = uid_of(found)
                if scalers.owner_uid(found) != uid_of(obj):
                    await cluster.api.delete(ROLE_SCALERS, key[0], scaler_name(key[1], role), uid=uid)
                    raise
                made = found
            cluster.scalers.assume(made)
        for scaler in cluster.scalers.by("serving", f"{key[0]}/{key[1]}"):
            if scalers.role_of(scaler) not in roles and not scaler["metadata"].get("deletionTimestamp"):
                name = scaler["metadata"]["name"]
                await cluster.api.delete(ROLE_SCALERS, key[0], name, uid=uid_of(scaler))
                cluster.scalers.forget((key[0], name), uid_of(scaler))

    async def _orphans(self, key: Key) -> float | None:
        """The object is gone, by force or before we saw it: its executors end as if it were being deleted."""
        self._forget(key)
        pods = self._cluster.pods_of_serving(key)
        if not pods:
            return None
        nobody = Serving(key=key, uid="", want={}, load_hash="", deleting=True)
        plan = plan_serving(nobody, pods, (), self._wall(), may_claim=0, timing=self._cluster.settings.timing)
        owner: Json = {
            "kind": MODEL_SERVINGS.kind,
            "metadata": {"namespace": key[0], "name": key[1], "uid": pods[0].serving_uid},
        }
        for action in plan.actions:
            await self._actor.act(action, owner, None)
        return plan.again_after

    def _forget(self, key: Key) -> None:
        self._since.pop(key, None)
        self._cluster.want(key, self._cluster.profiles.get(key, ""), None)
        self._cluster.profiles.pop(key, None)

    # -- status --------------------------------------------------------------------------------------------

    async def _say_invalid(self, obj: Json, message: str) -> None:
        generation = int(obj["metadata"].get("generation") or 0)
        plan = Plan(counts=dict.fromkeys(Role, (0, 0, 0)))
        facts = Facts({}, plan, (), (), refusal=(Reason.INVALID_SOURCE, message))
        said = conditions_of(conditions(facts), obj.get("status") or {}, generation, self._wall())
        status = {"observedGeneration": generation, "conditions": said}
        await write_status(self._cluster.api, self._cluster.servings, MODEL_SERVINGS, obj, status)

    async def _say(
        self,
        key: Key,
        obj: Json,
        serving: ModelServing,
        *,
        plan: Plan,
        want: dict[Role, int],
        pods: Sequence[Pod],
        refusal: tuple[Reason, str] | None,
        paused: bool,
    ) -> None:
        cluster = self._cluster
        fresh = cluster.servings.get(key)
        if fresh is None or uid_of(fresh) != uid_of(obj):
            return
        generation = serving.metadata.generation
        pool_pods = [
            pod
            for pool in cluster.pools_of(
                key[0], profile(serving.spec.accelerator, serving.spec.engine.value)
            )
            for pod in cluster.warm_pods((key[0], pool["metadata"]["name"]))
        ] if plan.missing else []  # fmt: skip
        errors = [pod.load_error for pod in pods if pod.load_error and not pod.serves]
        overridden = scalers.overrides(cluster, key, serving)
        state = cluster.scaling.get(key)
        facts = Facts(
            want=want,
            plan=plan,
            pods=pods,
            pool_pods=pool_pods,
            refusal=refusal,
            load_error=errors[0] if errors else "",
            paused=paused,
            deleting=serving.metadata.deletion_timestamp is not None,
            waking=state.waking if state is not None else False,
            mode=serving.spec.scaling.mode,
            overridden=tuple(role.value for role in overridden),
            signals=state.signals if state is not None else True,
            at_limit=state.at_limit if state is not None else False,
        )
        before = fresh.get("status") or {}
        status: Json = {
            "observedGeneration": generation,
            "modelId": serving.model_id,
            "conditions": conditions_of(conditions(facts), before, generation, self._wall()),
            "replicas": summary(want, plan),
            "readyReplicas": sum(serving_count for serving_count, _, _ in plan.counts.values()),
            "roles": [
                {
                    "role": role.value,
                    "desired": want.get(role, 0),
                    "ready": plan.counts[role][0],
                    "starting": plan.counts[role][1],
                    "draining": plan.counts[role][2],
                    "asleep": plan.asleep.get(role, 0),
                }
                for role in want
            ],
        }
        revisions = {pod.te.revision for pod in pods if pod.te is not None and pod.te.revision and pod.serves}
        if revisions:
            status["revision"] = max(revisions)
        elif before.get("revision"):  # what the catalogue of the gateways goes by while it is at zero
            status["revision"] = before["revision"]
        if cluster.settings.gateway_url:
            status["url"] = cluster.settings.gateway_url
        if before.get("lastActivity"):
            status["lastActivity"] = before["lastActivity"]
        if state is not None:
            status |= state.status(before)
        await write_status(cluster.api, cluster.servings, MODEL_SERVINGS, fresh, status)
        await scalers.say(cluster, key, serving, plan=plan, now=self._wall())


def target_of(serving: ModelServing) -> Target:
    options = serving.spec.options
    return Target(
        model_id=serving.model_id,
        uri=serving.spec.model.uri,
        dtype=options.dtype,
        quantization="" if options.quantization == "none" else options.quantization,
        kv_cache_bytes=parse_quantity(options.kv_cache_bytes),
        max_model_len=options.max_model_len,
    )
