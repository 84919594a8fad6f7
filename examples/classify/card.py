"""The card of a demo classifier."""

from __future__ import annotations

from examples.classify.classifier import Classifier
from examples.classify.training import BASE_NAME

_CARD = """\
---
base_model: {base}
library_name: peft
license: apache-2.0
language: en
tags: [lora, demo]
---

# {name}

{summary}

A LoRA adapter (`{task_type}`) for {base}: rank 8 on `query` and `value` of all layers, and a head
with {num_labels} labels, float16. `config.json` names them.

Trained for {steps} steps of 16 texts (seed {seed}) by

```sh
python -m examples.train_classifiers --only {name}
```

on texts that the script makes itself.

## Measured

{right:.1%} of {count} held-out texts are right, whose wordings and fillings the training data does not
have; right means: {right_means}.
"""


def classifier_card(
    classifier: Classifier, right: float, *, count: int, steps: int, seed: int
) -> str:
    """Return the card of a classifier of which a share of so many texts is right."""
    return _CARD.format(
        base=BASE_NAME, name=classifier.name, summary=classifier.summary,
        task_type=classifier.task_type, num_labels=len(classifier.labels), steps=steps, seed=seed,
        right=right, count=count, right_means=classifier.right_means,
    )  # fmt: skip
