"""What a demo classifier is: its labels, and texts that have them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from examples.demo.task import Split


class NamedPart(NamedTuple):
    """A part of a text that is called something: from character ``start`` to before ``end``."""

    start: int
    end: int
    kind: str


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text, and what is right to say of it: its label, or the names in it."""

    text: str
    label: str = ""
    names: tuple[NamedPart, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Classifier:
    """One demo classifier."""

    name: str
    summary: str
    # PEFT's: of a whole text, or of each token.
    task_type: Literal["SEQ_CLS", "TOKEN_CLS"]
    labels: tuple[str, ...]
    steps: int
    # Draws texts; the two splits share neither wordings nor the words filled in.
    texts: Callable[[random.Random, Split, int], list[Labelled]]
    # What counts as right, in words, for the card.
    right_means: str


def numbers_of(classifier: Classifier, text: Labelled, offsets: list[tuple[int, int]]) -> list[int]:
    """Return the right label of each token of a text, by number.

    ``offsets`` are the characters of each token, as the tokenizer gives them: tokens that it puts
    around texts have none, and are outside of names.
    """
    found = []
    for start, end in offsets:
        inside = (each for each in text.names if each.start <= start < end <= each.end)
        part = next(inside, None)
        label = "O" if part is None else f"{'B' if start == part.start else 'I'}-{part.kind}"
        found.append(classifier.labels.index(label))
    return found
