"""JSON schemas before they become grammars: those without an end, and what is left open.

Runs in the limited process: it walks whatever a client sends.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lorax_router.service.constraints.schema_tree import References, Schema, listed, walk

# At most one line break with indentation, or one space: without a bound some models write
# nothing but white space, for ever.
_SPACE = r"(?: |\n[ \t]{0,40})"
_SPACE_OPTIONS = ("whitespace_pattern", "whitespace_flexible", "item_separator", "key_separator")

# What says of the same object what a neighbour says too.
_COMBINERS = ("$ref", "allOf", "anyOf", "dependentSchemas", "if", "not", "oneOf")
_OF_OBJECTS = ("additionalProperties", "patternProperties", "properties", "required")
_OPENERS = ("additionalProperties", "patternProperties", "unevaluatedProperties")


def prepared(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema whose grammar lets outputs end: its objects closed, white space bounded.

    Objects have the properties that they declare and no others, unless the schema says
    something of that, or combines several schemas of one object. Whatever it then allows, the
    schema as it was given allows too.
    """
    nodes = list(walk(schema))
    combined = [node for node in nodes if _combines(node)]
    references = References(schema)
    left_open = {id(inner) for node in combined for inner in walk(node, references)}
    for node in nodes:
        if id(node) not in left_open:
            _close(node)
    own = schema.get("x-guidance")
    options = dict(own) if isinstance(own, Mapping) else {}
    if not any(name in options for name in _SPACE_OPTIONS):
        options["whitespace_pattern"] = _SPACE
    return {**schema, "x-guidance": options}


def can_end(schema: Schema) -> bool:
    """Return whether some finite value fits, as far as references and requirements tell."""
    open_nodes = {id(node): node for node in walk(schema)}
    references = References(schema)
    found = list(open_nodes)
    while found:
        found = [key for key, node in open_nodes.items() if _ends(node, references, open_nodes)]
        for key in found:
            del open_nodes[key]
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


def _ends(
    node: Mapping[str, Any], references: References, open_nodes: Mapping[int, Schema]
) -> bool:
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
