"""What outputs are to be bound to: schemas, patterns, grammars and choices, checked, then compiled."""

from __future__ import annotations

import contextlib
import copy
import logging
import random
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.fuzz.targets.lost_processes import ProcessesLost
from tests.fuzz.targets.mutate import DOCUMENT_MUTATORS, ODD, TEXT_MUTATORS, dumped
from tests.fuzz.targets.target import (
    Case,
    FoundFaultError,
    LoopTarget,
    Mutator,
    require,
    require_words,
)
from tests.helpers.generated_schemas import Schemas
from tests.helpers.grammar_world import GrammarWorld, allowed
from tests.helpers.json_schemas import SCHEMAS
from tests.helpers.tiny_tokenizers import byte_level

from lorax_contract.errors import GenerationError, ValidationError
from lorax_router.service.constraints.checker import CheckLimits, ConstraintChecker
from lorax_router.service.constraints.formats import of_response_format, of_vllm
from lorax_shard.constraints.row import RowConstraint

_LIMITS = CheckLimits(quick_s=0.5)
_NUM_TOKENS = 24
_PATTERNS = ("[a-f]{3,9}(, [0-9]{1,4}){1,3}", "a|b|c+", r"\d{4}-\d{2}-\d{2}", "(foo|bar)*", "[^\\s\"']+", "x{2,5}y?", "(?i)abc", r"\w+@\w+\.com",
             "é+", r"[\u0041-\u005a]", ".*", "(a(b(c)))", "^a$")  # fmt: skip
_PIECES = ("(", ")", "[", "]", "{", "}", "{1,1000}", "{99999999}", "*", "+", "?", "|", "\\", "\\d", "\\b", "(?=a)", "(?<a>b)", "(?P<x>", "[^]",
           "[a-", "$", "^", "\\1", "\\p{L}", "\\x{110000}", "(a+)+", "(?:", ".", "\n", "/", "\u2028", "😀", "&", "~", "\\uD800", "(?i)")  # fmt: skip
_LARKS = (
    "start[max_tokens=5]: /a+/",'start: "a" b\nb: /[0-9]+/ | "c" start', 'start: WORD ("," WORD)*\nWORD: /[a-z]+/', 'start: %json {"type": "object"}',
          'start: x\nx: "a" | x "b"', 'root ::= "yes" | "no" more\nmore ::= [0-9]+', ('start: obj\nobj: "{" pair ("," pair)* "}"\npair: NAME ":" value\n'
          'value: NAME | obj\nNAME: /[a-z]{1,5}/'), 'start: "a"{2,4} /x+/')  # fmt: skip
_LARK_PIECES = ("start", ":", "|", '"x"', "/a+/", "\n", "(", ")", "*", "%ignore / /", "%import common.WORD", "[capture]", "{1,5}", "%json {}",
                '%lark { start: "a" }', "start: start", "x: y\ny: x", "<|end|>", "<[1-5]>", "%regex {}", "~", "->", "!", "?", "::=", "root ::= root",
                '"\\x00"', '"\\uD800"', "//", "#", 'start: ""', "@", "{999999}", "&")  # fmt: skip


class Grammars(LoopTarget):
    """A content is what a body has: the name of a field, and its value."""

    name = "grammars"
    num_per_opening = 2000
    most_cpu_s = 6.0

    def __init__(self) -> None:
        self.mutators = {name: _of_value(each) for name, each in DOCUMENT_MUTATORS.items()} | {
            each.__name__.removeprefix("_"): each
            for each in (_pieces, _keyword, _nested, _reference, _language, _spaced, _large)
        }
        self.raw_mutators = {name: _of_text(each) for name, each in TEXT_MUTATORS.items()}
        self._lost = ProcessesLost()

    def plain(self, draw: random.Random) -> Any:
        """Return one of some kinds that are taken."""
        match draw.randrange(5):
            case 0:
                return "json", copy.deepcopy(draw.choice(sorted(SCHEMAS.items()))[1])
            case 1:
                return "json", Schemas(draw.randrange(1 << 30)).document()
            case 2:
                return "regex", draw.choice(_PATTERNS)
            case 3:
                return "grammar", draw.choice(_LARKS)
        return "choice", draw.sample(["red", "green", "blue", "größer", 'say "x"', "a\nb", "1"], 3)

    async def opened(self, stack: contextlib.AsyncExitStack) -> None:
        """Start what checks, with the tokens of a small tokenizer."""
        folder = Path(stack.enter_context(TemporaryDirectory()))
        byte_level().save(str(folder / "tokenizer.json"))
        self._world = GrammarWorld(byte_level())
        self._checker = ConstraintChecker(str(folder / "tokenizer.json"), _LIMITS)
        stack.push_async_callback(self._checker.close)
        log = logging.getLogger("lorax_router.service.constraints.checker")
        log.addHandler(self._lost)
        stack.callback(log.removeHandler, self._lost)

    async def judged(self, case: Case) -> str:
        """It is refused in words that name a field, or a shard makes outputs of it."""
        name, value = case.content
        self._lost.words.clear()
        try:
            constraint = (
                of_response_format(value)
                if name == "response_format"
                else of_vllm({"structured_outputs": {name: value}})
            )
            if constraint is None:
                return "binds nothing"
            checked = await self._checker.check(constraint)
        except ValidationError as error:
            require_words(error.public)
            return "refused"
        finally:
            require(not self._lost.words, f"a process ended by an error: {self._lost.words}")
        return self._followed(checked)

    def _followed(self, checked: Any) -> str:
        """Compile what was checked as a shard does, and follow it for some tokens."""
        row = RowConstraint(self._world.matchers.of(checked, None))
        draw = random.Random(checked.key)
        try:
            row.start()
            for _ in range(_NUM_TOKENS):
                choices = allowed(row.mask())
                require(choices, "no token is allowed")
                token_id = draw.choice(choices)
                if token_id == self._world.eos:
                    break
                row.accept(token_id)
                row.fill()
        except ValidationError as error:
            raise FoundFaultError(f"it was checked, and does not compile: {error}") from error
        except GenerationError as error:
            # A limit that some outputs meet and others do not: that row ends in words.
            require_words(str(error))
            return "taken, an output met a limit"
        return "taken"


def _of_value(mutator: Mutator) -> Mutator:
    def change(draw: random.Random, content: Any) -> Any:
        name, value = content
        # So that the whole can be changed, too.
        return name, mutator(draw, {"value": value}).get("value")

    return change


def _of_text(mutator: Mutator) -> Mutator:
    def change(draw: random.Random, content: Any) -> Any:
        name, value = content
        raw = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else dumped(value)
        return name, mutator(draw, raw).decode("utf-8", "replace")

    return change


def _pieces(draw: random.Random, content: Any) -> Any:
    """Pieces of the language where they may make no sense."""
    name, value = content
    pieces = _LARK_PIECES if name == "grammar" else _PIECES
    if isinstance(value, str):
        for _ in range(draw.choice([1, 1, 2, 6])):
            place = draw.randint(0, len(value))
            value = value[:place] + draw.choice(pieces) + value[place + draw.choice([0, 0, 1, 4]) :]
        return name, value
    return name, {"type": "string", "pattern": "".join(draw.choices(_PIECES, k=draw.randint(1, 6)))}


_KEYWORDS = ("type", "properties", "required", "items", "prefixItems", "minItems", "maxItems", "enum", "const", "anyOf", "oneOf", "allOf", "not", "if",
             "then", "$ref", "$defs", "$id", "$anchor", "pattern", "format", "minLength", "maxLength", "minimum", "maximum", "multipleOf",
             "exclusiveMinimum", "additionalProperties", "patternProperties", "propertyNames", "minProperties", "maxProperties", "uniqueItems",
             "contains", "dependentSchemas", "dependentRequired", "unevaluatedProperties", "x-guidance", "definitions", "$schema", "$dynamicRef",
             "title", "default", "contentEncoding")  # fmt: skip
_TYPES = (
    "object",
    "array",
    "string",
    "integer",
    "number",
    "boolean",
    "null",
    "any",
    ["string", "null"],
    [],
)


def _a_schema(draw: random.Random, value: Any) -> dict[str, Any]:
    """Return one of the schemas in a value."""
    found = [value] if isinstance(value, dict) else []
    for node in found:
        found.extend(each for each in node.values() if isinstance(each, dict))
        found.extend(
            each
            for some in node.values()
            if isinstance(some, list)
            for each in some
            if isinstance(each, dict)
        )
        if len(found) > 200:
            break
    return draw.choice(found) if found else {}


def _keyword(draw: random.Random, content: Any) -> Any:
    """Keywords with values that they have, or have not."""
    name, value = content
    value = copy.deepcopy(value)
    node = _a_schema(draw, value)
    for _ in range(draw.randint(1, 3)):
        other = copy.deepcopy(_a_schema(draw, value)) or {"type": "string"}
        choices = [draw.choice(ODD), draw.choice(_TYPES), other, [other, {"type": "null"}], True, False, draw.randint(-2, 9), 10**6,
                   draw.choice(["date", "uuid", "ipv6", "uri", "regex", "idn-email", "json-pointer"]), ["a", "b"], {"a": other}]  # fmt: skip
        node[draw.choice(_KEYWORDS)] = draw.choice(choices)
    return name, value if isinstance(value, dict) else node


def _reference(draw: random.Random, content: Any) -> Any:
    """References: in circles, to nothing, to elsewhere."""
    name, value = content
    value = copy.deepcopy(value)
    node = _a_schema(draw, value)
    node["$ref"] = draw.choice(["#", "#/", "#/$defs/a", "#/properties/a", "#a", "http://127.0.0.1:9/x", "file:///etc/passwd", "#/$defs/a/b/~1", "%", "//[",
                                "http://[::1", "#/anyOf/0", "#/anyOf/99999999999999999999", "#/anyOf/²", "x#/y", "\ud800", "#" + "/a" * 3_000])  # fmt: skip
    if isinstance(value, dict):
        value["$defs"] = {
            "a": draw.choice(
                [
                    {"$ref": "#/$defs/a"},
                    {"$ref": "#"},
                    {"type": "string"},
                    {"$id": "http://[x"},
                    True,
                    5,
                ]
            )
        }
    return name, value if isinstance(value, dict) else node


def _nested(draw: random.Random, content: Any) -> Any:
    """Something within itself, often."""
    times = draw.choice([10, 60, 300])
    kind = draw.choice(["items", "anyOf", "not", "properties"])
    if content[0] != "json":
        return content[0], "(" * times + "a" + ")" * times if content[0] == "regex" else content[1]
    value = content[1]
    for _ in range(times):
        value = {"items": {"type": "array", "items": value}, "anyOf": {"anyOf": [value]}, "not": {"not": value},
                 "properties": {"type": "object", "properties": {"a": value}, "required": ["a"]}}[kind]  # fmt: skip
    return "json", value


def _language(draw: random.Random, content: Any) -> Any:
    """The same as another language, or as ``response_format`` has it."""
    _, value = content
    formats = [{"type": "json_schema", "json_schema": {"name": "x", "schema": value}}, {"type": "json_object", "schema": value},
               {"type": "regex", "value": value}, {"type": "json", "value": value}, {"type": value}, value]  # fmt: skip
    name = draw.choice(
        ["json", "regex", "grammar", "choice", "json_object", "structural_tag", "response_format"]
    )
    return name, draw.choice(formats) if name == "response_format" else value


def _spaced(draw: random.Random, content: Any) -> Any:
    """What llguidance is told beside a schema."""
    name, value = content
    told = {
        draw.choice(
            [
                "whitespace_pattern",
                "whitespace_flexible",
                "item_separator",
                "key_separator",
                "coerce_one_of",
                "lenient",
            ]
        ): draw.choice([*ODD, r"[ \n]*", "("])
    }
    return name, {**value, "x-guidance": draw.choice([told, told, *ODD])} if isinstance(
        value, dict
    ) else value


def _large(draw: random.Random, content: Any) -> Any:
    """Very many of something."""
    number = draw.choice([100, 1_000, 5_000])
    return draw.choice([
        ("json", {"enum": [f"word {n}" for n in range(number)]}),
        ("json", {"type": "object", "properties": {f"p{n}": {"type": "integer"} for n in range(number)}}),
        ("json", {"type": "string", "maxLength": number * 1_000}), ("json", {"type": "array", "items": {"type": "string"}, "minItems": number * 100}),
        ("choice", [f"word {n}" for n in range(number)]), ("regex", "(" + "|".join(f"w{n}" for n in range(number)) + ")+"),
        ("regex", f"(a{{0,{number}}}){{0,{number}}}"), ("grammar", "start: " + " | ".join(f'"w{n}"' for n in range(number))),
        ("grammar", "\n".join(["start: r0", *(f'r{n}: r{n + 1} | "a"' for n in range(number)), f'r{number}: "b"'])),
    ])  # fmt: skip
