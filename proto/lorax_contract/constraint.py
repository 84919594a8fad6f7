"""What an output is bound to, and how that is said in llguidance's language."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

# What a grammar may take: of its own size, and of each mask that is made by it. In the words of
# llguidance's parser, which the router's check and the shard both bind to them.
PARSER_LIMITS: dict[str, Any] = {
    "max_items_in_row": 8_000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 200_000,
}


class ConstraintKind(IntEnum):
    """In which language a constraint is given (the numbers are those of the wire)."""

    # A JSON schema, as JSON.
    JSON_SCHEMA = 1
    # A regular expression that the whole output matches.
    REGEX = 2
    # A grammar in llguidance's variant of Lark.
    LARK = 3
    # A JSON list of the texts that the output may be.
    CHOICE = 4
    # Grammars as llguidance has them, as JSON.
    LLGUIDANCE = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraint:
    """What one output is bound to; prompts are not."""

    kind: ConstraintKind
    # May hold what a client wants to keep to itself: no part of a repr.
    text: str
    # Where it binds a part of the output alone: a Lark grammar of the whole, less its rule
    # ``content``, which is what is bound.
    frame: str = ""
    # By which field of a body it was asked for: what errors name.
    field_name: str = field(default="response_format", compare=False)

    def __repr__(self) -> str:
        return f"Constraint({self.kind.name}, {len(self.text)} characters)"

    @property
    def key(self) -> str:
        """A digest that no other constraint has."""
        parts = json.dumps([self.kind.value, self.frame, self.text])
        return hashlib.sha256(parts.encode()).hexdigest()

    @property
    def grammar(self) -> str:
        """The same for llguidance; raises ValueError for a text that is not of its kind."""
        if self.frame:
            return _of_lark(f"{self.frame}\n{self._rule('content')}")
        match self.kind:
            case ConstraintKind.JSON_SCHEMA:
                return json.dumps({"grammars": [{"json_schema": json.loads(self.text)}]})
            case ConstraintKind.LARK:
                return _of_lark(self.text)
            case ConstraintKind.LLGUIDANCE:
                return self.text
        return _of_lark(self._rule("start"))

    def _rule(self, name: str) -> str:
        """Return the same as a rule of a Lark grammar."""
        match self.kind:
            case ConstraintKind.JSON_SCHEMA:
                return f"{name}: %json {json.dumps(json.loads(self.text))}"
            case ConstraintKind.REGEX:
                return f"{name}: /{_slashed(self.text)}/"
            case ConstraintKind.CHOICE:
                return f"{name}: CHOICE\nCHOICE: {_of_choices(json.loads(self.text))}"
            case ConstraintKind.LARK:
                return f"{name}: %lark {{\n{self.text}\n}}"
        raise ValueError("a grammar of llguidance's own is no part of another")


def _of_lark(text: str) -> str:
    return json.dumps({"grammars": [{"lark_grammar": text}]})


def _of_choices(choices: Any) -> str:
    is_list = isinstance(choices, list) and choices
    if not is_list or not all(isinstance(each, str) and each for each in choices):
        raise ValueError("a choice needs a list of texts, none of them empty")
    # One terminal: as rules, some thousands would be too many.
    return " | ".join(json.dumps(each, ensure_ascii=False) for each in choices)


def _slashed(pattern: str) -> str:
    """Return a pattern as it stands between slashes: there a slash is escaped, a line has no end."""
    if not pattern:
        raise ValueError("the regular expression is empty")
    escapes = {"/": r"\/", "\n": r"\n", "\r": r"\r", "\t": r"\t"}
    parts: list[str] = []
    characters = iter(pattern)
    for character in characters:
        if character == "\\":
            escaped = next(characters, "")
            parts.append(escapes.get(escaped, character + escaped))
        else:
            parts.append(escapes.get(character, character))
    return "".join(parts)
