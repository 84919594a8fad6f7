"""JSON schemas before they become grammars: those without an end, and what is left open."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterator, Mapping
from typing import Any

from lorax_router.service.constraints.schema_tree import (
    References,
    Schema,
    children,
    listed,
    walk,
)

# At most one line break with indentation, or one space: without a bound some models write
# nothing but white space, for ever.
_SPACE = r"(?: |\n[ \t]{0,40})"
_SPACE_OPTIONS = ("whitespace_pattern", "whitespace_flexible", "item_separator", "key_separator")

# Digits behind a point have no end either: 9 where both bounds are known.
_STEP, _LEAST_WIDTH = 1e-9, 1e-6
_OF_NUMBERS = (
    "type", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf",
)  # fmt: skip
# How long texts of these formats may be: with 9 digits of a second, and as their standards say.
_LENGTHS = {"date-time": 35, "duration": 35, "email": 254, "hostname": 253, "time": 24}

# What says of the same object what a neighbour says too.
_COMBINERS = ("$ref", "allOf", "anyOf", "dependentSchemas", "if", "not", "oneOf")
_OF_OBJECTS = ("additionalProperties", "patternProperties", "properties", "required")
_OPENERS = ("additionalProperties", "patternProperties", "unevaluatedProperties")


def prepared(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema whose grammar lets outputs end; white space is bounded, too."""
    bound(schema)
    own = schema.get("x-guidance")
    options = dict(own) if isinstance(own, Mapping) else {}
    if not any(name in options for name in _SPACE_OPTIONS):
        options["whitespace_pattern"] = _SPACE
    return {**schema, "x-guidance": options}


def bound(schema: dict[str, Any]) -> None:
    """Bound in a schema, in place, what could be written without an end.

    Objects have the properties that they declare and no others, unless the schema says
    something of that, or combines several schemas of one object. Fractions between two bounds and
    texts of some formats are of bounded length. Whatever the schema then allows, it allowed before.
    """
    nodes = list(walk([schema]))
    references = References(schema)
    left_open = {id(each) for each in walk(filter(_combines, nodes), references)}
    in_parts = {id(each) for each in walk(filter(_has_parts, nodes), references)}
    for node in nodes:
        if id(node) not in left_open:
            _close(node)
        if id(node) not in in_parts:
            _bound_fraction(node)
        _bound_text(node)


def can_end(schema: Schema) -> bool:
    """Return whether some finite value fits, as far as references and requirements tell."""
    nodes, references = list(walk([schema])), References(schema)
    open_nodes = {id(node) for node in nodes}
    # Whose end may show once another one's has.
    dependents: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
    for node in nodes:
        for inner in (*children(node), references.target(node)):
            dependents[id(inner)].append(node)
    found = nodes
    while found:
        found = [node for node in found if _ends(node, references, open_nodes)]
        open_nodes -= {id(node) for node in found}
        next_nodes = (each for node in found for each in dependents[id(node)])
        found = [*{id(each): each for each in next_nodes if id(each) in open_nodes}.values()]
    return id(schema) not in open_nodes


def _combines(node: Mapping[str, Any]) -> bool:
    """Return whether several schemas speak of one value, and may do so of its properties."""
    own = any(name in node for name in _OF_OBJECTS)
    others = [name for name in _COMBINERS if name in node and name != "allOf"]
    parts = sum(map(_may_be_of_objects, listed(node, "allOf")))
    return own + len(others) + parts > 1


def _may_be_of_objects(node: Schema) -> bool:
    return isinstance(node, dict) and any(name in node for name in (*_OF_OBJECTS, *_COMBINERS))


def _close(node: dict[str, Any]) -> None:
    declared, required = node.get("properties"), node.get("required", [])
    if not isinstance(declared, dict) or any(name in node for name in _OPENERS):
        return
    if isinstance(required, list) and all(name in declared for name in required):
        node["additionalProperties"] = False


def _has_parts(node: Mapping[str, Any]) -> bool:
    """Return whether several schemas may speak of one number."""
    others = sum(name in node for name in _COMBINERS)
    return "allOf" in node or others + any(name in node for name in _OF_NUMBERS) > 1


def _bound_fraction(node: dict[str, Any]) -> None:
    said = node.get("type")
    if "number" not in (said if isinstance(said, list) else [said]):
        return
    if any(name in node for name in ("multipleOf", "enum", "const")):
        return
    low = _numbers(node, "minimum", "exclusiveMinimum")
    high = _numbers(node, "maximum", "exclusiveMaximum")
    # In a narrower place there might be none with so few digits.
    if low and high and min(high) - max(low) >= _LEAST_WIDTH:
        node["multipleOf"] = _STEP


def _numbers(node: Mapping[str, Any], *names: str) -> list[float]:
    values = [node[name] for name in names if name in node]
    return [each for each in values if isinstance(each, (int, float)) and each is not True]


def _bound_text(node: dict[str, Any]) -> None:
    name = node.get("format")
    most = _LENGTHS.get(name) if isinstance(name, str) else None
    least = node.get("minLength", 0)
    if most is not None and "maxLength" not in node and isinstance(least, int) and least <= most:
        node["maxLength"] = most


def _ends(node: Mapping[str, Any], references: References, open_nodes: Container[int]) -> bool:
    """Return whether a value can end here if it can in all schemas but the open ones."""

    def ends(inner: Schema) -> bool:
        return id(inner) not in open_nodes

    if "enum" in node or "const" in node:
        return True
    if not ends(references.target(node)):
        return False
    if not all(ends(each) for each in listed(node, "allOf")):
        return False
    for name in ("anyOf", "oneOf"):
        if (choices := listed(node, name)) and not any(ends(each) for each in choices):
            return False
    said = node.get("type")
    types = set(map(str, said)) if isinstance(said, list) else {str(said)}
    if types - {"object", "array"}:
        return True
    in_object = "object" in types and all(ends(each) for each in _required(node))
    return in_object or ("array" in types and all(ends(each) for each in _first_items(node)))


def _required(node: Mapping[str, Any]) -> Iterator[Schema]:
    declared, others = node.get("properties"), node.get("additionalProperties")
    for name in listed(node, "required"):
        yield declared.get(name, others) if isinstance(declared, dict) else others


def _first_items(node: Mapping[str, Any]) -> Iterator[Schema]:
    count, places = node.get("minItems", 0), listed(node, "prefixItems")
    if isinstance(count, int) and count > 0:
        yield from places[:count]
        if count > len(places):
            yield node.get("items")
