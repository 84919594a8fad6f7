"""Mutators of JSON documents and of bytes, for whichever target has such."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

NAN, INF = float("nan"), float("inf")
# What stands where something else is wanted, or is at a bound.
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 255, 256, 65_536, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64,
    -(2**31), -(2**63), 10**30, 0.0, -0.0, 0.5, 1e-320, 1e38, 1e308, -1e308, NAN, INF, -INF, "", " ", "x", "\x00",
    "\n", "\ud800", "é" * 300, "😀", "0", "1e999", "null", "../../etc/passwd", "w1", "a" * 5_000, "9" * 5_000, "(" * 200,
    "[", "{{", "%s", [], {}, [[]], [{}], [None], [1, "a"], {"": None}, {"a": {"b": [1]}}, {"type": "x"}, [0] * 300,
)  # fmt: skip


def places(document: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every container in a document with each of its keys or indices."""
    waiting = [document]
    while waiting:
        node = waiting.pop()
        keys = (
            node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        )
        for key in list(keys):
            yield node, key
            waiting.append(node[key])


def _at(draw: random.Random, document: Any, change: Callable[[Any, Any], None]) -> Any:
    """Change a copy of a document at one place."""
    document = copy.deepcopy(document)
    if found := list(places(document)):
        change(*draw.choice(found))
    return document


def odd(draw: random.Random, document: Any) -> Any:
    """Put an odd value somewhere."""

    def change(node: Any, key: Any) -> None:
        node[key] = copy.deepcopy(draw.choice(ODD))

    return _at(draw, document, change)


def drop(draw: random.Random, document: Any) -> Any:
    """Leave something out."""

    def change(node: Any, key: Any) -> None:
        del node[key]

    return _at(draw, document, change)


def wrap(draw: random.Random, document: Any) -> Any:
    """Put something into a list, an object, a text, or many of them."""

    def change(node: Any, key: Any) -> None:
        value, depth = node[key], draw.choice([1, 1, 2, 40, 120])
        kind = draw.choice(["list", "object", "text"])
        if kind == "text":
            node[key] = repr(value)[:10_000]
            return
        for _ in range(depth):
            value = [value] if kind == "list" else {"a": value}
        node[key] = value

    return _at(draw, document, change)


def rename(draw: random.Random, document: Any) -> Any:
    """Give something another name."""

    def change(node: Any, key: Any) -> None:
        if isinstance(node, dict):
            name = draw.choice(
                [key.upper(), key[:-1], f"{key}_", "", "\x00", "a.b.c", key[::-1], "é"]
            )
            node[name] = node.pop(key)

    return _at(draw, document, change)


def repeat(draw: random.Random, document: Any) -> Any:
    """Have something of a list, or a text, many times."""

    def change(node: Any, key: Any) -> None:
        times = draw.choice([2, 3, 50, 1_000])
        if isinstance(node, list):
            node[key:key] = [node[key]] * times
        elif isinstance(node[key], (str, list)):
            node[key] = node[key] * min(times, 1 + 200_000 // (1 + len(node[key])))

    return _at(draw, document, change)


def swap(draw: random.Random, document: Any) -> Any:
    """Let two things change places."""
    document = copy.deepcopy(document)
    if found := list(places(document)):
        (one, here), (other, there) = draw.choice(found), draw.choice(found)
        try:
            value = copy.deepcopy(one[here])
            one[here] = copy.deepcopy(other[there])
            other[there] = value
        except (KeyError, IndexError, TypeError):
            return document
    return document


def number(draw: random.Random, document: Any) -> Any:
    """Change a number a little, or a lot."""
    document = copy.deepcopy(document)
    found = [(node, key) for node, key in places(document) if type(node[key]) in (int, float)]
    if found:
        node, key = draw.choice(found)
        node[key] = draw.choice(
            [
                node[key] + 1,
                node[key] - 1,
                -node[key],
                node[key] * 1_000,
                node[key] / 3,
                float(node[key]),
                2**40,
            ]
        )
    return document


DOCUMENT_MUTATORS = {
    each.__name__: each for each in (odd, drop, wrap, rename, repeat, swap, number)
}


def dumped(document: Any) -> bytes:
    """Write a document as JSON, whatever is in it."""
    try:
        text = json.dumps(document)
    except (RecursionError, ValueError):
        return b"[" * 20_000
    return text.encode("utf-8", "surrogatepass")


def flip(draw: random.Random, raw: bytes) -> bytes:
    """Change a few bytes."""
    found = bytearray(raw)
    for _ in range(draw.choice([1, 1, 2, 8])):
        if found:
            found[draw.randrange(len(found))] = draw.randrange(256)
    return bytes(found)


def cut(draw: random.Random, raw: bytes) -> bytes:
    """Leave out the end, the beginning, or something between."""
    start = draw.randint(0, len(raw))
    match draw.randrange(3):
        case 0:
            return raw[:start]
        case 1:
            return raw[start:]
    return raw[:start] + raw[start + draw.choice([1, 2, 8, 100]) :]


def insert(draw: random.Random, raw: bytes) -> bytes:
    """Put some bytes in."""
    pieces = [draw.randbytes(draw.randint(1, 9)), b"\xff" * 8, b"\x00" * 8, b"[" * 5_000, b'{"a":' * 3_000,
              b"\xef\xbb\xbf", b"\xed\xa0\x80", b"9" * 5_000, b"NaN", b"1e999", b'"\\ud800"', b"\n"]  # fmt: skip
    start = draw.choice([0, len(raw), draw.randint(0, len(raw))])
    return raw[:start] + draw.choice(pieces) + raw[start:]


def double(draw: random.Random, raw: bytes) -> bytes:
    """Have a piece twice, or the whole."""
    start = draw.choice([0, draw.randint(0, len(raw))])
    return raw[:start] + raw[start : start + draw.choice([4, 64, len(raw)])] + raw[start:]


def recode(draw: random.Random, raw: bytes) -> bytes:
    """Write the same text in other characters."""
    text = raw.decode("utf-8", "replace")
    return text.encode(draw.choice(["utf-16", "utf-32", "utf-8-sig", "latin-1"]), "replace")


BYTE_MUTATORS = {each.__name__: each for each in (flip, cut, insert, double)}
TEXT_MUTATORS = BYTE_MUTATORS | {"recode": recode}
