"""Traces, and the mutators that make them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.acceptance.faults.crowd import ADAPTERS, SCHEMA

_WORDS = (
    "the old harbour lay under rain while two boats came in and nobody spoke of the storm that had "
    "taken the third one with its nets and its lamp"
).split()
_STOPS = ("the", ".", "e", " a", "\n", "you")


@dataclass(slots=True)
class Shot:
    """One request of a trace: when it is sent, and when its client leaves, if it does."""

    body: dict[str, Any]
    at_s: float = 0.0
    leaves_after_s: float | None = None


@dataclass(slots=True)
class Trace:
    """Some requests, and who made them what they are."""

    shots: list[Shot]
    mutators: list[str] = field(default_factory=list)


Mutator = Callable[[random.Random, Trace], None]


def plain(draw: random.Random) -> Shot:
    """Return a request as most are."""
    return Shot(
        {
            "model": draw.choice(ADAPTERS) or "base",
            "messages": [{"role": "user", "content": _text(draw, draw.randint(1, 30))}],
            "max_tokens": draw.randint(1, 20),
            "temperature": 0.0,
            "stream": True,
        },
        at_s=draw.uniform(0.0, 1.5),
    )


def _text(draw: random.Random, num_words: int) -> str:
    return " ".join(draw.choice(_WORDS) for _ in range(num_words))


def burst(draw: random.Random, trace: Trace) -> None:
    """All at the same moment."""
    for shot in trace.shots:
        shot.at_s = 0.5


def leave(draw: random.Random, trace: Trace) -> None:
    """Some clients go while they are served, or before."""
    for shot in trace.shots:
        if draw.random() < 0.5:
            shot.leaves_after_s = draw.uniform(0.0, 0.8)


def shared_prefix(draw: random.Random, trace: Trace) -> None:
    """The same words with different adapters, and one with a little more."""
    text = _text(draw, draw.randint(40, 160))
    for number, shot in enumerate(trace.shots):
        shot.body["messages"] = [{"role": "user", "content": text + " and" * (number % 3)}]
        shot.body["model"] = (ADAPTERS[number % len(ADAPTERS)]) or "base"


def long_prompts(draw: random.Random, trace: Trace) -> None:
    """More than a step takes, and together more than the cache holds."""
    for shot in draw.sample(trace.shots, min(3, len(trace.shots))):
        content = _text(draw, draw.randint(300, 700))
        shot.body["messages"] = [{"role": "user", "content": content}]


def turns(draw: random.Random, trace: Trace) -> None:
    """Conversations that grow: each begins as the one before."""
    messages: list[dict[str, str]] = []
    for number, shot in enumerate(trace.shots):
        role = "assistant" if number % 2 else "user"
        messages.append({"role": role, "content": _text(draw, 12)})
        shot.body["messages"] = [*messages, {"role": "user", "content": "Go on."}]
        shot.at_s = 0.2 * number


def bind(draw: random.Random, trace: Trace) -> None:
    """Outputs that are bound to a schema, a pattern or a tool."""
    tool = {"type": "function", "function": {"name": "note", "parameters": SCHEMA}}
    for shot in trace.shots:
        if draw.random() < 0.6:
            bound: list[dict[str, Any]] = [
                {
                    "response_format": {
                        "type": "json_schema",
                        "json_schema": {"name": "x", "schema": SCHEMA},
                    }
                },
                {"response_format": {"type": "json_object"}},
                {"guided_regex": "[a-f]{3,9}(, [0-9]{1,4}){1,3}"},
                {"tools": [tool], "tool_choice": "required"},
            ]
            shot.body |= draw.choice(bound)


def extremes(draw: random.Random, trace: Trace) -> None:
    """Values at their bounds."""
    for shot in trace.shots:
        values: list[dict[str, Any]] = [
            {"max_tokens": 1}, {"stop": list(draw.sample(_STOPS, 4))}, {"logprobs": True, "top_logprobs": 20},
            {"presence_penalty": 2.0, "frequency_penalty": -2.0}, {"logit_bias": {str(n): -100 for n in range(300)}},
            {"top_p": 1e-6}, {"repetition_penalty": 1.9}, {"min_tokens": 5}, {"ignore_eos": True},
        ]  # fmt: skip
        for value in draw.sample(values, 2):
            shot.body |= value


def seeds(draw: random.Random, trace: Trace) -> None:
    """Draws, several of a request."""
    for shot in trace.shots:
        shot.body |= {"temperature": draw.choice([0.5, 1.0, 2.0]), "seed": draw.randrange(1 << 31)}
        shot.body |= {"n": draw.choice([1, 1, 2, 4]), "top_k": draw.choice([-1, 1, 40])}


def twins(draw: random.Random, trace: Trace) -> None:
    """One request many times, at moments close to each other."""
    first = trace.shots[0]
    for shot in trace.shots[1:]:
        shot.body = dict(first.body)
        shot.at_s = first.at_s + draw.uniform(0.0, 0.05)


MUTATORS: dict[str, Mutator] = {
    each.__name__: each
    for each in (burst, leave, shared_prefix, long_prompts, turns, bind, extremes, seeds, twins)
}


def make_trace(draw: random.Random) -> Trace:
    """Return a trace: requests as most are, and what one to four mutators make of them."""
    trace = Trace([plain(draw) for _ in range(draw.randint(2, 10))])
    trace.mutators = draw.sample(sorted(MUTATORS), draw.randint(1, 4))
    for name in trace.mutators:
        MUTATORS[name](draw, trace)
    return trace
