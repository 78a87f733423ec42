"""One call while it runs: its jobs, its choices, and the one place where all of it ends.

`Run` submits a job a prompt, turns what they have ready into pieces, and settles: jobs cancelled that did not
end, the limiter's slot freed, usage metered, metrics set. Settling happens once, whatever the end was.
"""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from controlplane.api.errors import ApiError
from controlplane.fleet.demand import DemandWriter
from controlplane.gateway import metrics
from controlplane.gateway.answer import Choice, Piece
from controlplane.gateway.auth import Principal
from controlplane.gateway.context import RequestContext
from controlplane.gateway.frames import PromptEcho, usage_object
from controlplane.gateway.limits import Lease
from controlplane.gateway.metering import Meter
from controlplane.gateway.plan import Plan, Prompt
from controlplane.gateway.settings import GatewaySettings
from controlplane.jobs.serving import (
    ChoiceDelta,
    ServingError,
    ServingExecutor,
    ServingJob,
    ServingRequest,
    TokenLogprobs,
)

Shown = tuple[int, Piece, PromptEcho | None]
"""What one delta adds to the answer: choice, piece, and the prompt where it is echoed before the piece."""


@dataclass(slots=True, eq=False)
class _Part:
    """One prompt's share of the run."""

    prompt: Prompt
    job: ServingJob | None
    choices: list[Choice]
    first: int  # index of its first choice
    cached_tokens: int = 0
    touched: bool = False  # an executor has answered: the prompt is metered
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    echoed: set[int] = field(default_factory=set)


class Run:
    """Create, `submit`, `listen`, `take` until `ended`, `settle`."""

    def __init__(
        self,
        plan: Plan,
        context: RequestContext,
        principal: Principal,
        lease: Lease,
        *,
        meter: Meter,
        demand: DemandWriter,
        settings: GatewaySettings,
    ) -> None:
        self.plan = plan
        self.context = context
        self.settings = settings
        self.deadline = time.perf_counter() + settings.request_seconds + settings.request_grace_seconds
        self._principal = principal
        self._lease = lease
        self._meter = meter
        self._demand = demand
        self._parts: list[_Part] = []
        self._ready: list[_Part] = []  # parts with something to take
        self._settled = False

    def submit(self, executor: ServingExecutor) -> None:
        """Raises ApiError; what was submitted before is cancelled by `settle`."""
        plan = self.plan
        for prompt in plan.prompts:
            job = None
            if not plan.discard_output or plan.logprobs is not None:
                try:
                    job = executor.submit(self._request(prompt))
                except ServingError as error:
                    raise api_error(error) from None
                self.context.job_id = self.context.job_id or job.job_id
            offset = len(_echo_text(plan, prompt)) if plan.echo else 0
            choices = [
                Choice(
                    plan.model.table,
                    stops=plan.stops,
                    end_ids=plan.end_ids,
                    min_tokens=plan.sampling.min_tokens,
                    with_logprobs=plan.logprobs is not None,
                    offset=offset,
                )
                for _ in range(plan.n)
            ]
            self._parts.append(_Part(prompt, job, choices, len(self._parts) * plan.n))
        if self.context.job_id:
            self.context.response_headers.append((b"x-deepflow-job", self.context.job_id.encode()))

    def _request(self, prompt: Prompt) -> ServingRequest:
        plan = self.plan
        left = self.settings.request_seconds - (time.perf_counter() - self.context.started)
        return ServingRequest(
            request_id=self.context.request_id,
            tenant=self._principal.tenant,
            model_id=plan.model.id,
            model_revision=plan.model.revision,
            kind=plan.kind,
            prompt=prompt.ids,
            sampling=plan.sampling,
            max_output_tokens=prompt.max_output_tokens,
            n=plan.n,
            stream=plan.stream,
            cache_salt=self._principal.tenant.encode(),
            priority=self._principal.priority,
            timeout_seconds=max(left, 0.001),
            traceparent=self.context.traceparent,
            parent_span=self.context.parent_span,
            key_id=self._principal.key_id,
        )

    def listen(self, wake: Callable[[], None]) -> None:
        """`wake` whenever there is something to take."""

        def ready(part: _Part) -> None:
            if part not in self._ready:
                self._ready.append(part)
            wake()

        for part in self._parts:
            if part.job is None:
                ready(part)
            else:
                part.job.listen(partial(ready, part))

    def take(self) -> list[Shown]:
        """What is ready, in order. Raises ApiError where a job has failed."""
        shown: list[Shown] = []
        ready, self._ready = self._ready, []
        for part in ready:
            if part.job is None:
                for choice in part.choices:
                    choice.finish = "length"
                for index in range(self.plan.n):
                    shown.append((part.first + index, Piece(finish="length"), self._echo(part, index)))
                continue
            for delta in part.job.take():
                if delta.error is not None or delta.finish in ("error", "cancelled"):
                    raise _delta_error(delta)
                piece = self._take(part, delta)
                if piece is not None:
                    shown.append((part.first + delta.index, piece, self._echo(part, delta.index)))
            if part.job.ended and any(choice.finish is None for choice in part.choices):
                raise ApiError(500, "The answer ended before it was complete.", code="internal_error")
        return shown

    @property
    def ended(self) -> bool:
        """Every choice has its last piece."""
        for part in self._parts:
            for choice in part.choices:
                if choice.finish is None:
                    return False
        return True

    def _take(self, part: _Part, delta: ChoiceDelta) -> Piece | None:
        choice = part.choices[delta.index]
        now = time.perf_counter()
        part.touched = True
        if delta.cached_tokens is not None and delta.index == 0:
            part.cached_tokens = delta.cached_tokens
        if delta.prompt_logprobs is not None:
            part.prompt_logprobs = delta.prompt_logprobs
        if choice.finish is not None:
            return None
        if self.plan.discard_output:
            if delta.finish is None:
                return None
            choice.finish = "length"
            return Piece(finish="length")
        if delta.tokens:
            if self.context.first_token is None:
                self.context.first_token = now - self.context.started
            choice.first_token_at = choice.first_token_at or now
            choice.last_token_at = now
        piece = choice.push(delta.tokens, delta.logprobs, delta.finish)
        if piece.stopped and delta.finish is None:
            assert part.job is not None
            part.job.finish_choice(delta.index)
        return piece

    def _echo(self, part: _Part, index: int) -> PromptEcho | None:
        """The prompt, in front of a choice's first piece."""
        if not self.plan.echo or index in part.echoed:
            return None
        part.echoed.add(index)
        text = _echo_text(self.plan, part.prompt)
        if self.plan.logprobs is None:
            return PromptEcho(text, [], [])
        logprobs = part.prompt_logprobs or [None] * len(part.prompt.ids)
        entries = list(zip(part.prompt.ids, logprobs, strict=False))
        return PromptEcho(text, _offsets(self.plan, part.prompt, text), entries)

    def usage(self) -> dict[str, Any]:
        """OpenAI's usage object of what was made so far."""
        prompt, cached, completion = self._counts(touched_only=False)
        return usage_object(prompt, cached, completion)

    def _counts(self, *, touched_only: bool) -> tuple[int, int, int]:
        parts = [part for part in self._parts if part.touched or not touched_only]
        return (
            sum(len(part.prompt.ids) for part in parts),
            sum(part.cached_tokens for part in parts),
            sum(choice.completion_tokens for part in parts for choice in part.choices),
        )

    @property
    def settles_at_once(self) -> bool:
        """Settling will wait for nobody: the answer's end can travel with its last piece."""
        return not self._lease.waits

    def cancel(self, reason: str) -> None:
        """Stops every job now; does not wait."""
        for part in self._parts:
            if part.job is not None and any(choice.finish is None for choice in part.choices):
                part.job.cancel(reason)

    async def settle(self, reason: str) -> None:
        """The end. `reason` is for jobs that still run. Idempotent; waits for the limiter only."""
        if self._settled:
            return
        self._settled = True
        self.cancel(reason)
        for part in self._parts:
            if part.job is not None:
                part.job.listen(
                    _nobody
                )  # it must not keep this run, nor this run it, until the collector looks
        prompt, cached, completion = self._counts(touched_only=True)
        context = self.context
        context.prompt_tokens, context.cached_tokens, context.completion_tokens = prompt, cached, completion
        model = self.plan.model.id
        if prompt:
            self._meter.record(
                self._principal.tenant, model, prompt=prompt, cached=cached, completion=completion
            )
        if context.first_token is not None:
            metrics.FIRST_TOKEN_SECONDS.labels(model).observe(context.first_token)
        seconds, further = 0.0, 0  # of tokens after the first
        for part in self._parts:
            for choice in part.choices:
                if choice.completion_tokens > 1:
                    took = choice.last_token_at - choice.first_token_at
                    metrics.TOKEN_SECONDS.labels(model).observe(took / (choice.completion_tokens - 1))
                    seconds, further = seconds + took, further + choice.completion_tokens - 1
        # A wait for the model's start is no sign of too few executors.
        ttft = None if context.held_seconds else context.first_token
        key = self.plan.model.entry.demand_key
        self._demand.ended(key)
        self._demand.record_answer(key, ttft=ttft, tpot=seconds / further if further else None)
        release = self._lease.release(completion)
        if release is not None:
            await release  # so that a client's next request finds its slot free


def _nobody() -> None:
    """Nobody listens any more."""


def api_error(error: ServingError) -> ApiError:
    """The executor's reason as the client sees it. 499 is for our log only: here it means a shutdown."""
    status = 503 if error.status == 499 else error.status
    return ApiError(
        status,
        error.message,
        param=error.param,
        code=error.code,
        retry_after=error.retry_after,
        drop_reason=error.drop_reason,
    )


def _delta_error(delta: ChoiceDelta) -> ApiError:
    if delta.error is not None:
        return api_error(delta.error)
    if delta.finish == "cancelled":
        return ApiError(503, "The request was cancelled by the server.", code="cancelled")
    return ApiError(500, "The request failed.", code="internal_error")


def _echo_text(plan: Plan, prompt: Prompt) -> str:
    if prompt.text is not None:
        return prompt.text
    return b"".join(plan.model.table.raw(token) for token in prompt.ids).decode(errors="replace")


def _offsets(plan: Plan, prompt: Prompt, text: str) -> list[int]:
    """Where each prompt token begins in the echoed text. A begin token that was put in front has no width."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    card = plan.model.card
    added = prompt.text is not None and not text.startswith(card.bos_token)
    offsets: list[int] = []
    length = 0
    for position, token in enumerate(prompt.ids):
        offsets.append(min(length, len(text)))
        if not (position == 0 and added and token == card.bos_id):
            length += len(decoder.decode(plan.model.table.raw(token)))
    return offsets
