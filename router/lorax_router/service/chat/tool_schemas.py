"""The schemas of tools' arguments as grammars take them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lorax_contract.errors import ValidationError
from lorax_router.service.chat.tools import FunctionTool

# Keywords whose values hold no schemas.
_VALUES = frozenset({"const", "enum", "default", "examples"})
# Keywords whose values are schemas by name.
_NAMED = frozenset({"properties", "patternProperties", "dependentSchemas", "$defs", "definitions"})
# What may say of an object what a neighbour says too.
_COMBINERS = frozenset({"allOf", "dependentSchemas", "else", "if", "not", "oneOf", "then"})
_CHOICES = frozenset({"$ref", "anyOf"})
_OPENERS = frozenset({"additionalProperties", "patternProperties", "unevaluatedProperties"})


def object_schema(tool: FunctionTool) -> Mapping[str, Any]:
    """Return the schema of a tool's arguments, which are an object; raises ValidationError."""
    if tool.parameters.get("type", "object") != "object":
        raise ValidationError(
            f"`tools`: the parameters of {tool.name!r} must be a schema of the type `object`"
        )
    properties, required = (tool.parameters.get(key) for key in ("properties", "required"))
    if not isinstance(properties or {}, dict) or not isinstance(required or [], list):
        raise ValidationError(
            f"`tools`: the parameters of {tool.name!r} are no JSON schema: `properties` must be an "
            "object and `required` a list"
        )
    return _closed({"type": "object", **tool.parameters})


def rebased(schema: Any, root: str) -> Any:
    """Return a schema that stands at ``root`` of another one: its references lead there."""
    match schema:
        case dict():
            return {key: _rebased_member(key, value, root) for key, value in schema.items()}
        case list():
            return [rebased(each, root) for each in schema]
    return schema


def _rebased_member(key: str, value: Any, root: str) -> Any:
    if key == "$ref" and isinstance(value, str) and value.startswith("#"):
        return root + value[1:]
    if key in _NAMED and isinstance(value, dict):
        # Whatever their names are, these are schemas.
        return {name: rebased(each, root) for name, each in value.items()}
    return value if key in _VALUES else rebased(value, root)


def _closed(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a schema whose objects have the properties that they declare and no others.

    A model that may always add one more does not end. A schema that combines others is left
    as it is.
    """
    nodes = list(_schemas_in(schema))
    if any(node.keys() & _COMBINERS or _has_beside_choice(node) for node in nodes):
        return schema
    return dict(_with_closed_objects(schema))


def _has_beside_choice(node: Mapping[str, Any]) -> bool:
    return bool(node.keys() & _CHOICES) and "properties" in node


def _schemas_in(schema: Any) -> Iterator[Mapping[str, Any]]:
    waiting = [schema]
    while waiting:
        match waiting.pop():
            case dict() as node:
                yield node
                for key, value in node.items():
                    if key in _NAMED and isinstance(value, dict):
                        waiting.extend(value.values())
                    elif key not in _VALUES:
                        waiting.append(value)
            case list() as items:
                waiting.extend(items)


def _with_closed_objects(schema: Any) -> Any:
    match schema:
        case dict():
            closed = {key: _closed_member(key, value) for key, value in schema.items()}
            return {**closed, "additionalProperties": False} if _is_closable(schema) else closed
        case list():
            return [_with_closed_objects(each) for each in schema]
    return schema


def _is_closable(schema: Mapping[str, Any]) -> bool:
    declared, required = schema.get("properties"), schema.get("required", [])
    if not isinstance(declared, dict) or not isinstance(required, list):
        return False
    return not schema.keys() & _OPENERS and all(name in declared for name in required)


def _closed_member(key: str, value: Any) -> Any:
    if key in _NAMED and isinstance(value, dict):
        return {name: _with_closed_objects(each) for name, each in value.items()}
    return value if key in _VALUES else _with_closed_objects(value)
