"""The committed adapters do their tasks on prompts that training never saw; the base does not.

By PEFT and transformers alone: this is about the files, not about the server.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from examples.check_adapters import good
from examples.demo.chat import Base, load_base
from examples.demo.measure import measure, with_adapters
from examples.demo.tasks import TASKS

# Held-out prompts per adapter: a full measurement (`python -m examples.check_adapters`) has more.
PROMPTS = 8
# Longer answers are cut: enough for each task, and the base has failed it by then.
MOST_TOKENS = 40


@pytest.fixture(scope="module")
def loaded() -> Iterator[tuple[Base, Any]]:
    """The base model, and the same with all adapters on it.

    One thread: steps of a few rows gain little from more, and lose much when cores are shared.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    base = load_base()
    yield base, with_adapters(base, list(TASKS))
    torch.set_num_threads(threads)


# The quickest is tried each time.
SLOW = [name for name in TASKS if name != "sentiment"]


@pytest.mark.parametrize(
    "name", ["sentiment", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_an_adapter_does_its_task_far_more_often_than_the_base(
    loaded: tuple[Base, Any], name: str
) -> None:
    base, model = loaded
    tokens = min(TASKS[name].max_new_tokens, MOST_TOKENS)
    task = dataclasses.replace(TASKS[name], max_new_tokens=tokens)
    score = measure(model, base.tokenizer, task, PROMPTS)
    replies = "\n".join(score.adapter)
    assert good(score), f"base {score.base_rate:.0%}, adapter {score.adapter_rate:.0%}\n{replies}"


def test_an_adapter_with_its_weights_at_zero_fails_the_same_check(
    loaded: tuple[Base, Any],
) -> None:
    """The check notices an adapter without effect."""
    base, model = loaded
    task = TASKS["sentiment"]
    weights = [weight for key, weight in model.named_parameters() if f"lora_B.{task.name}" in key]
    assert weights
    kept = [weight.detach().clone() for weight in weights]
    try:
        with torch.no_grad():
            for weight in weights:
                weight.zero_()
        score = measure(model, base.tokenizer, task, PROMPTS)
    finally:
        with torch.no_grad():
            for weight, old in zip(weights, kept):
                weight.copy_(old)
    assert score.adapter == score.base
    assert not good(score)
