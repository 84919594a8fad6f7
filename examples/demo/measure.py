"""How often base and adapters do a task on prompts whose wordings were never trained on."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.demo.chat import Base, greedy_answers
from examples.demo.task import Example, Task
from examples.demo.tasks import ADAPTERS
from peft import PeftModel

_SEED = "held-out 1"


@dataclass(frozen=True, slots=True)
class Score:
    """Held-out examples with the replies of base and adapter."""

    task: Task
    examples: list[Example]
    base: list[str]
    adapter: list[str]

    def rate(self, replies: list[str]) -> float:
        """Return the share of replies that do the task."""
        done = [self.task.done(*pair) for pair in zip(self.examples, replies)]
        return sum(done) / len(done)

    @property
    def base_rate(self) -> float:
        """The base model's share."""
        return self.rate(self.base)

    @property
    def adapter_rate(self) -> float:
        """The adapter's share."""
        return self.rate(self.adapter)


def held_out(task: Task, count: int) -> list[Example]:
    """Draw the held-out examples of a task: the same ones each time."""
    return task.examples(random.Random(f"{task.name}: {_SEED}"), "held-out", count)


def with_adapters(base: Base, names: list[str], folder: Path = ADAPTERS) -> Any:
    """Return the base with adapters of a folder on it, by PEFT."""
    first, *others = names
    model = PeftModel.from_pretrained(base.model, folder / first, adapter_name=first)
    for name in others:
        model.load_adapter(folder / name, adapter_name=name)
    return model.eval()


def measure(model: Any, tokenizer: Any, task: Task, count: int) -> Score:
    """Answer a task's held-out prompts without and with its adapter, loaded in ``model``."""
    examples = held_out(task, count)
    prompts = [example.prompt for example in examples]
    with model.disable_adapter():
        base = greedy_answers(model, tokenizer, prompts, task.max_new_tokens)
    model.set_adapter(task.name)
    adapter = greedy_answers(model, tokenizer, prompts, task.max_new_tokens)
    return Score(task, examples, base, adapter)
