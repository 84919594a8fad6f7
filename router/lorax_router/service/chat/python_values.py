"""Python literals as JSON values: what models write who call functions in Python's syntax.

Not by Python's own parser: a text of a model is no reason to end the process, which that one
can do with what is nested deeply enough.
"""

from __future__ import annotations

import re
from typing import Any

_MAX_DEPTH = 64
_TOKEN = re.compile(
    r"""\s*(?:
      (?P<string>[rRuU]?(?:'''(?:[^\\]|\\.)*?'''|\"\"\"(?:[^\\]|\\.)*?\"\"\"
        |'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"))
      |(?P<number>[+-]?(?:\d+\.\d*|\.\d+|\d+)(?:[eE][+-]?\d+)?)(?![\w.])
      |(?P<word>[^\W\d]\w*)
      |(?P<sign>[\[\](){},:=])
    )""",
    re.VERBOSE | re.DOTALL,
)
_WORDS: dict[str, Any] = {
    "True": True, "False": False, "None": None, "true": True, "false": False, "null": None,
}  # fmt: skip
_CLOSING = {"[": "]", "(": ")", "{": "}"}
_ESCAPE = re.compile(
    r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|([0-7]{1,3})|(.))", re.DOTALL
)
_ESCAPED = {
    "n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v", "\n": "",
    "\\": "\\", "'": "'", '"': '"',
}  # fmt: skip


def keyword_arguments(text: str) -> dict[str, Any]:
    """Return the values of ``a=1, b="x"``; raises ValueError for what is no such text."""
    return _Reader(text).keywords()


class _Reader:
    def __init__(self, text: str) -> None:
        self._tokens: list[tuple[str, str]] = []
        at, text = 0, text.rstrip()
        while at < len(text):
            found = _TOKEN.match(text, at)
            if found is None or found.lastgroup is None:
                raise ValueError("no literal of Python")
            self._tokens.append((found.lastgroup, found[found.lastgroup]))
            at = found.end()
        self._tokens.append(("end", ""))
        self._at = 0

    def keywords(self) -> dict[str, Any]:
        values: dict[str, Any] = {}
        while self._peek() != ("end", ""):
            kind, name = self._next()
            if kind != "word" or name in values:
                raise ValueError("no keyword argument")
            self._expect("=")
            values[name] = self._value(0)
            if self._peek() != ("end", ""):
                self._expect(",")
        return values

    def _peek(self) -> tuple[str, str]:
        return self._tokens[self._at]

    def _next(self) -> tuple[str, str]:
        token = self._tokens[self._at]
        self._at += 1
        return token

    def _expect(self, sign: str) -> None:
        if self._next() != ("sign", sign):
            raise ValueError(f"{sign} is missing")

    def _value(self, depth: int) -> Any:
        kind, text = self._next()
        if kind == "number":
            return int(text) if text.lstrip("+-").isdigit() else float(text)
        if kind == "string":
            return self._strings(text)
        if kind == "word" and text in _WORDS:
            return _WORDS[text]
        if text not in _CLOSING or depth == _MAX_DEPTH:
            raise ValueError("no literal of Python")
        return self._members(text, depth) if text == "{" else self._items(text, depth)

    def _strings(self, text: str) -> str:
        """Return a string, which may be written as several in a row."""
        pieces = [_string(text)]
        while self._peek()[0] == "string":
            pieces.append(_string(self._next()[1]))
        return "".join(pieces)

    def _items(self, opening: str, depth: int) -> Any:
        closing, items, has_comma = _CLOSING[opening], [], False
        while self._peek() != ("sign", closing):
            items.append(self._value(depth + 1))
            if has_comma := self._peek() == ("sign", ","):
                self._next()
            elif self._peek() != ("sign", closing):
                raise ValueError("a comma is missing")
        self._next()
        is_grouped = opening == "(" and len(items) == 1 and not has_comma
        return items[0] if is_grouped else items

    def _members(self, opening: str, depth: int) -> dict[str, Any]:
        members: dict[str, Any] = {}
        while self._peek() != ("sign", "}"):
            key = self._value(depth + 1)
            if not isinstance(key, str):
                raise ValueError("a key is no string")
            self._expect(":")
            members[key] = self._value(depth + 1)
            if self._peek() == ("sign", ","):
                self._next()
            elif self._peek() != ("sign", "}"):
                raise ValueError("a comma is missing")
        self._next()
        return members


def _string(token: str) -> str:
    prefix = token[0] if token[0] in "rRuU" else ""
    quoted = token[len(prefix) :]
    size = 3 if quoted[:3] in ("'''", '"""') and len(quoted) >= 6 else 1
    inner = quoted[size:-size]
    return inner if prefix in ("r", "R") else _ESCAPE.sub(_unescaped, inner)


def _unescaped(found: re.Match[str]) -> str:
    two, four, eight, octal, other = found.groups()
    if digits := two or four or eight:
        return chr(int(digits, 16)) if int(digits, 16) <= 0x10FFFF else found[0]
    if octal:
        return chr(int(octal, 8))
    # As Python: an escape that means nothing stays as it is.
    return _ESCAPED.get(other, found[0])
