"""Adapters with heads that classify texts, as PEFT saves them, with random weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, get_peft_model
from tests.helpers.peft_folders import quiet, randomise


def save_classifiers(
    model: Path, folder: Path, num: int, targets: Sequence[str] = ("query", "value")
) -> list[str]:
    """Make classifiers of 2 to 6 labels on a model with random weights; return their names."""
    names = [f"kind-{number}" for number in range(num)]
    for number, name in enumerate(names):
        torch.manual_seed(number)
        with quiet():
            bare = transformers.AutoModelForSequenceClassification.from_pretrained(
                model, num_labels=2 + number % 5
            )
            options = {"target_modules": [*targets], "r": 8}
            tuned = get_peft_model(bare, LoraConfig(task_type="SEQ_CLS", **options))
            randomise(tuned, "none", number)
            tuned.save_pretrained(folder / name)
    return names
