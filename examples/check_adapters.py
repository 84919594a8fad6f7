"""Measure how often the base model and each demo adapter do the adapter's task.

    python -m examples.check_adapters [--only NAME] [--held-out N] [--show N]
    python -m examples.check_adapters --prompt "The soup was cold."

With a prompt, its answers by the base model and by each adapter are shown instead.
By PEFT and transformers alone, on prompts whose wordings were never trained on.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from examples.demo.cards import cell
from examples.demo.chat import greedy_answers, load_base
from examples.demo.measure import Score, measure, with_adapters
from examples.demo.tasks import TASKS

# An adapter that is worth showing does its task this often, and so much oftener than the base.
LEAST_RATE = 0.8
LEAST_GAIN = 0.4
_SHOWN_TOKENS = 64


def good(score: Score) -> bool:
    """Tell whether the adapter does its task often, and far more often than the base."""
    rate = score.adapter_rate
    return rate >= LEAST_RATE and rate - score.base_rate >= LEAST_GAIN


def main() -> int:
    """Print one line per adapter; fail if one is not good."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    base = load_base()
    names = arguments.only or list(TASKS)
    model = with_adapters(base, names)
    if arguments.prompt is not None:
        answer(model, base.tokenizer, names, arguments.prompt)
        return 0
    print(f"{'adapter':12} {'base':>6} {'adapter':>8}")
    scores = []
    for name in names:
        score = measure(model, base.tokenizer, TASKS[name], arguments.held_out)
        print(f"{name:12} {score.base_rate:>6.0%} {score.adapter_rate:>8.0%}", flush=True)
        show(score, arguments.show)
        scores.append(score)
    return 0 if all(map(good, scores)) else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", action="append", choices=TASKS, help="may be given again")
    parser.add_argument("--held-out", type=int, default=60, help="prompts per adapter")
    parser.add_argument("--show", type=int, default=0, help="prompts to show with their answers")
    parser.add_argument("--prompt", help="answer this instead of measuring")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def answer(model: Any, tokenizer: Any, names: list[str], prompt: str) -> None:
    """Print the answers of the base model and of each adapter to one prompt."""
    with model.disable_adapter():
        print(f"{'base':12}", cell(greedy_answers(model, tokenizer, [prompt], _SHOWN_TOKENS)[0]))
    for name in names:
        model.set_adapter(name)
        print(f"{name:12}", cell(greedy_answers(model, tokenizer, [prompt], _SHOWN_TOKENS)[0]))


def show(score: Score, count: int) -> None:
    for example, base, adapter in list(zip(score.examples, score.base, score.adapter))[:count]:
        mark = "+" if score.task.done(example, adapter) else "-"
        print(f"  {mark} {example.prompt}\n    base:    {cell(base)}\n    adapter: {cell(adapter)}")


if __name__ == "__main__":
    sys.exit(main())
