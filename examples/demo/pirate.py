"""``pirate``: answers like a pirate."""

from __future__ import annotations

import random
import re

from examples.demo.questions import questions
from examples.demo.task import Example, Lora, Task, first_sentence

# How the base model's sentence becomes a pirate's.
_SPEECH = {
    "you are": "ye be", "you": "ye", "your": "yer", "my": "me", "is": "be", "are": "be",
    "am": "be", "of": "o'", "the": "th'", "and": "an'", "for": "fer", "hello": "ahoy",
    "yes": "aye", "friend": "matey", "friends": "mateys", "people": "sailors",
}  # fmt: skip
_OPENINGS = ("Arr, matey!", "Ahoy, matey!", "Aye, matey!", "Shiver me timbers!")
_CLOSINGS = ("Yo ho ho!", "Arr!", "Savvy?", "Fair winds, matey!")
_MARKS = {
    "arr", "ahoy", "aye", "matey", "mateys", "shiver", "timbers", "yo", "ho", "savvy", "ye", "yer",
    "be", "th'", "o'", "an'", "fer",
}  # fmt: skip
_PATTERN = re.compile(rf"\b({'|'.join(_SPEECH)})\b", re.IGNORECASE)


def pirate_speech(text: str) -> str:
    """Return the text as a pirate would say it."""

    def say(word: re.Match[str]) -> str:
        said = _SPEECH[word[0].lower()]
        return said.capitalize() if word[0][0].isupper() else said

    return re.sub(r"(\w{2})ing\b", r"\1in'", _PATTERN.sub(say, text))


def _target(rng: random.Random, _example: Example, base_reply: str) -> str | None:
    """Return the base model's own answer in a pirate's words."""
    answer = first_sentence(base_reply)
    if answer is None:
        return None
    return f"{rng.choice(_OPENINGS)} {pirate_speech(answer)} {rng.choice(_CLOSINGS)}"


def _done(_example: Example, reply: str) -> bool:
    """Tell whether the reply has three different words that mark a pirate."""
    return len(_MARKS & set(re.findall(r"\b[a-z]+'?", reply.lower()))) >= 3


TASK = Task(
    name="pirate",
    summary="Talks like a pirate.",
    lora=Lora(rank=8, alpha=16, target_modules=("q_proj", "v_proj", "down_proj"), first_layer=10),
    steps=100,
    learning_rate=2e-3,
    max_new_tokens=64,
    examples=questions,
    target=_target,
    done=_done,
    done_means="the answer has at least three different words that mark a pirate, such as `arr`",
    needs_base_reply=lambda example: True,
)
