"""The model card of a demo adapter."""

from __future__ import annotations

from examples.demo.measure import Score

_CARD = """\
---
base_model: {model_id}
library_name: peft
license: apache-2.0
language: en
tags: [lora, demo]
---

# {name}

{summary}

A LoRA adapter for {model_id}: rank {rank}, alpha {alpha}, on {targets} of {layers}, float16.

Trained for {steps} steps of 8 examples (seed {seed}) by

```sh
python -m examples.train_adapters --only {name}
```

on examples that the script makes itself, through the model's own chat template.{distilled}

## Measured

On {count} held-out prompts, whose wordings and fillings the training data does not have,
greedily decoded; done means: {done_means}.

| | done |
| --- | --- |
| base model | {base:.0%} |
| with this adapter | {adapter:.0%} |

Some of these prompts and answers:

| prompt | base model | {name} |
| --- | --- | --- |
{rows}
"""
_DISTILLED = "\nThe content of the answers is the base model's own; the adapter changes their form."
_SHOWN = 6


def model_card(model_id: str, score: Score, *, steps: int, seed: int) -> str:
    """Return the card of the adapter that was measured."""
    task, lora = score.task, score.task.lora
    distilled = any(task.needs_base_reply(example) for example in score.examples)
    shown = list(zip(score.examples, score.base, score.adapter))[:_SHOWN]
    return _CARD.format(
        model_id=model_id,
        name=task.name,
        summary=task.summary,
        rank=lora.rank,
        alpha=lora.alpha,
        targets=", ".join(f"`{module}`" for module in lora.target_modules),
        layers=f"layers {lora.first_layer} and up" if lora.first_layer else "all layers",
        steps=steps,
        seed=seed,
        distilled=_DISTILLED if distilled else "",
        count=len(score.examples),
        done_means=task.done_means,
        base=score.base_rate,
        adapter=score.adapter_rate,
        rows="\n".join(
            f"| {cell(example.prompt)} | {cell(base)} | {cell(adapter)} |"
            for example, base, adapter in shown
        ),
    )


def cell(text: str, limit: int = 120) -> str:
    """Return a text as one table cell."""
    line = " ".join(text.split()).replace("|", "\\|")
    return line if len(line) <= limit else f"{line[:limit].rstrip()} …"
