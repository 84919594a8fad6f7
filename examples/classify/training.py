"""Trains one classifier with PEFT, and measures it as it was saved."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from examples.classify.classifier import Classifier, Labelled, numbers_of
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)
from transformers.utils import logging

# The model that the package carries, as it is called where it comes from.
BASE_NAME = "sentence-transformers/all-MiniLM-L6-v2"
_CLASSES = {
    "SEQ_CLS": AutoModelForSequenceClassification, "TOKEN_CLS": AutoModelForTokenClassification,
}  # fmt: skip
_BATCH = 16
_POOL = 1_000
_RANK, _ALPHA, _TARGETS = 8, 16, ("query", "value")
_LEARNING_RATE = 2e-3
_WARM_UP = 10
_NO_LABEL = -100


def load_base(classifier: Classifier, folder: Path) -> tuple[Any, Any]:
    """Return the model with a new head for a classifier's labels, and its tokenizer."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    names = dict(enumerate(classifier.labels))
    is_whole = classifier.task_type == "SEQ_CLS"
    model = _CLASSES[classifier.task_type].from_pretrained(
        folder, dtype=torch.float32, id2label=names,
        label2id={label: number for number, label in names.items()},
        problem_type="single_label_classification" if is_whole else None,
    )  # fmt: skip
    model.name_or_path = BASE_NAME
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def train(
    classifier: Classifier, folder: Path, *, steps: int, seed: int,
    show: Callable[[int, float], None],
) -> Any:  # fmt: skip
    """Return the PEFT model after ``steps`` steps; ``show`` gets each step's loss."""
    torch.manual_seed(seed)
    base, tokenizer = load_base(classifier, folder)
    config = LoraConfig(
        task_type=classifier.task_type, base_model_name_or_path=BASE_NAME, r=_RANK,
        lora_alpha=_ALPHA, lora_dropout=0.0, target_modules=list(_TARGETS),
    )  # fmt: skip
    model = get_peft_model(base, config)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=_LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / _WARM_UP, 1.0) * (1 - step / steps)
    )
    rng = random.Random(f"{classifier.name}: train {seed}")
    pool = classifier.texts(rng, "train", _POOL)
    model.train()
    for step in range(1, steps + 1):
        logits, labels = answers(model, tokenizer, classifier, rng.sample(pool, _BATCH))
        loss = cross_entropy(logits, labels, ignore_index=_NO_LABEL)
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        show(step, loss.item())
    return model.eval()


def answers(
    model: Any, tokenizer: Any, classifier: Classifier, texts: list[Labelled]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scores (texts x labels, or texts x labels x tokens) and the right labels' numbers."""
    encoded = tokenizer(
        [each.text for each in texts],
        padding=True,
        return_offsets_mapping=True,
        return_tensors="pt",
    )
    offsets = encoded.pop("offset_mapping")
    logits = model(**encoded).logits
    if classifier.task_type == "SEQ_CLS":
        return logits, torch.tensor([classifier.labels.index(each.label) for each in texts])
    right = [
        torch.tensor(numbers_of(classifier, text, [tuple(each) for each in spans.tolist()]))
        for text, spans in zip(texts, offsets)
    ]
    is_padding = encoded["attention_mask"] == 0
    return logits.transpose(1, 2), torch.stack(right).masked_fill(is_padding, _NO_LABEL)


@torch.inference_mode()
def accuracy(classifier: Classifier, base: Path, saved: Path, count: int) -> float:
    """Return the share of held-out texts that a saved adapter gets right, by PEFT alone."""
    model, tokenizer = load_base(classifier, base)
    model = PeftModel.from_pretrained(model, saved).eval()
    texts = classifier.texts(random.Random(f"{classifier.name}: held-out"), "held-out", count)
    logits, labels = answers(model, tokenizer, classifier, texts)
    is_right = (logits.argmax(1) == labels) | (labels == _NO_LABEL)
    return float(is_right.view(len(texts), -1).all(1).float().mean())
