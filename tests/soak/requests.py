"""What clients ask for: a fixed set of requests, each of which has one right answer."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.acceptance.faults.crowd import ADAPTERS
from tests.acceptance.faults.crowd import requests as crowd_requests

KEYS = ("sk-soak-tenant-one", "sk-soak-tenant-two", "sk-soak-tenant-three")
ADMIN_KEY = "sk-soak-operator"
_TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 8}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
NUM_CLASSIFIERS = 2
_POOLINGS = ("last", "mean", "max", "weightedmean")
_WORDS = "the sea was calm and the old clock struck nine while rain fell on the roof ".split()


@dataclass(frozen=True, slots=True)
class Ask:
    """One request."""

    body: dict[str, Any]
    # Of whose answer nothing is known beforehand: its adapter changes meanwhile, or is broken.
    is_free: bool = False


def fixed_requests() -> list[Ask]:
    """Return those whose answers never change: short, long, bound, with tools, drawn by seeds."""
    asks = [Ask(body) for body in crowd_requests(40)]
    for number in range(8):
        text = " ".join(
            _WORDS[(number * 7 + each) % len(_WORDS)] for each in range(300 + 40 * number)
        )
        asks.append(Ask(_chat(text, max_tokens=12)))
    for number in range(4):
        choice = {"tools": [_TOOL], "tool_choice": "required"}
        asks.append(Ask(_chat(f"{number} What is the weather in Rome?", max_tokens=40, **choice)))
    return [*asks, *map(Ask, _of_vectors()), *map(Ask, _of_labels())]


def _texts(number: int) -> list[str]:
    return [
        " ".join(_WORDS[(number * 5 + each) % len(_WORDS)] for each in range(length))
        for length in (1 + number, 20 + 11 * number)
    ]


def _of_labels() -> Iterator[dict[str, Any]]:
    """Yield bodies that ask adapters with heads of their own for labels."""
    for number in range(8):
        name = f"local:kind-{number % NUM_CLASSIFIERS}"
        yield {"model": name, "input": _texts(number)}


def _of_vectors() -> Iterator[dict[str, Any]]:
    """Yield bodies that ask for vectors of short and long texts, and for how near they are."""
    for number in range(16):
        texts = _texts(number)
        pooling = _POOLINGS[number % len(_POOLINGS)]
        model = ADAPTERS[number % len(ADAPTERS)]
        yield {"model": model, "input": texts, "pooling": pooling}
        if number % 4 == 0:
            yield {"model": model, "text_1": texts[0], "text_2": texts}


def _chat(text: str, **values: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": "base", "messages": messages, "temperature": 0.0, "stream": True, **values}


def churned(name: str, draw: random.Random) -> Ask:
    """Return a request for an adapter that comes and goes."""
    body = _chat(f"{draw.randrange(100)} Hello", max_tokens=draw.randint(1, 12))
    return Ask(body | {"model": name}, is_free=True)
