"""The prices of steps, fitted while steps run."""

from __future__ import annotations

import random
from dataclasses import astuple

import pytest

from lorax_router.core.cost import CostFit, LinearCost, StepWork

TRUE = LinearCost(0.03, 2e-4, 1e-6, 2e-12, 4e-7)


def some_work(rng: random.Random) -> StepWork:
    """Return the work of a step: a few decodes, often with a chunk of a prompt."""
    rows = rng.randint(1, 64)
    chunk = rng.choice([0, rng.randint(16, 2048)])
    adapters, rank = rng.choice([(0, 0), (rng.randint(1, 16), rng.choice([8, 64]))])
    tokens = rows + chunk
    return StepWork(
        tokens, rows * rng.randint(16, 2000) + chunk, adapters * rank * 2_097_152, tokens * rank
    )


def decodes(rng: random.Random) -> StepWork:
    """Return the work of a step of decodes alone."""
    rows = rng.randint(1, 64)
    return StepWork(rows, rows * rng.randint(16, 2000), 0, 0)


def error_of(fit: CostFit, true: LinearCost, seed: int = 99) -> float:
    """Return the median relative error of what a fit predicts."""
    cost, rng = fit.cost(), random.Random(seed)
    assert cost is not None
    works = [some_work(rng) for _ in range(200)]
    errors = sorted(abs(cost.seconds(work) / true.seconds(work) - 1) for work in works)
    return errors[100]


def fed(rng: random.Random, num: int, true: LinearCost = TRUE, noise: float = 0.1) -> CostFit:
    """Return a fit that saw so many steps."""
    fit = CostFit()
    feed(fit, rng, num, true, noise)
    return fit


def feed(
    fit: CostFit, rng: random.Random, num: int, true: LinearCost = TRUE, noise: float = 0.1
) -> None:
    """Let a fit see more steps."""
    for _ in range(num):
        work = some_work(rng)
        fit.observe(work, true.seconds(work) * rng.uniform(1 - noise, 1 + noise))


def test_nothing_is_said_of_steps_before_some_were_seen() -> None:
    fit = CostFit()
    assert fit.cost() is None
    fit.observe(StepWork(1, 1, 0, 0), 0.0)
    assert fit.num_steps == 0


def test_a_known_model_is_found_in_exact_steps() -> None:
    cost = fed(random.Random(1), 3000, noise=0.0).cost()
    assert cost is not None
    assert astuple(cost) == pytest.approx(astuple(TRUE), rel=0.02)


@pytest.mark.parametrize("seed", range(5))
def test_a_known_model_is_found_in_noisy_steps(seed: int) -> None:
    fit = fed(random.Random(seed), 1000)
    cost = fit.cost()
    assert cost is not None
    assert error_of(fit, TRUE) < 0.03
    assert cost.token_s == pytest.approx(TRUE.token_s, rel=0.1)


@pytest.mark.parametrize("factor", [100.0, 0.001])
def test_wild_steps_do_not_ruin_the_prices(factor: float) -> None:
    """One in twenty, all in one direction."""
    rng = random.Random(3)
    fit = fed(rng, 300)
    for number in range(200):
        work = some_work(rng)
        fit.observe(work, TRUE.seconds(work) * (factor if number % 20 == 0 else 1.0))
    assert error_of(fit, TRUE) < 0.1


def test_a_wild_first_step_is_forgotten() -> None:
    rng = random.Random(4)
    fit = CostFit()
    fit.observe(StepWork(100, 100, 0, 0), 20.0)
    feed(fit, rng, 200)
    assert error_of(fit, TRUE) < 0.05


def test_prices_follow_a_server_that_became_slower() -> None:
    rng = random.Random(5)
    fit = fed(rng, 1000)
    slower = LinearCost(*(2 * price for price in astuple(TRUE)))
    feed(fit, rng, 600, slower)
    assert error_of(fit, slower) < 0.1


def test_no_price_is_negative() -> None:
    """More tokens, less time: the best line falls."""
    fit = CostFit()
    for number in range(1, 200):
        tokens = 1 + number % 20
        fit.observe(StepWork(tokens, 3 * tokens, tokens, 0), 1.0 / tokens)
        cost = fit.cost()
        assert cost is None or min(astuple(cost)) >= 0
    assert cost is not None
    assert cost.token_rank_s == 0


def test_what_steps_do_not_tell_apart_keeps_its_price() -> None:
    """An hour of decodes says nothing of adapters: what they cost is still known after it."""
    rng = random.Random(6)
    fit = fed(rng, 1000, noise=0.02)
    for _ in range(5000):
        work = decodes(rng)
        fit.observe(work, TRUE.seconds(work) * rng.uniform(0.98, 1.02))
    assert error_of(fit, TRUE) < 0.05
