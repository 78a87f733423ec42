"""Doubles for the engine's tests: a model whose tokens betray every KV mistake, and a wire between engines.

`ChainExecutor` stands in for a model: the KV of a position is a hash of the KV of *all* positions before it,
read back through the block table, and of its token; the next token is a hash of all KV. So a wrong
block, a block reused too early or a pull that missed a page changes every later token, and
`expected_output` says what is right without any block. Pages are poisoned whenever the cache says
that their content may change.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from flowserve.engine.config import EngineConfig
from flowserve.engine.engine import Engine
from flowserve.engine.prefixes import LendingBusy, NotCached
from flowserve.engine.types import (
    EngineTask,
    ErrorCode,
    FinishReason,
    PrefixSource,
    PullRequest,
    SamplingParams,
    StepEvent,
    TaskDelta,
    TaskError,
    TaskKind,
    TokenLogprobs,
)
from flowserve.executor.interface import ModelInfo, SequenceSlice, SliceResult
from flowserve.rtc import RTC
from kvtransfer.layout import KVLayout

KV_BYTES = 8
BLOCK_TOKENS = 4
VOCAB = 997
EOS = 0


class FakeClock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class PageStore:
    """A BlockStore over a bytearray; poisons a page on every bump."""

    def __init__(self, num_blocks: int, block_tokens: int = BLOCK_TOKENS) -> None:
        self.layout = KVLayout("chain@1", "float16", block_tokens, layers=1, kv_heads=1, head_dim=2)
        assert self.layout.block_bytes == block_tokens * KV_BYTES
        self.num_blocks = num_blocks
        self.pages = bytearray(num_blocks * self.layout.block_bytes)
        self.generations = [0] * num_blocks
        self.fail_stores = 0

    def generation(self, block: int) -> int:
        return self.generations[block]

    def view(self, start: int, count: int) -> memoryview:
        size = self.layout.block_bytes
        return memoryview(self.pages)[start * size : (start + count) * size]

    def load(self, start: int, count: int) -> bytes:
        return bytes(self.view(start, count))

    def store(self, start: int, data: bytes | bytearray | memoryview) -> None:
        if self.fail_stores:
            self.fail_stores -= 1
            raise OSError("injected")
        self.view(start, len(data) // self.layout.block_bytes)[:] = data

    def bump(self, block: int) -> None:
        self.generations[block] += 1
        self.view(block, 1)[:] = b"\xee" * self.layout.block_bytes


def _kv(hasher: hashlib.blake2b, token: int) -> bytes:
    with_token = hasher.copy()
    with_token.update(token.to_bytes(4, "little"))
    return with_token.digest()


def _next(hasher: hashlib.blake2b) -> int:
    return int.from_bytes(hasher.digest(), "little") % VOCAB


def next_token(tokens: Sequence[int]) -> int:
    hasher = hashlib.blake2b(digest_size=KV_BYTES)
    for token in tokens:
        hasher.update(_kv(hasher, token))
    return _next(hasher)


def expected_output(
    prompt: Sequence[int], max_output: int, limit: int = 10**9
) -> tuple[list[int], FinishReason]:
    """The undisturbed answer, in full context of `limit` tokens."""
    output: list[int] = []
    while True:
        output.append(next_token([*prompt, *output]))
        if output[-1] == EOS:
            return output, FinishReason.STOP
        if len(output) >= max_output or len(prompt) + len(output) >= limit:
            return output, FinishReason.LENGTH


class ChainExecutor:
    """An Executor over a PageStore."""

    def __init__(self, store: PageStore, max_model_len: int = 4096) -> None:
        self.store = store
        self.info = ModelInfo("chain@1", 1, 1, 2, VOCAB, max_model_len, (EOS,), "float16")
        self.batches: list[list[tuple[int, int]]] = []  # (start, count) of each slice
        self.fail_next = 0

    def execute(self, batch: Sequence[SequenceSlice]) -> list[SliceResult]:
        self.batches.append([(piece.start, len(piece.tokens)) for piece in batch])
        if self.fail_next:
            self.fail_next -= 1
            raise RuntimeError("injected")
        written: set[tuple[int, int]] = set()
        return [self._run(piece, written) for piece in batch]

    def _run(self, piece: SequenceSlice, written: set[tuple[int, int]]) -> SliceResult:
        step = self.store.layout.block_tokens
        assert piece.tokens
        hasher = hashlib.blake2b(digest_size=KV_BYTES)
        for position in range(piece.start):
            hasher.update(self._slot(piece, position))
        scores: list[TokenLogprobs] = []
        following = [*piece.tokens[1:], *([] if piece.next_token is None else [piece.next_token])]
        for offset, token in enumerate(piece.tokens):
            position = piece.start + offset
            where = (piece.block_table[position // step], position % step)
            assert where not in written, "two sequences write one slot"
            written.add(where)
            kv = _kv(hasher, token)
            self._slot(piece, position)[:] = kv
            hasher.update(kv)
            if piece.prompt_logprobs is not None and offset < len(following):
                scores.append(TokenLogprobs(following[offset], -float(_next(hasher)), 1))
        result = SliceResult(prompt_logprobs=scores if piece.prompt_logprobs is not None else None)
        if piece.sample is not None:
            assert piece.start + len(piece.tokens) == len(piece.sample.prompt) + len(piece.sample.output)
            assert piece.sample.index == len(piece.sample.output)
            result.token = _next(hasher)
        return result

    def _slot(self, piece: SequenceSlice, position: int) -> memoryview:
        step = self.store.layout.block_tokens
        page = self.store.view(piece.block_table[position // step], 1)
        return page[position % step * KV_BYTES : (position % step + 1) * KV_BYTES]

    def close(self) -> None: ...


@dataclass
class Transfer:
    sender: Rig
    announced: list[int] = field(default_factory=list)
    generations: list[int] = field(default_factory=list)
    tokens: int = 0
    complete: bool = False
    withdrawn: str | None = None
    released: bool = False
    payload: bytes = b""


@dataclass
class PendingPull:
    receiver: Rig
    request: PullRequest
    cancelled: bool = False
    copied: int = 0  # blocks


class Wire:
    """Copies announced blocks between rigs when told to; every transfer gets one terminal event."""

    def __init__(self) -> None:
        self.transfers: dict[str, Transfer] = {}
        self.pulls: list[PendingPull] = []
        self.hold_releases = False
        self.offered: list[str] = []

    def pump(self, blocks: int | None = None, fail: bool = False) -> None:
        """Moves every pull on by up to `blocks` blocks (None = all); `fail` fails them instead."""
        for pull in list(self.pulls):
            transfer = self.transfers.get(pull.request.source.transfer_id)
            gone = transfer is None or transfer.withdrawn is not None or transfer.released
            if fail or pull.cancelled or gone:
                self._done(pull, TaskError(ErrorCode.KV_TRANSFER_FAILED, "injected", retryable=True))
                if transfer is not None and not transfer.released and transfer.complete:
                    self.release(pull.request.source.transfer_id, "aborted")
                continue
            assert transfer is not None
            self._copy(pull, transfer, blocks)
        self.release_withdrawn()

    def _copy(self, pull: PendingPull, transfer: Transfer, limit: int | None) -> None:
        request = pull.request
        start = max(pull.copied, request.skip_blocks)
        stop = len(request.blocks) if limit is None else min(len(request.blocks), start + limit)
        for index in range(start, min(stop, len(transfer.announced))):
            block = transfer.announced[index]
            assert transfer.sender.store.generation(block) == transfer.generations[index], "moved"
            pull.receiver.store.store(request.blocks[index], transfer.sender.store.load(block, 1))
            pull.copied = index + 1
        done = max(pull.copied, request.skip_blocks) >= len(request.blocks)
        if done and transfer.complete:
            assert transfer.tokens >= request.length
            self._done(pull, None, transfer.payload)
            if not self.hold_releases:
                self.release(request.source.transfer_id, "acked")

    def _done(self, pull: PendingPull, error: TaskError | None, payload: bytes = b"") -> None:
        self.pulls.remove(pull)
        pull.receiver.engine.pull_done(pull.request.task_id, pull.request.attempt, error, payload)

    def release(self, transfer_id: str, outcome: str) -> None:
        transfer = self.transfers[transfer_id]
        assert not transfer.released
        transfer.released = True
        transfer.sender.engine.release_transfer(transfer_id, outcome)

    def release_withdrawn(self) -> None:
        for transfer_id, transfer in self.transfers.items():
            if transfer.withdrawn is not None and not transfer.released:
                self.release(transfer_id, "withdrawn")

    def expire(self) -> None:
        """Every lease that runs ends."""
        for transfer_id, transfer in self.transfers.items():
            if (transfer.complete or transfer.withdrawn is not None) and not transfer.released:
                self.release(transfer_id, "expired")


class WireHandover:
    """One rig's KVHandover."""

    def __init__(self, wire: Wire, rig: Rig) -> None:
        self.wire, self.rig = wire, rig
        self.refuse: set[str] = set()  # names of calls that raise

    def _check(self, call: str) -> None:
        if call in self.refuse:
            raise RuntimeError(f"{call} refused")

    def offer(self, transfer_id: str, task: EngineTask) -> float:
        self._check("offer")
        assert transfer_id not in self.wire.transfers, "offered twice"
        self.wire.transfers[transfer_id] = Transfer(self.rig)
        self.wire.offered.append(transfer_id)
        return 30.0

    def announce(self, transfer_id: str, first_block: int, blocks: Sequence[int], tokens: int) -> None:
        self._check("announce")
        transfer = self.wire.transfers[transfer_id]
        assert first_block == len(transfer.announced), "each block is announced once, in order"
        assert tokens > transfer.tokens and not transfer.complete
        transfer.announced.extend(blocks)
        transfer.generations.extend(self.rig.store.generation(block) for block in blocks)
        transfer.tokens = tokens
        step = self.rig.store.layout.block_tokens
        assert (len(transfer.announced) - 1) * step < tokens <= len(transfer.announced) * step

    def complete(self, transfer_id: str, tokens: int, payload: bytes) -> None:
        self._check("complete")
        transfer = self.wire.transfers[transfer_id]
        assert transfer.tokens == tokens
        transfer.complete = True
        transfer.payload = payload

    def withdraw(self, transfer_id: str, reason: str) -> None:
        self._check("withdraw")
        self.wire.transfers[transfer_id].withdrawn = reason

    def start_pull(self, request: PullRequest) -> None:
        self._check("start_pull")
        assert request.skip_blocks <= len(request.blocks)
        self.wire.pulls.append(PendingPull(self.rig, request))

    def cancel_pull(self, task_id: str, attempt: int) -> None:
        for pull in self.wire.pulls:
            if (pull.request.task_id, pull.request.attempt) == (task_id, attempt):
                pull.cancelled = True


@dataclass
class PendingFetch:
    source: PrefixSource
    identities: list[bytes]
    blocks: list[int]
    done: Callable[[int], None]
    stopped: bool = False


class PrefixWire:
    """A PrefixExchange between rigs, moved by hand: what one has lent, what another fetches."""

    def __init__(self, rigs: dict[str, Rig], here: Rig) -> None:
        self.rigs, self.here = rigs, here
        self.seconds = 0.0
        self.lent: dict[str, list[int]] = {}
        self.fetches: list[PendingFetch] = []
        self.declined = 0
        self.refuse = False

    def lend(self, transfer_id: str, blocks: Sequence[int], tokens: int) -> None:
        if self.refuse:
            raise RuntimeError("refused")
        assert tokens == len(blocks) * BLOCK_TOKENS
        self.lent[transfer_id] = list(blocks)

    def withdraw(self, transfer_id: str, reason: str) -> None:
        self.here.engine.release_transfer(transfer_id, "withdrawn")

    def fetch_seconds(self, source: PrefixSource, blocks: int) -> float:
        return self.seconds

    def fetch_declined(self, source: PrefixSource) -> None:
        self.declined += 1

    def start_fetch(
        self,
        source: PrefixSource,
        identities: Sequence[bytes],
        blocks: Sequence[int],
        seconds: float,
        done: Callable[[int], None],
    ) -> Callable[[], None]:
        assert seconds > 0 and len(identities) == len(blocks) > 0
        fetch = PendingFetch(source, list(identities), list(blocks), done)
        self.fetches.append(fetch)

        def stop() -> None:
            fetch.stopped = True

        return stop

    def pump(self, fail: bool = False) -> None:
        """Ends every fetch: a stopped or failing one with nothing."""
        fetches, self.fetches = self.fetches, []
        for fetch in fetches:
            rig = self.rigs.get(fetch.source.te_id)
            if fail or fetch.stopped or rig is None:
                fetch.done(0)
                continue
            assert isinstance(rig.exchange, PrefixWire)
            try:
                transfer_id, count = rig.engine.lend(fetch.identities)
            except (NotCached, LendingBusy):
                fetch.done(0)
                continue
            lent = rig.exchange.lent.pop(transfer_id)
            assert len(lent) == count
            for theirs, ours in zip(lent, fetch.blocks, strict=False):
                self.here.store.store(ours, rig.store.load(theirs, 1))
            rig.engine.release_transfer(transfer_id, "acked")
            fetch.done(count)


@dataclass
class Answer:
    """What the receiver of events knows of one attempt."""

    tokens: list[int] = field(default_factory=list)
    final: TaskDelta | None = None
    first: TaskDelta | None = None
    missing: int = 0  # tokens before `tokens`: an early decode does not repeat its prefill's


class Rig:
    """An engine over the doubles, turned by hand, and what it told."""

    def __init__(
        self,
        num_blocks: int = 64,
        *,
        config: EngineConfig | None = None,
        wire: Wire | None = None,
        clock: FakeClock | None = None,
        max_model_len: int = 4096,
        host_bytes: int = 0,
        peers: dict[str, Rig] | None = None,
        **engine_options: object,
    ) -> None:
        self.clock = clock or FakeClock()
        self.store = PageStore(num_blocks)
        self.cache = RTC(self.store, host_bytes=host_bytes, clock=self.clock)
        self.executor = ChainExecutor(self.store, max_model_len)
        self.handover = WireHandover(wire, self) if wire is not None else None
        self.exchange = None if peers is None else PrefixWire(peers, self)
        self.answers: dict[tuple[str, int], Answer] = {}
        self.held_identities: set[bytes] = set()
        self._next_sequence = 1
        self.engine = Engine(
            self.executor,
            self.cache,
            config or EngineConfig(max_running=16, max_batch_tokens=64),
            handover=self.handover,
            exchange=self.exchange,
            on_event=self.on_event,
            clock=self.clock,
            **engine_options,  # type: ignore[arg-type]  # passed through
        )

    def on_event(self, event: StepEvent) -> None:
        for delta in event.deltas:
            answer = self.answers[(delta.task_id, delta.attempt)]
            assert answer.final is None, f"delta after the end: {delta}"
            if answer.first is None:
                answer.first = delta
            if delta.tokens:
                assert delta.start_index == answer.missing + len(answer.tokens)
                answer.tokens.extend(delta.tokens)
            if delta.finish is not None:
                assert (delta.finish is FinishReason.ERROR) == (delta.error is not None)
                answer.final = delta
        if event.kv_events is not None:
            assert event.kv_events.sequence == self._next_sequence, "gap in the KV events"
            stored, removed = set(event.kv_events.stored), set(event.kv_events.removed)
            assert not stored & self.held_identities and removed <= self.held_identities, "not exact"
            self._next_sequence += len(stored) + len(removed)
            self.held_identities = (self.held_identities | stored) - removed

    def submit(self, task: EngineTask) -> Answer:
        self.engine.submit(task)
        answer = self.answers[task.key] = Answer(tokens=list(task.output), missing=int(task.early))
        return answer

    def step(self, turns: int = 1) -> None:
        for _ in range(turns):
            self.clock.now += 0.01
            self.engine.step_once()

    def run(self, *answers: Answer, turns: int = 2000) -> None:
        """Turns until these answers (default: all) have ended."""
        wanted = answers or tuple(self.answers.values())
        for _ in range(turns):
            if all(answer.final is not None for answer in wanted):
                return
            self.step()
        raise AssertionError(f"no end after {turns} turns: {self.engine.load()}")

    def assert_clean(self) -> None:
        """Nothing is held, nothing leaked, and the events say exactly what the cache holds."""
        self.step()
        assert self.engine.audit() == self.engine.audit().__class__(0, 0)
        assert self.engine.active_tasks == 0
        assert self.cache.held_blocks == 0, f"{self.cache.held_blocks} blocks held by nobody"
        snapshot = self.engine.snapshot_kv_events()
        assert set(snapshot.stored) == self.held_identities
        assert snapshot.sequence == self._next_sequence


def make_task(
    prompt: Sequence[int],
    max_output: int = 8,
    *,
    task_id: str = "t",
    attempt: int = 0,
    kind: TaskKind = TaskKind.UNIFIED,
    sampling: SamplingParams | None = None,
    **fields: object,
) -> EngineTask:
    return EngineTask(
        task_id,
        attempt,
        kind,
        prompt,
        sampling or SamplingParams(temperature=0.0),
        max_output,
        **fields,  # type: ignore[arg-type]  # passed through
    )


def tokens_of(seed: int, count: int) -> list[int]:
    """A prompt of `count` ids, another one for each seed."""
    return [int.from_bytes(hashlib.blake2b(f"{seed}/{i}".encode(), digest_size=4).digest(), "little") % VOCAB
            for i in range(count)]  # fmt: skip
