"""Train the demo adapters on the embedded default model, from data made here.

    python -m examples.train_adapters [--only NAME] [--steps N]

Writes ``examples/adapters/NAME``. Data, order and initial weights depend on the seed only;
the last bits of the weights also on the processor and the number of threads.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from examples.demo.cards import model_card
from examples.demo.chat import load_base
from examples.demo.measure import measure, with_adapters
from examples.demo.task import Task
from examples.demo.tasks import ADAPTERS, TASKS
from examples.demo.training import train


def main() -> None:
    """Train the adapters that were asked for, one after the other."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    for name in arguments.only or TASKS:
        train_one(TASKS[name], arguments)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", action="append", choices=TASKS, help="may be given again")
    parser.add_argument("--steps", type=int, help="instead of the task's own number")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--held-out", type=int, default=60, help="prompts to measure with")
    parser.add_argument("--output", type=Path, default=ADAPTERS)
    return parser.parse_args()


def train_one(task: Task, arguments: argparse.Namespace) -> None:
    """Train, save and measure one adapter, and write its card."""
    steps = arguments.steps or task.steps
    started = time.monotonic()
    losses: list[float] = []

    def show(step: int, loss: float) -> None:
        losses.append(loss)
        if step % 10 == 0 or step == steps:
            mean = sum(losses[-10:]) / len(losses[-10:])
            seconds = time.monotonic() - started
            print(f"{task.name}: step {step}/{steps}, loss {mean:.3f}, {seconds:.0f} s", flush=True)

    base = load_base()
    save(
        train(base, task, steps=steps, seed=arguments.seed, show=show), arguments.output / task.name
    )
    # Measured as saved: a fresh base, and the weights after rounding.
    base = load_base()
    model = with_adapters(base, [task.name], arguments.output)
    score = measure(model, base.tokenizer, task, arguments.held_out)
    print(f"{task.name}: base {score.base_rate:.0%}, adapter {score.adapter_rate:.0%}", flush=True)
    card = model_card(base.model_id, score, steps=steps, seed=arguments.seed)
    (arguments.output / task.name / "README.md").write_text(card)


def save(model: Any, folder: Path) -> None:
    """Write weights in float16, which halves the file, and a configuration in stable order."""
    model.half()
    # Embeddings are not trained; "auto" would ask the hub about the vocabulary.
    model.save_pretrained(folder, save_embedding_layers=False)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["target_modules"].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
