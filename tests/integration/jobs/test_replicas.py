"""Several gateway replicas, each with its own view: one beginning of prompts goes to one executor."""

from __future__ import annotations

import asyncio
import random
from typing import Any

from tests.integration.jobs.conftest import REVISION, collect, exact, linked, request, until

EXECUTORS = [f"te-{number}" for number in range(4)]


async def test_three_gateways_converge_on_one_executor_a_beginning(open_cluster: Any) -> None:
    """Cold, all three at the same moment, by hashing; warm, by the executors' cache events."""
    async with open_cluster() as cluster:
        sources = [await cluster.source(te_id) for te_id in EXECUTORS]
        gateways = [await cluster.runtime(gateway_id=f"gw-{number}") for number in range(3)]
        for gateway in gateways:
            await linked(gateway, *EXECUTORS)

        def at_rest() -> bool:
            views = [view for gateway in gateways for view in gateway.fleet.cluster_view(REVISION).views]
            return len(views) == 12 and not any(view.tasks for view in views)

        def known(blocks: int) -> bool:
            return all(len(gateway.fleet.prefixes) >= blocks for gateway in gateways)

        def places(since: list[int]) -> set[str]:
            return {te.te_id for te, had in zip(sources, since, strict=True) if len(te.submits) > had}

        rng = random.Random(4)
        homes = []
        for prompt in range(10):
            await until(at_rest)
            before = [len(te.submits) for te in sources]
            asked = [request(length=64, first=1000 * prompt, output=2, seed=number) for number in range(3)]
            jobs = [gateway.executor.submit(one) for gateway, one in zip(gateways, asked, strict=True)]
            answers = await asyncio.gather(*(collect(job) for job in jobs))
            assert [got.tokens[0] for got in answers] == [exact(one) for one in asked]
            cold = places(before)
            assert len(cold) == 1, "their hashes disagree"
            await until(lambda prompt=prompt: known(4 * (prompt + 1)))
            for turn, gateway in enumerate(rng.sample(gateways, 3)):  # a conversation over all of them
                await until(at_rest)
                before = [len(te.submits) for te in sources]
                longer = request(length=80 + 16 * turn, first=1000 * prompt, output=2)
                got = await collect(gateway.executor.submit(longer))
                assert got.cached[0] >= 64
                assert places(before) == cold
            homes.append(cold.pop())
        assert len(set(homes)) > 1, "everything went to one executor"
