"""The price of a step."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from lorax_router.core.cost import LinearCost, StepWork
from lorax_router.simulator.cost import (
    error_of,
    fit_cost,
    prices_of,
    read_steps,
)
from lorax_router.simulator.server import PRESETS

TRUE = LinearCost(0.03, 2e-4, 1e-6, 2e-12, 4e-7)


def some_work(seed: int, count: int = 200) -> list[StepWork]:
    rng = random.Random(seed)
    return [
        StepWork(tokens, tokens * rng.randint(1, 600), rng.randint(0, 9) * 16_777_216, tokens * rng.choice([0, 8, 64]))
        for tokens in (rng.randint(1, 2048) for _ in range(count))
    ]  # fmt: skip


def test_a_fit_finds_the_prices_of_steps_that_follow_them() -> None:
    steps = [(work, TRUE.seconds(work)) for work in some_work(1)]
    cost = fit_cost(steps)
    assert prices_of(cost) == pytest.approx(prices_of(TRUE), rel=1e-6)
    assert error_of(cost, steps) < 1e-6


def test_a_fit_of_noisy_steps_is_near() -> None:
    rng = random.Random(2)
    steps = [(work, TRUE.seconds(work) * rng.uniform(0.9, 1.1)) for work in some_work(2, 2000)]
    cost = fit_cost(steps)
    assert cost.fixed_s == pytest.approx(TRUE.fixed_s, rel=0.2)
    assert cost.token_s == pytest.approx(TRUE.token_s, rel=0.1)
    assert error_of(cost, steps) < 0.06


def test_no_price_is_negative() -> None:
    # More tokens, less time: the best line falls.
    steps = [(StepWork(n, 0, 0, 0), 1.0 / n) for n in range(1, 20)]
    cost = fit_cost(steps)
    assert min(prices_of(cost)) >= 0
    assert cost.token_s == 0


def test_recorded_steps_are_read(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    rows = [{**work._asdict(), "seconds": TRUE.seconds(work)} for work in some_work(3)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    assert prices_of(fit_cost(read_steps(path))) == pytest.approx(prices_of(TRUE), rel=1e-6)


@pytest.mark.parametrize("line", ['{"tokens": 1}', "no json", "[1, 2]"])
def test_a_step_that_cannot_be_read_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "steps.jsonl"
    path.write_text("\n" + line)
    with pytest.raises(ValueError, match=r"steps\.jsonl:2: a step is a JSON object with tokens"):
        read_steps(path)


def test_one_step_is_too_few() -> None:
    with pytest.raises(ValueError, match="at least two"):
        fit_cost([(StepWork(1, 1, 0, 0), 1.0)])


@pytest.mark.parametrize(
    ("name", "work", "seconds"),
    [
        # 20 rows of VTC's evaluation: 30 + 4.8 + 11 ms.
        ("llama-2-7b-a10g", StepWork(20, 10_000, 0, 0), 0.0458),
        # A prompt of 1,000 tokens of rank 16: 4.1 + 23 + 0.03 + 0.02 + 1.06 ms.
        ("llama-3.1-8b-h200", StepWork(1000, 1000, 83_886_080, 16_000), 0.0282),
        # Measured: 148 ms at 32 rows; the line through all measurements is 10 % off there.
        ("smollm2-135m-cpu", StepWork(32, 0, 0, 0), 0.131),
    ],
)
def test_presets_are_what_their_arithmetic_says(name: str, work: StepWork, seconds: float) -> None:
    assert PRESETS[name].cost.seconds(work) == pytest.approx(seconds, rel=0.01)


def test_the_cpu_preset_is_the_line_through_the_measured_steps() -> None:
    measured = {1: 0.053, 8: 0.094, 32: 0.148, 64: 0.185}
    cost = fit_cost([(StepWork(rows, 0, 0, 0), seconds) for rows, seconds in measured.items()])
    preset = PRESETS["smollm2-135m-cpu"].cost
    assert (preset.fixed_s, preset.token_s) == pytest.approx((cost.fixed_s, cost.token_s), rel=0.01)
