"""Puts choices onto executors: the live view, `scheduling`'s decision, the submit message."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping

from deepflow.v1 import common_pb2
from deepflow.v1.common_pb2 import KVSource
from deepflow.v1.worker_pb2 import SubmitTask

from controlplane.fleet.channel import LinkUnavailable
from controlplane.fleet.view import FleetView
from controlplane.jobs import metrics, wire
from controlplane.jobs.choice import Choice
from controlplane.jobs.states import TaskState
from controlplane.scheduling.columns import Columns
from controlplane.scheduling.decide import decide, decide_decode
from controlplane.scheduling.early import Late, decide_early
from controlplane.scheduling.lengths import Asked, LengthPredictor
from controlplane.scheduling.types import (
    Decision,
    Draw,
    Mode,
    Policy,
    Reason,
    RequestView,
    Unplaceable,
)

MAX_TRIES = 4
"""Executors tried in one placement when links turn out to be gone or full (ours)."""
MAX_TIMEOUT_MS = (1 << 63) - 1


class Placer:
    def __init__(
        self, fleet: FleetView, policy: Policy, now: Callable[[], float], rng: random.Random
    ) -> None:
        self._fleet = fleet
        self._policy = policy
        self._now = now
        self._rng = rng
        self._turn = 0
        self._lengths = LengthPredictor()

    def place(self, choice: Choice) -> Reason | None:
        """Submits a HELD choice, or one in HANDOVER to its decode executor. None: done; else why not."""
        decoding = choice.state is TaskState.HANDOVER
        missed: set[str] = set()
        for _ in range(MAX_TRIES):
            started = time.perf_counter()
            view = self._fleet.cluster_view(choice.job.request.model_revision)
            request = self._request(choice, view, missed, decoding=decoding)
            self._turn += 1
            draw = Draw(self._turn, self._rng.getrandbits(32))
            decision = (decide_decode if decoding else decide)(view, request, self._policy, draw)
            metrics.DECIDE_SECONDS.observe(time.perf_counter() - started)
            if isinstance(decision, Unplaceable):
                return self._why(choice, view, decision.reason, missed)
            try:
                self._submit(choice, decision, decoding=decoding, block_tokens=view.views[0].block_tokens)
            except LinkUnavailable:
                missed.add(decision.te_id)
                continue
            return None
        return Reason.BUSY

    def cost(self, choice: Choice) -> float:
        """Tokens that must be computed for it: where it was placed, or where most of it is cached."""
        have = len(choice.job.request.prompt) + len(choice.output)
        attempt = choice.current
        if attempt is not None and attempt.decision is not None:
            return max(1, have - attempt.decision.cached_tokens)
        view = self._fleet.cluster_view(choice.job.request.model_revision)
        return max(1, have - max(self._cached(choice, view).values(), default=0))

    def place_early(self, choice: Choice, opened: KVSource, *, handovers_waiting: int) -> str:
        """Submits the decode of a prefill that has started, if that is wise now; says what was decided."""
        view = self._fleet.cluster_view(choice.job.request.model_revision)
        request = self._request(choice, view, {opened.te_id}, decoding=True)
        self._turn += 1
        decision = decide_early(
            view,
            request,
            self._policy,
            Draw(self._turn, self._rng.getrandbits(32)),
            prefill_te=opened.te_id,
            handovers_waiting=handovers_waiting,
        )
        if isinstance(decision, Late):
            return decision.reason
        try:
            self._submit(choice, decision, decoding=True, early=opened)
        except LinkUnavailable:
            return "the link to the decode executor is not up"
        return "early"

    @staticmethod
    def _why(choice: Choice, view: Columns, reason: Reason, missed: set[str]) -> Reason:
        if missed:
            return Reason.BUSY  # their links may be back in a moment
        if len(view) and all(executor.te_id in choice.never for executor in view.views):
            return Reason.TOO_LARGE  # each has said so
        return reason

    def _request(self, choice: Choice, view: Columns, missed: set[str], *, decoding: bool) -> RequestView:
        job, request = choice.job, choice.job.request
        never = choice.never | missed
        prefer = None
        if decoding:
            if choice.offer is not None:
                never.add(choice.offer.te_id)
            prefer = job.sibling_decode if choice.index else None
        elif choice.index:
            prefer = job.sibling_executor
        return RequestView(
            model_revision=request.model_revision,
            tokens=len(request.prompt) + len(choice.output),
            output_left=max(0, request.max_output_tokens - len(choice.output)),
            unified_only=choice.force_unified
            or request.max_output_tokens == 0
            or request.sampling.prompt_logprobs is not None,
            cached_tokens=self._cached(choice, view),
            affinity=self._affinity(choice, view),
            predicted_output=self._expected(choice, view),
            excluded=frozenset(choice.excluded),
            never=frozenset(never),
            prefer=prefer,
        )

    def _cached(self, choice: Choice, view: Columns) -> Mapping[str, int]:
        if not len(view) or not len(self._fleet.prefixes):
            return {}
        block_tokens = view.views[0].block_tokens
        found = self._fleet.cached_blocks(choice.job.hashes(block_tokens))
        # The last token is computed in any case: it is what the first output token is sampled from.
        return found.tokens(block_tokens, len(choice.job.request.prompt) - 1)

    @staticmethod
    def _affinity(choice: Choice, view: Columns) -> int | None:
        """Of the prompt's first block: gateways send its cold copies to one executor, whoever they are."""
        hashes = choice.job.hashes(view.views[0].block_tokens) if len(view) else []
        return int.from_bytes(hashes[0][:8], "little") if hashes else None

    def _expected(self, choice: Choice, view: Columns) -> int | None:
        """Tokens that it will still make, as far as its likes tell; said once, before its first placement."""
        if choice.asked is None and len(view) > 1:  # alone, an executor gets it however long it is
            request = choice.job.request
            choice.asked = Asked(
                request.tenant,
                request.kind,
                len(request.prompt),
                request.max_output_tokens,
                request.sampling.temperature,
                self._affinity(choice, view) or 0,
            )
            choice.predicted = self._lengths.predict(choice.asked)
        if choice.predicted is None:
            return None
        return max(1, choice.predicted.tokens - len(choice.output))

    def learn(self, choice: Choice) -> None:
        """It ended by itself, at a stop string or at its bound."""
        asked, predicted, tokens = choice.asked, choice.predicted, len(choice.output)
        if asked is None or not tokens:
            return
        self._lengths.learn(asked, tokens, predicted)
        if predicted is not None:
            outcome = (
                "close" if predicted.close(tokens) else "within" if tokens <= predicted.tokens else "longer"
            )
            metrics.PREDICTED.labels(predicted.source, outcome).inc()

    def _submit(
        self,
        choice: Choice,
        decision: Decision,
        *,
        decoding: bool,
        early: KVSource | None = None,
        block_tokens: int = 0,
    ) -> None:
        if decoding:
            kind = common_pb2.TASK_KIND_DECODE
        elif decision.mode is Mode.DISAGGREGATED:
            kind = common_pb2.TASK_KIND_PREFILL
        else:
            kind = common_pb2.TASK_KIND_UNIFIED
        job, request = choice.job, choice.job.request
        sampling = wire.sampling_params(request.sampling, choice.seed)
        if choice.prompt_scored or decoding:
            sampling.ClearField("prompt_logprobs")
        left_ms = int((job.deadline - self._now()) * 1000)
        task = SubmitTask(
            task_id=choice.task_id,
            attempt=choice.next_attempt,
            kind=kind,
            model_revision=request.model_revision,
            adapter_id=request.adapter_id,
            cache_salt=request.cache_salt,
            prompt_tokens=job.prompt_bytes,
            output_tokens=wire.encode_tokens(choice.output),
            sampling=sampling,
            max_output_tokens=request.max_output_tokens,
            priority=request.priority,
            timeout_ms=min(max(left_ms, 1), MAX_TIMEOUT_MS),
            traceparent=request.traceparent,
            tell_start=kind == common_pb2.TASK_KIND_PREFILL and self._policy.early_decode,
            early=early is not None,
        )
        if early is not None:
            task.kv_source.CopyFrom(early)
        elif decoding:
            assert choice.offer is not None
            task.kv_source.CopyFrom(choice.offer.source)
            task.processor_state = choice.offer.processor_state
        elif block_tokens and len(self._fleet.prefixes):
            source = self._fleet.prefix_source(job.hashes(block_tokens), block_tokens, decision.te_id)
            if source is not None:
                task.prefix_source.CopyFrom(source)
        tokens = len(request.prompt) + len(choice.output)
        uncached = 0 if decoding else max(0, tokens - decision.cached_tokens)
        self._fleet.submit(decision.te_id, decision.incarnation, task, choice, uncached_tokens=uncached)
        if early is not None:
            choice.placed_early(decision.te_id, decision.incarnation)
        else:
            choice.placed(kind, decision.te_id, decision.incarnation, decision.reason, decision)
