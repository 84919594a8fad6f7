"""Schemas of the kinds that people send, each with outputs that are bounded."""

from __future__ import annotations

from typing import Any

NAME = {"type": "string", "pattern": "^[A-Z][a-z]{1,10}$"}
WORD = {"type": "string", "maxLength": 12}


def obj(required: list[str] | None = None, **properties: Any) -> dict[str, Any]:
    """Return an object; all its properties are required unless some are named."""
    names = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": names}


SCHEMAS: dict[str, dict[str, Any]] = {
    "flat": obj(name=NAME, age={"type": "integer", "minimum": 0, "maximum": 120}),
    "nested": obj(person=obj(name=NAME, home=obj(city=NAME, zip={"type": "string", "pattern": "^[0-9]{5}$"}))),
    "enum": obj(color={"enum": ["red", "green", "blue"]}),
    "enum of kinds": obj(value={"enum": [1, "one", None, True, [1], {"a": 1}]}),
    "const": obj(kind={"const": "person"}, name=NAME),
    "any of": obj(value={"anyOf": [{"type": "integer", "minimum": 0, "maximum": 9}, {"type": "null"}]}),
    "union of objects": {"anyOf": [obj(cat=NAME), obj(dog=NAME)]},
    "discriminated": {"oneOf": [obj(kind={"const": "a"}, x={"type": "boolean"}),
                                obj(kind={"const": "b"}, y=WORD)]},
    "pattern": obj(id={"type": "string", "pattern": "^[a-z]{2}-[0-9]{4}$"}),
    "two patterns": obj(a={"type": "string", "pattern": "^(foo|bar)$"}, b={"type": "string", "pattern": "^x+y?$", "maxLength": 6}),
    "integer bounds": obj(n={"type": "integer", "minimum": -3, "maximum": 17}),
    "exclusive bounds": obj(n={"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 4}),
    "number bounds": obj(x={"type": "number", "minimum": 0.5, "maximum": 1.5, "multipleOf": 0.25}),
    "multiple of": obj(n={"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 100}),
    "optional": obj(["name"], name=NAME, nick=NAME, age={"type": "integer", "minimum": 0, "maximum": 99}),
    "all optional": obj([], a={"type": "boolean"}, b={"type": "null"}),
    "array": obj(tags={"type": "array", "items": NAME, "minItems": 1, "maxItems": 3}),
    "array of objects": obj(rows={"type": "array", "items": obj(x={"type": "boolean"}), "minItems": 2, "maxItems": 2}),
    "tuple": obj(pair={"type": "array", "prefixItems": [NAME, {"type": "boolean"}], "items": False, "minItems": 2}),
    "top array": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 4},
    "top string": {"type": "string", "maxLength": 10},
    "top enum": {"enum": ["yes", "no"]},
    "booleans": obj(a={"type": "boolean"}, b={"type": "boolean"}, c={"type": "boolean"}),
    "types": obj(v={"type": ["boolean", "null"]}),
    "reference": {**obj(a={"$ref": "#/$defs/name"}, b={"$ref": "#/$defs/name"}), "$defs": {"name": NAME}},
    "old reference": {**obj(a={"$ref": "#/definitions/color"}), "definitions": {"color": {"enum": ["r", "g"]}}},
    "all of": obj(n={"allOf": [{"type": "integer", "minimum": 2}, {"maximum": 6}]}),
    "map": {"type": "object", "patternProperties": {"^k[0-9]$": {"type": "boolean"}}, "additionalProperties": False, "maxProperties": 2},
    "date": obj(day={"type": "string", "format": "date"}),
    "uuid": obj(id={"type": "string", "format": "uuid"}),
    "lengths": obj(s={"type": "string", "minLength": 3, "maxLength": 8}),
}  # fmt: skip
