"""Random fault schedules for KV transfers: each is a number, and the same number is the same schedule.

A schedule is a few transfers between a prefill and a decode process, and a few faults at random moments:
a kill or a pause of either, a slow reader, an abort on either side, a lease that runs out, a connection
that is cut, a pool or a queue that is full. A transfer whose receiver was killed is pulled again by the
next attempt, as a job executor does. Afterwards: every pull ended, with exactly the sender's bytes or
with a typed error; every transfer ended once; every block of both pools is free; nothing hung.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvtransfer.errors import TransferErrorCode
from tests.support.kv_nodes import LEASE_SECONDS, PEER_SECONDS, TOO_LITTLE, Decode, Node, Prefill

TRANSPORTS = ("shm", "unix", "tcp", "grpc")
FAULTS = ("kill_p", "kill_d", "pause_p", "pause_d", "abort_p", "cancel_d", "cut")
P_BLOCKS, D_BLOCKS = 64, 48
PULL_SECONDS = 3.0
END_SECONDS = 60.0
"""Everything has its end by then, or it hangs: pull deadline, lease and peer timeout are 3 s at most; the
start of a process in a killed one's place took more than 20 s on a machine with a load of 10."""
TYPED = {code.name for code in TransferErrorCode} | {"cancelled", TOO_LITTLE}


@dataclass(frozen=True, slots=True)
class Transfer:
    """One of a schedule. Times in seconds from its start."""

    blocks: int
    chunk: int
    pause: float  # per chunk
    start: float
    pull_after: float  # from the prefill's start: before its end, or long after
    skip: int
    slow: bool
    transport: str


@dataclass(frozen=True, slots=True)
class Fault:
    kind: str
    at: float
    seconds: float  # of a pause
    target: int  # number of a transfer


@dataclass(frozen=True, slots=True)
class Schedule:
    seed: int
    transfers: tuple[Transfer, ...]
    faults: tuple[Fault, ...]


def schedule(seed: int) -> Schedule:
    """The schedule of that number."""
    rng = random.Random(seed)
    transfers = []
    for _ in range(rng.randint(1, 6)):  # more than a receiver's four slots and two places
        blocks = rng.randint(1, 20)
        transfers.append(
            Transfer(
                blocks,
                chunk=rng.randint(1, blocks),
                pause=rng.choice((0.0, 0.01, 0.05)),
                start=rng.random() * 0.1,
                pull_after=rng.choice((0.0, 0.0, 0.05, 0.2, LEASE_SECONDS * 1.6)),
                skip=rng.choice((0, 0, rng.randrange(blocks))),
                slow=rng.random() < 0.2,
                transport=rng.choice(TRANSPORTS),
            )
        )
    faults = [
        Fault(
            rng.choice(FAULTS),
            at=rng.random() * 0.4,
            seconds=rng.choice((0.05, 0.3, LEASE_SECONDS * 1.5, PEER_SECONDS * 1.5)),
            target=rng.randrange(len(transfers)),
        )
        for _ in range(rng.randint(0, 3))
    ]
    return Schedule(seed, tuple(transfers), tuple(faults))


@dataclass
class Outcome:
    """What became of a schedule; `problems` is empty unless there is a defect."""

    pulls: Counter[str] = field(default_factory=Counter)
    released: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    usage: dict[str, int] = field(default_factory=dict)


class Proxy:
    """Between the processes: a connection that can be cut. Data sockets go around it."""

    def __init__(self) -> None:
        self.port = 0
        self._target = 0
        self._open: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    def aim(self, target: int) -> None:
        self.cut()
        self._target = target

    def cut(self) -> None:
        for writer in self._open:
            writer.transport.abort()

    async def stop(self) -> None:
        self._server.close()
        self.cut()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)  # type: ignore[arg-type]  # a server's callback is a task of None
        with contextlib.suppress(OSError):
            there, back = await asyncio.open_connection("127.0.0.1", self._target)
            await asyncio.gather(self._pump(reader, back), self._pump(there, writer))
        writer.close()
        self._tasks.discard(task)  # type: ignore[arg-type]

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        except (OSError, RuntimeError):  # RuntimeError: uvloop's word for a transport that was aborted
            pass
        finally:
            self._open.discard(writer)
            writer.close()


class Lane:
    """A pair of processes that schedules run on, one after the other; killed ones are started anew."""

    def __init__(self, folder: Path, number: int) -> None:
        self._folder = folder
        self._number = number
        self._lives = 0
        self.proxy = Proxy()
        self.p: Node | None = None
        self.d: Node | None = None
        self.p_life = ""
        self.ends: dict[str, list[str]] = {}  # outcomes told, per pull
        self.released: dict[str, list[str]] = {}

    async def start(self) -> None:
        await self.proxy.start()
        await self.revive()

    def _told(self, what: str, key: str, outcome: str) -> None:
        (self.ends if what == "done" else self.released).setdefault(key, []).append(outcome)

    async def revive(self) -> None:
        """Both processes live after it."""
        self._lives += 1
        life = self._number * 100_000 + self._lives
        if self.p is None or not self.p.alive:
            self.p_life = f"p{life}"
            self.p = Node(Prefill, self._told, self._folder, P_BLOCKS, life, self.p_life)
            self.proxy.aim((await self.p.started())["port"])
        if self.d is None or not self.d.alive:
            self.d = Node(Decode, self._told, self._folder, D_BLOCKS, life, TRANSPORTS)
            await self.d.started()

    async def stop(self) -> None:
        for node in (self.p, self.d):
            if node is not None:
                node.signal(signal.SIGCONT)
                node.kill()
        await self.proxy.stop()

    # -- one schedule --------------------------------------------------------------------------------

    async def run(self, plan: Schedule) -> Outcome:
        """Within `END_SECONDS`, whatever happens."""
        await self.revive()
        self.ends.clear()
        self.released.clear()
        outcome = Outcome()
        assert self.p is not None and self.d is not None
        first_p, first_d = self.p, self.d
        try:
            async with asyncio.timeout(END_SECONDS):
                async with asyncio.TaskGroup() as group:
                    for number, transfer in enumerate(plan.transfers):
                        group.create_task(self._transfer(plan, number, transfer, outcome))
                    for fault in plan.faults:
                        group.create_task(self._fault(plan, fault))
                await self._settle(first_p, outcome)
        except TimeoutError:
            outcome.problems.append(f"no end within {END_SECONDS:g} s")
        for node in (first_p, first_d):
            node.signal(signal.SIGCONT)
        if outcome.problems:  # the next schedule must not inherit what this one left
            first_p.kill()
            first_d.kill()
        return outcome

    def _id(self, plan: Schedule, number: int) -> str:
        return f"{plan.seed}-{number}-{self._lives}"

    async def _transfer(self, plan: Schedule, number: int, transfer: Transfer, outcome: Outcome) -> None:
        transfer_id = self._id(plan, number)
        p, life = self.p, self.p_life
        assert p is not None
        await asyncio.sleep(transfer.start)
        try:
            began = await p.call(
                "prefill", transfer_id, plan.seed + number, transfer.blocks, transfer.chunk, transfer.pause
            )
        except ConnectionError:
            outcome.pulls["prefill_lost"] += 1
            return
        if began == TOO_LITTLE:
            outcome.pulls["prefill_refused"] += 1
            return
        await asyncio.sleep(transfer.pull_after)
        for attempt in (2, 3):
            result = await self._pull(plan, transfer_id, life, attempt, number, transfer)
            outcome.pulls[result] += 1
            if result not in TYPED | {"ok", "killed"}:
                outcome.problems.append(f"transfer {number}, attempt {attempt}: {result}")
            if result != "killed" or not p.alive:
                break
            await self.revive()
        if p.alive and result != "ok":  # a job executor lets go of what it does not use
            with contextlib.suppress(ConnectionError):
                await p.call("abort", transfer_id)

    async def _pull(
        self, plan: Schedule, transfer_id: str, life: str, attempt: int, number: int, transfer: Transfer
    ) -> str:
        d, key = self.d, f"{transfer_id}/{attempt}"
        assert d is not None
        try:
            began: str = await d.call(
                "pull", key, transfer.transport, transfer.slow, f"127.0.0.1:{self.proxy.port}", life,
                transfer_id, attempt, plan.seed + number, transfer.blocks, transfer.skip, PULL_SECONDS,
            )  # fmt: skip
        except ConnectionError:
            return "killed"
        if began != "ok":
            return began
        while key not in self.ends:
            if not d.alive:
                return "killed"
            await asyncio.sleep(0.005)
        return self.ends[key][0]

    async def _fault(self, plan: Schedule, fault: Fault) -> None:
        p, d = self.p, self.d
        assert p is not None and d is not None
        await asyncio.sleep(fault.at)
        transfer_id = self._id(plan, fault.target)
        with contextlib.suppress(ConnectionError):
            match fault.kind:
                case "kill_p":
                    p.kill()
                case "kill_d":
                    d.kill()
                case "pause_p" | "pause_d":
                    node = p if fault.kind == "pause_p" else d
                    node.signal(signal.SIGSTOP)
                    await asyncio.sleep(fault.seconds)
                    node.signal(signal.SIGCONT)
                case "abort_p":
                    await p.call("abort", transfer_id)
                case "cancel_d":
                    await d.call("cancel", f"{transfer_id}/2")
                case "cut":
                    self.proxy.cut()

    async def _settle(self, p: Node, outcome: Outcome) -> None:
        """Both ends come to rest with all blocks free. Raises TimeoutError through `run` otherwise."""
        for name, node, blocks in (("p", self.p, P_BLOCKS), ("d", self.d, D_BLOCKS)):
            assert node is not None
            last: dict[str, Any] = {}
            try:
                async with asyncio.timeout(END_SECONDS / 2):
                    while node.alive:
                        last = await node.call("state")
                        if (last["active"], last["free"]) == (0, blocks):
                            outcome.usage |= {f"{name}_fds": last["fds"], f"{name}_rss": last["rss"]}
                            break
                        await asyncio.sleep(0.02)
            except TimeoutError:
                outcome.problems.append(f"{name} does not come to rest: {last}")
            except ConnectionError:
                pass
        for key, told in (*self.ends.items(), *self.released.items()):
            if len(told) != 1:
                outcome.problems.append(f"{key} ended {len(told)} times: {told}")
        outcome.released.update(told[0] for told in self.released.values())


@contextlib.asynccontextmanager
async def lanes(folder: Path, count: int) -> AsyncIterator[Sequence[Lane]]:
    """Lanes that are started, and stopped at the end."""
    made = [Lane(folder, number) for number in range(count)]
    try:
        await asyncio.gather(*(lane.start() for lane in made))
        yield made
    finally:
        await asyncio.gather(*(lane.stop() for lane in made))


async def run_all(
    folder: Path, seeds: Sequence[int], count: int, seconds: float = float("inf")
) -> dict[int, Outcome]:
    """Outcomes by seed, over `count` lanes; stops to begin new ones after `seconds`."""
    found: dict[int, Outcome] = {}
    left = list(reversed(seeds))
    clock = asyncio.get_running_loop().time
    ends = clock() + seconds
    async with lanes(folder, count) as made:

        async def work(lane: Lane) -> None:
            while left and clock() < ends:
                seed = left.pop()
                found[seed] = await lane.run(schedule(seed))

        await asyncio.gather(*(work(lane) for lane in made))
    return found
