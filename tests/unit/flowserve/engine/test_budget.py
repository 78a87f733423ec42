"""The cost model against machines with known costs. Needs nothing."""

from __future__ import annotations

import random

import pytest

from flowserve.engine.budget import CostModel, StepBudget, StepShape, pairs_of


class Machine:
    def __init__(self, fixed: float, linear: float, attention: float, noise: float = 0.1) -> None:
        self.costs = (fixed, linear, attention)
        self.noise = noise
        self.random = random.Random(1)

    def seconds(self, shape: StepShape) -> float:
        fixed, linear, attention = self.costs
        base = fixed + linear * shape.tokens + attention * shape.pairs
        return base * (1 + self.noise * self.random.uniform(-1, 1))


def prefill(model: CostModel, machine: Machine, prompt: int, decodes: int = 0) -> list[float]:
    """Runs one prompt in budgeted chunks beside `decodes` streams; returns the steps' seconds."""
    steps: list[float] = []
    start = 0
    while start < prompt:
        budget = StepBudget(model, 512, 0.25, min_chunk=16)
        slices = [(200, 1)] * decodes
        for position, count in slices:
            budget.take(position, count)
        count = budget.chunk(start, prompt - start)
        assert count > 0
        shape = StepShape.of([*slices, (start, count)])
        steps.append(machine.seconds(shape))
        model.observe(shape, steps[-1])
        start += count
    return steps


@pytest.mark.parametrize("decodes", [0, 16])
@pytest.mark.parametrize(
    "machine",
    [
        Machine(0.01, 1 / 3000, 1e-8),
        Machine(0.03, 1 / 400, 4e-7),
        Machine(0.02, 1 / 150, 2e-6),
        Machine(0.0, 1 / 700, 3e-6),
    ],
    ids=["fast", "small cpu", "slow cpu", "attention-bound"],
)
def test_no_step_takes_half_a_second_and_the_time_is_used(machine: Machine, decodes: int) -> None:
    model = CostModel()
    steps = [second for _ in range(4) for second in prefill(model, machine, 3000, decodes)]
    assert max(steps[1:]) < 0.5, max(steps)
    later = steps[len(steps) // 2 :]
    per_step_possible = machine.seconds(StepShape(512, pairs_of(0, 512)))
    assert sorted(later)[len(later) // 2] > min(0.12, per_step_possible * 0.5), (
        "chunks are not needlessly small"
    )


def test_the_model_follows_a_machine_that_becomes_slower() -> None:
    model = CostModel()
    prefill(model, Machine(0.01, 1 / 1200, 1e-7), 6000)
    steps = prefill(model, Machine(0.02, 1 / 500, 3e-7), 6000)
    assert max(steps[8:]) < 0.5
    assert sum(step > 0.5 for step in steps) <= 4


def test_coefficients_are_never_negative() -> None:
    model = CostModel()
    noise = random.Random(7)
    for _ in range(300):
        tokens = noise.randrange(1, 512)
        model.observe(StepShape(tokens, noise.randrange(1, 10**6)), noise.uniform(0.001, 1))
        assert min(model.coefficients) >= 0
        assert model.tokens_within(0.25, StepShape(0, 0), 100) >= 0


def test_the_first_prefill_of_a_step_gets_a_block_even_when_decodes_fill_it() -> None:
    model = CostModel()
    for _ in range(10):
        model.observe(StepShape(64, 64 * 500), 0.6)
    budget = StepBudget(model, 512, 0.25, min_chunk=16)
    for _ in range(64):
        budget.take(500, 1)
    assert budget.chunk(0, 100) == 16
    budget.take(0, 16)
    assert budget.chunk(0, 100) == 0


def test_the_token_bound_holds() -> None:
    budget = StepBudget(CostModel(), 40, 10.0, min_chunk=16)
    budget.take(0, 30)
    assert budget.chunk(0, 100) == 10 and not budget.full
    budget.take(0, 10)
    assert budget.full and budget.chunk(0, 100) == 0


def test_the_time_of_a_prefill_is_what_its_chunks_take() -> None:
    model, machine = CostModel(), Machine(0.01, 1e-3, 1e-7, noise=0.02)
    assert model.prefill_seconds(0, 100, 0.25) is None
    for prompt in (300, 2000, 1200):
        prefill(model, machine, prompt)
    for count in (100, 1000, 2000):
        took = sum(prefill(model, machine, count))
        expected = model.prefill_seconds(0, count, 0.25)
        assert expected is not None and 0.7 * took < expected < 1.4 * took
