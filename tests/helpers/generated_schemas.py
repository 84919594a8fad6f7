"""JSON schemas of all kinds from a seed, each with outputs of bounded length.

What could be written without an end has a bound: strings, arrays, numbers with a fraction. Nothing
here is recursive. ``Schemas(seed).document()`` gives one schema after another, the same for the
same seed; ``used`` counts what they were made of.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

Schema = dict[str, Any]

_MAX_DEPTH = 3
_NAMES = (
    "name", "age", "city", "kind", "tags", "price", "is_new", "when", "größe", "first name", "名前",
    "a/b", "x~y", 'quo"te', "$id2", "back\\slash", "émoji 🙂", "n",
)  # fmt: skip
_WORDS = ("red", "green", "blau", "größer", "да", "はい", "a b", 'say "x"', "", "🙂", "1")
# All of bounded length.
_PATTERNS = (
    "^[A-Z][a-z]{1,10}$", "^[a-z]{2}-[0-9]{4}$", "^(foo|bar|ba[zr]+x?)$", "^[0-9]{5}(-[0-9]{4})?$",
    "^#[0-9a-f]{6}$", "^\\d{1,3}(\\.\\d{1,3}){3}$", '^[^\\s"]{3}$', "^(a|b){2,4}$", "^\\w{1,8}$",
    "^[äöüß]{1,4}$", "^v[0-9]+\\.[0-9]+$",
)  # fmt: skip
_DEFINITIONS = ("Item", "an item", "größe", "a/b", "x~y", "List[int]")
_FORMATS = ("date", "uuid", "ipv4", "time", "date-time", "email", "hostname")


class Schemas:
    """Draws schemas."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._definitions: dict[str, Schema] = {}
        self.used: Counter[str] = Counter()
        self._leaves: tuple[Callable[[], Schema], ...] = (
            self._string, self._pattern, self._format, self._integer, self._multiple, self._number,
            self._enumeration, self._constant, self._types, self._boolean, self._all_of,
        )  # fmt: skip
        self._inner: tuple[Callable[[int], Schema], ...] = (
            self._object, self._object, self._array, self._tuple, self._any_of, self._one_of,
            self._reference, self._map,
        )  # fmt: skip

    def document(self) -> Schema:
        """Return the next schema."""
        self._definitions = {}
        rng = self._rng
        if rng.random() < 0.8:
            root = self._object(0)
        else:
            root = rng.choice((self._array, self._tuple, self._any_of, self._one_of))(0)
        if self._definitions:
            root["$defs"] = self._definitions
        return root

    def _some(self, depth: int) -> Schema:
        """Return a schema for a place at this depth."""
        if depth >= _MAX_DEPTH or self._rng.random() < 0.55:
            return self._rng.choice(self._leaves)()
        return self._rng.choice(self._inner)(depth)

    def _counted(self, kind: str, schema: Schema) -> Schema:
        self.used[kind] += 1
        return schema

    # Leaves.

    def _string(self) -> Schema:
        most = self._rng.randint(1, 14)
        schema: Schema = {"type": "string", "maxLength": most}
        if self._rng.random() < 0.4:
            schema["minLength"] = self._rng.randint(0, most)
        return self._counted("string", schema)

    def _pattern(self) -> Schema:
        schema = {"type": "string", "pattern": self._rng.choice(_PATTERNS), "maxLength": 16}
        return self._counted("pattern", schema)

    def _format(self) -> Schema:
        name = self._rng.choice(_FORMATS)
        schema: Schema = {"type": "string", "format": name}
        if name in ("email", "hostname"):
            schema["maxLength"] = 20
        return self._counted(f"format {name}", schema)

    def _integer(self) -> Schema:
        low = self._rng.randint(-50, 50)
        high = low + self._rng.choice((0, 1, 9, 1000))
        names = self._rng.choice((
            ("minimum", "maximum"), ("exclusiveMinimum", "maximum"), ("minimum", "exclusiveMaximum"),
        ))  # fmt: skip
        below, above = names[0].startswith("ex"), names[1].startswith("ex")
        schema = {"type": "integer", names[0]: low - below, names[1]: high + above}
        return self._counted("integer", schema)

    def _multiple(self) -> Schema:
        step = self._rng.choice((2, 5, 7, 100))
        low = step * self._rng.randint(-2, 3)
        schema = {"type": "integer", "multipleOf": step, "minimum": low, "maximum": low + 4 * step}
        return self._counted("multipleOf", schema)

    def _number(self) -> Schema:
        low = round(self._rng.uniform(-3, 3), 1)
        high = low + self._rng.choice((1.5, 20))
        schema = {"type": "number", "minimum": low, "maximum": high}
        if self._rng.random() < 0.5:
            schema["multipleOf"] = self._rng.choice((0.5, 0.25, 0.01))
        return self._counted("number", schema)

    def _enumeration(self) -> Schema:
        values: list[Any] = self._rng.sample(_WORDS, self._rng.randint(1, 5))
        if self._rng.random() < 0.3:
            values += [None, True, 1.5, -3, [1, "x"], {"a": {"b": []}}]
        return self._counted("enum", {"enum": values})

    def _constant(self) -> Schema:
        values = (*_WORDS, 0, False, None, [], {}, [{"k": [None]}])
        return self._counted("const", {"const": self._rng.choice(values)})

    def _types(self) -> Schema:
        types = self._rng.sample(("boolean", "null", "string"), 2)
        return self._counted("type list", {"type": types, "maxLength": 8})

    def _boolean(self) -> Schema:
        return self._counted("boolean", {"type": self._rng.choice(("boolean", "null"))})

    def _all_of(self) -> Schema:
        low = self._rng.randint(0, 9)
        parts = [{"type": "integer", "minimum": low}, {"maximum": low + 20}]
        return self._counted("allOf", {"allOf": parts})

    # What holds others.

    def _object(self, depth: int) -> Schema:
        rng = self._rng
        names = rng.sample(_NAMES, rng.randint(1, 4 - min(depth, 2)))
        schema: Schema = {
            "type": "object",
            "properties": {name: self._some(depth + 1) for name in names},
        }
        required = [name for name in names if rng.random() < 0.7]
        if len(required) < len(names):
            self.used["optional"] += 1
        if required or rng.random() < 0.5:
            schema["required"] = required
        if rng.random() < 0.5:
            schema["additionalProperties"] = False
            self.used["additionalProperties"] += 1
        return self._counted("object", schema)

    def _array(self, depth: int) -> Schema:
        most = self._rng.randint(1, 3)
        schema: Schema = {"type": "array", "items": self._some(depth + 1), "maxItems": most}
        if self._rng.random() < 0.5:
            schema["minItems"] = self._rng.randint(0, most)
        return self._counted("array", schema)

    def _tuple(self, depth: int) -> Schema:
        places = [self._some(depth + 1) for _ in range(self._rng.randint(1, 3))]
        schema: Schema = {"type": "array", "prefixItems": places, "items": False}
        if self._rng.random() < 0.7:
            schema["minItems"] = len(places)
        return self._counted("prefixItems", schema)

    def _any_of(self, depth: int) -> Schema:
        choices = [self._some(depth + 1) for _ in range(self._rng.randint(2, 3))]
        return self._counted("anyOf", {"anyOf": choices})

    def _one_of(self, depth: int) -> Schema:
        """Choices of which no value fits two: objects of different kinds."""
        choices = []
        for kind in self._rng.sample("abcd", 2):
            shape = self._object(depth + 1)
            shape["properties"] = {"kind": {"const": kind}, **shape["properties"]}
            shape["properties"]["kind"] = {"const": kind}
            shape["required"] = sorted({*shape.get("required", ()), "kind"})
            choices.append(shape)
        return self._counted("oneOf", {"oneOf": choices})

    def _reference(self, depth: int) -> Schema:
        known = sorted(self._definitions)
        if known and self._rng.random() < 0.5:
            name = self._rng.choice(known)
        else:
            definition = self._some(depth + 1)
            name = f"{self._rng.choice(_DEFINITIONS)}{len(self._definitions)}"
            self._definitions[name] = definition
        pointer = name.replace("~", "~0").replace("/", "~1")
        return self._counted("$ref", {"$ref": f"#/$defs/{quote(pointer)}"})

    def _map(self, depth: int) -> Schema:
        schema: Schema = {"type": "object", "maxProperties": 2}
        if self._rng.random() < 0.5:
            schema["patternProperties"] = {"^k[0-9]$": self._some(depth + 2)}
            schema["additionalProperties"] = False
            return self._counted("patternProperties", schema)
        # Names are texts without an end: these are given.
        schema |= {"required": ["k 1", "k2"], "additionalProperties": self._some(depth + 2)}
        return self._counted("values", schema)
