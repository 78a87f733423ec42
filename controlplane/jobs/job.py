"""One request as a job: its choices, their order, their delivery, its record."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Protocol

from controlplane.jobs import metrics
from controlplane.jobs.choice import Choice, Host
from controlplane.jobs.delivery import Delivery
from controlplane.jobs.records import JobRecord, RequestRecord
from controlplane.jobs.serving import ChoiceDelta, ServingRequest
from controlplane.jobs.states import JobEvent, JobState, job_end, next_job_state
from controlplane.jobs.wire import encode_tokens
from kvtransfer.blockhash import block_hashes, chain_seed

MAX_HASHED_BLOCKS = 512
"""Leading blocks that placement looks at (ours: 8,192 tokens; beyond, executors differ no further)."""


class JobHost(Host, Protocol):
    def changed(self, job: Job) -> None:
        """Its record is out of date."""
        ...


class Job:
    """`controlplane.jobs.serving.ServingJob`. Made and driven by the job executor."""

    def __init__(
        self, host: JobHost, job_id: str, request: ServingRequest, *, block_tokens: int | None
    ) -> None:
        self.request = request
        self.created = host.now()
        self.created_at = host.wall()
        self.deadline = self.created + request.timeout_seconds
        self.state = JobState.QUEUED
        self.placed_at: float | None = None
        self.delivery = Delivery(request.n)
        self._host = host
        self._job_id = job_id
        self._ended_at: float | None = None
        self.prompt_bytes = encode_tokens(request.prompt)
        self._hashes: tuple[int, list[bytes]] | None = None
        # Choices of a prompt without a full block share no cache: none of them leads.
        shares = request.n > 1 and len(request.prompt) >= (block_tokens or 1)
        self.choices = [Choice(host, self, i, leads=i == 0 or not shares) for i in range(request.n)]

    @property
    def job_id(self) -> str:
        return self._job_id

    # -- the consumer's side ---------------------------------------------------------------------------

    def deltas(self) -> AsyncIterator[ChoiceDelta]:
        return self.delivery.deltas(lambda: self.cancel("the consumer left"))

    def listen(self, wake: Callable[[], None]) -> None:
        self.delivery.listen(wake)

    def take(self) -> list[ChoiceDelta]:
        return self.delivery.take()

    @property
    def ended(self) -> bool:
        return self.delivery.ended

    def finish_choice(self, index: int) -> None:
        self.choices[index].stop()

    def cancel(self, reason: str) -> None:
        for choice in reversed(self.choices):  # the first one's end would place those that wait for it
            choice.cancel(reason)

    # -- the choices' side -------------------------------------------------------------------------------

    @property
    def sibling_executor(self) -> str | None:
        """Where the leading choice computed the prompt."""
        attempts = self.choices[0].attempts
        kinds = [attempt for attempt in attempts if attempt.outcome in (None, "handover", "stop", "length")]
        return kinds[0].te_id if kinds else None

    @property
    def sibling_decode(self) -> str | None:
        attempts = self.choices[0].attempts
        return attempts[-1].te_id if len(attempts) > 1 else None

    def hashes(self, block_tokens: int) -> list[bytes]:
        """Block identities of the prompt's beginning; computed once."""
        if self._hashes is None or self._hashes[0] != block_tokens:
            request = self.request
            seed = chain_seed(request.model_revision, request.adapter_id, request.cache_salt)
            tokens = request.prompt[: MAX_HASHED_BLOCKS * block_tokens]
            self._hashes = (block_tokens, block_hashes(tokens, seed, block_tokens))
        return self._hashes[1]

    def task_placed(self) -> None:
        if self.placed_at is None:
            self.placed_at = self._host.wall()
            self.state = next_job_state(self.state, JobEvent.START)
        self.changed()

    def prompt_cached(self, choice: Choice) -> None:
        """A first token came: the prompt's KV lies in that executor's cache."""
        if choice.index == 0:
            self._release_followers()

    def task_ended(self, choice: Choice) -> None:
        if choice.index == 0:
            self._release_followers()
        event = job_end([item.state for item in self.choices])
        if event is not None:
            self.state = next_job_state(self.state, event)
            self._ended_at = self._host.wall()
            metrics.JOBS.labels(str(self.state)).inc()
        self.changed()

    def changed(self) -> None:
        self._host.changed(self)

    def _release_followers(self) -> None:
        if self.request.n > 1:
            for choice in self.choices[1:]:
                choice.release()

    def record(self, gateway_id: str, wall: float) -> JobRecord:
        request = self.request
        firsts = [choice.first_token_at for choice in self.choices if choice.first_token_at is not None]
        errors = [str(choice.error) for choice in self.choices if choice.error is not None]
        return JobRecord(
            job_id=self._job_id,
            kind="serving",
            state=self.state,
            gateway_id=gateway_id,
            created_at=self.created_at,
            request=RequestRecord(
                request_id=request.request_id,
                tenant=request.tenant,
                key_id=request.key_id,
                kind=request.kind,
                model_id=request.model_id,
                model_revision=request.model_revision,
                prompt_tokens=len(request.prompt),
                max_output_tokens=request.max_output_tokens,
                n=request.n,
                stream=request.stream,
                priority=request.priority,
                timeout_seconds=request.timeout_seconds,
                traceparent=request.traceparent,
                parent_span=request.parent_span,
            ),
            tasks=tuple(choice.record() for choice in self.choices),
            placed_at=self.placed_at,
            first_token_at=min(firsts, default=None),
            ended_at=self._ended_at,
            error=errors[0] if errors else None,
            updated_at=wall,
        )
