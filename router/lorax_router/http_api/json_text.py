"""JSON as bytes: answers and events of all dialects."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping
from math import isfinite
from typing import Any

import orjson

# The lowest 32-bit number: what JSON cannot say of a logprob.
_LOWEST_LOGPROB = -3.4028234663852886e38

Json = dict[str, Any]


def dumps(document: object) -> bytes:
    """Return compact JSON, whatever a client's own values in it are.

    Text that is not valid Unicode is repaired; integers may have more than 64 bits. Arrays of numpy
    become lists; float32 has as many digits as tell it from its neighbours, which is half of a
    float's.
    """
    try:
        return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
    except TypeError:
        text = json.dumps(_repaired(document), ensure_ascii=False, separators=(",", ":"))
        return text.encode()


def event(document: object) -> bytes:
    """One server-sent event."""
    return b"data: " + dumps(document) + b"\n\n"


# What nobody else can write.
_PLACE = uuid.uuid4().hex


class EventOfText:
    """A server-sent event that is always the same but for one text: the rest is written once.

    ``document`` makes the event's document of a text.
    """

    __slots__ = ("_after", "_before")

    def __init__(self, document: Callable[[str], object]) -> None:
        self._before, self._after = event(document(_PLACE)).split(dumps(_PLACE))

    def of(self, text: str) -> bytes:
        """Return the event of a text."""
        return self._before + dumps(text) + self._after


def finite(logprob: float) -> float:
    """A logprob that JSON can say."""
    return logprob if isfinite(logprob) else _LOWEST_LOGPROB


def _repaired(value: object) -> object:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, float):
        return value if isfinite(value) else None
    if (tolist := getattr(value, "tolist", None)) is not None:
        return tolist()
    if isinstance(value, Mapping):
        return {_repaired(key): _repaired(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_repaired(each) for each in value]
    return value
