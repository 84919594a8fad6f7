"""JSON schemas that no output can be bound to, by what is wrong with them."""

from __future__ import annotations

from typing import Any

_ENDLESS = {
    "type": "object", "properties": {"next": {"$ref": "#/$defs/a%20node"}}, "required": ["next"],
}  # fmt: skip


def _deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


REFUSED: dict[str, Any] = {
    "uniqueItems": {"type": "array", "items": {"type": "integer"}, "uniqueItems": True},
    "not": {"not": {"type": "string"}},
    "contains": {"type": "array", "contains": {"type": "string"}},
    "if": {"type": "string", "if": {"maxLength": 3}, "then": {"pattern": "^a"}},
    "dependentRequired": {"type": "object", "dependentRequired": {"a": ["b"]}},
    "propertyNames": {"type": "object", "propertyNames": {"maxLength": 3}},
    "unevaluatedProperties": {"type": "object", "unevaluatedProperties": False},
    "$dynamicRef": {"$dynamicAnchor": "a", "properties": {"x": {"$dynamicRef": "#a"}}},
    "an unknown format": {"type": "string", "format": "colour"},
    "an unknown type": {"type": "text"},
    "another document": {"$ref": "https://example.org/person.json"},
    "a pointer to nothing": {"$ref": "#/$defs/nobody"},
    "look-ahead": {"type": "string", "pattern": "^(?=a)b"},
    "a back reference": {"type": "string", "pattern": r"^(a)\1$"},
    "no regular expression": {"type": "string", "pattern": "^["},
    "choices that overlap": {"oneOf": [{"type": "integer"}, {"type": "number"}]},
    "crossed bounds": {"type": "integer", "minimum": 3, "maximum": 2},
    "crossed lengths": {"type": "string", "minLength": 3, "maxLength": 2},
    "no integer between": {"type": "integer", "minimum": 0.2, "maximum": 0.8},
    "a required property that cannot be": {
        "type": "object", "properties": {"a": False}, "required": ["a"],
    },
    "two types at once": {"allOf": [{"type": "string"}, {"type": "integer"}]},
    "an empty enum": {"enum": []},
    "no end": {"$ref": "#/$defs/a%20node", "$defs": {"a node": _ENDLESS}},
    "no end at the root": {"type": "array", "items": {"$ref": "#"}, "minItems": 1},
    "a negative length": {"type": "string", "maxLength": -1},
    "properties in a list": {"type": "object", "properties": ["a"]},
    "a text for a list": {"type": "object", "required": "a"},
    "too many optional properties": {
        "type": "object",
        "properties": {f"property {number}": {"type": "string"} for number in range(4000)},
    },
    "a pattern too large": {"type": "string", "pattern": "^(((a{1000}){1000}){1000})$"},
    "too long": {"enum": ["x" * 300_000]},
    "too deep": _deep(150),
}  # fmt: skip
