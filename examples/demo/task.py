"""What a demo adapter is: prompts, the answers that teach it, and a judge."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "held-out"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One prompt, and what a right answer to it is known to contain."""

    prompt: str
    # A label, or key and value pairs; empty where only the form of the answer counts.
    expected: str | tuple[tuple[str, str | int], ...] = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """Size and place of an adapter: sized so that its file stays below 2 MB in float16."""

    rank: int
    alpha: int
    target_modules: tuple[str, ...]
    # The first layer that is adapted; the layers below are those of the base.
    first_layer: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One adapter's task."""

    name: str
    summary: str
    lora: Lora
    steps: int
    learning_rate: float
    # Room for the longest answer that the task asks for.
    max_new_tokens: int
    # Draws examples; the two splits share neither wordings nor the words filled in.
    examples: Callable[[random.Random, Split, int], list[Example]]
    # The answer to teach, made from the example and the base model's own answer. None drops
    # the example.
    target: Callable[[random.Random, Example, str], str | None]
    # Whether a reply does what the adapter is for.
    done: Callable[[Example, str], bool]
    # What `done` asks for, in words, for the model card.
    done_means: str
    # Which examples need the base model's answer to make the target from.
    needs_base_reply: Callable[[Example], bool]


def pick(rng: random.Random, words: str) -> str:
    """Return one of the words, which are separated by bars."""
    return rng.choice(words.split("|"))


def fill(rng: random.Random, template: str, words: dict[str, str]) -> str:
    """Replace each ``{slot}`` of the template by one of the slot's words.

    A digit after a slot's name draws again: ``{good} and {good2}``, never twice the same.
    """
    used: set[str] = set()

    def draw(slot: re.Match[str]) -> str:
        word = rng.choice([word for word in words[slot[1]].split("|") if word not in used])
        used.add(word)
        return word

    text = re.sub(r"\{([a-z_]+)\d?\}", draw, template)
    return re.sub(r"\b([Aa]) (?=[aeiou](?!se))", r"\1n ", text)


def sentence(text: str) -> str:
    """Return the text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def first_sentence(reply: str) -> str | None:
    """Return the first complete sentence of a reply if it stands alone, else None."""
    line = reply.strip().split("\n")[0]
    found = re.match(r"[A-Z][^\n\"*:]{8,150}?[.!?](?=\s|$)", line)
    return found[0] if found else None
