"""``mood``: whether a text is positive or negative."""

from __future__ import annotations

import random

from examples.classify.classifier import Classifier, Labelled
from examples.demo import sentiment
from examples.demo.task import Split


def _texts(rng: random.Random, split: Split, count: int) -> list[Labelled]:
    """Draw the texts of the adapter that answers with a word, without the neutral ones."""
    drawn = sentiment.TASK.examples(rng, split, 3 * (count + 1) // 2)
    texts = [Labelled(each.prompt, str(each.expected)) for each in drawn]
    return [text for text in texts if text.label != "neutral"][:count]


MOOD = Classifier(
    name="mood",
    summary="Says whether a text is `positive` or `negative`.",
    task_type="SEQ_CLS",
    labels=("negative", "positive"),
    steps=150,
    texts=_texts,
    right_means="the label with the highest score is the right one",
)
