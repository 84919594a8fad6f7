"""Prompts and lengths of answers, without adapters and times: what a workload is made of.

Prompts are random token ids, drawn anew for each seed: no cache has seen them. Lengths are
drawn from a generator of their own, so that they are the same in each round.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import NamedTuple

# Ids that every vocabulary of this size has, above where special tokens lie.
FIRST_ID, LAST_ID = 100, 40_000


class Question(NamedTuple):
    """One prompt and how long its answer is."""

    prompt_ids: tuple[int, ...]
    max_tokens: int
    at_s: float = 0.0
    """When it is asked, where no rate says it."""


@dataclass(frozen=True, slots=True)
class PromptSource:
    """Where prompts and lengths come from: two generators, apart from each other."""

    ids: random.Random
    lengths: random.Random
    last_id: int = LAST_ID

    @classmethod
    def of_round(cls, seed: int, number: int, last_id: int = LAST_ID) -> PromptSource:
        """Return the source of one round: ids of its own, lengths of all rounds."""
        return cls(random.Random(f"{seed}/{number}"), random.Random(seed), last_id)

    def prompt(self, num_tokens: int) -> tuple[int, ...]:
        """Return a prompt of so many ids."""
        return tuple(self.ids.randint(FIRST_ID, self.last_id) for _ in range(num_tokens))

    def between(self, bounds: tuple[int, int]) -> int:
        """Return a length within the bounds, both included."""
        return self.lengths.randint(*bounds)


def w1(source: PromptSource, *, requests: int = 32) -> list[Question]:
    """Prompts of 16 to 128 tokens; answers of 16, 32, 64 or 96. The lengths are always those.

    With ``random.seed(0)``: 32 prompts, each ``randint(16, 128)`` ids from
    ``randint(100, 40000)``; then 32 lengths from ``choice([16, 32, 64, 96])``. A further
    round has other ids and the same lengths.
    """
    classic = random.Random(0)
    prompts = [
        [classic.randint(100, 40_000) for _ in range(classic.randint(16, 128))]
        for _ in range(requests)
    ]
    lengths = [classic.choice([16, 32, 64, 96]) for _ in range(requests)]
    return [Question(source.prompt(len(ids)), length) for ids, length in zip(prompts, lengths)]


def mixed(
    source: PromptSource,
    *,
    requests: int = 40,
    prompt: tuple[int, int] = (8, 300),
    output: tuple[int, int] = (8, 160),
) -> list[Question]:
    """Prompts and answers of any length within bounds."""
    sizes = [(source.between(prompt), source.between(output)) for _ in range(requests)]
    return [Question(source.prompt(length), answer) for length, answer in sizes]


def long_prompts(source: PromptSource, *, requests: int = 16) -> list[Question]:
    """Prompts of 512 to 2,048 tokens, answers of 16 to 32."""
    return mixed(source, requests=requests, prompt=(512, 2048), output=(16, 32))


def long_answers(source: PromptSource, *, requests: int = 16) -> list[Question]:
    """Prompts of 16 to 64 tokens, answers of 256 to 512."""
    return mixed(source, requests=requests, prompt=(16, 64), output=(256, 512))


def fixed(
    source: PromptSource, *, requests: int = 32, prompt: int = 256, output: int = 128
) -> list[Question]:
    """All prompts of one length, and all answers: what sweeps are made of."""
    return mixed(source, requests=requests, prompt=(prompt, prompt), output=(output, output))


def chat(
    source: PromptSource,
    *,
    conversations: int = 8,
    turns: int = 3,
    system: int = 512,
    message: tuple[int, int] = (16, 96),
    output: tuple[int, int] = (16, 64),
) -> list[Question]:
    """Conversations over one system prompt: each turn's prompt begins with all that was before.

    What the assistant said is drawn too, so that requests do not depend on answers. First all
    first turns, then all second ones, and so on.
    """
    shared = source.prompt(system)
    told = [shared] * conversations
    questions = []
    for _ in range(turns):
        for each in range(conversations):
            asked = told[each] + source.prompt(source.between(message))
            length = source.between(output)
            questions.append(Question(asked, length))
            told[each] = asked + source.prompt(length)
    return questions


def fan_out(
    source: PromptSource, *, prompts: int = 4, ways: int = 8, prompt: int = 512, output: int = 4
) -> list[Question]:
    """Each prompt ``ways`` times, a short answer each: one adapter after the other judges it."""
    return [
        Question(ids, output)
        for ids in [source.prompt(prompt) for _ in range(prompts)]
        for _ in range(ways)
    ]


def interruption(
    source: PromptSource,
    *,
    running: int = 8,
    prompt: int = 32,
    output: int = 160,
    long: int = 4000,
    after: int = 3,
) -> list[Question]:
    """``running`` streams of short prompts, and ``after`` seconds later one long prompt."""
    streams = [Question(source.prompt(prompt), output) for _ in range(running)]
    return [*streams, Question(source.prompt(long), 8, float(after))]
