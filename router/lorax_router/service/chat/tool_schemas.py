"""The schemas of tools' arguments as grammars take them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from lorax_contract.errors import ValidationError
from lorax_router.service.chat.tools import FunctionTool
from lorax_router.service.constraints.schemas import bound, can_end

# Keywords whose values hold no schemas.
_VALUES = frozenset({"const", "enum", "default", "examples"})
# Keywords whose values are schemas by name.
_NAMED = frozenset({"properties", "patternProperties", "dependentSchemas", "$defs", "definitions"})


def object_schema(tool: FunctionTool) -> Mapping[str, Any]:
    """Return the schema of a tool's arguments, which are an object; raises ValidationError.

    What could be written without an end is bounded in it: some models would not end.
    """
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
    schema = copy.deepcopy({"type": "object", **tool.parameters})
    if not can_end(schema):
        raise ValidationError(
            f"`tools`: no arguments of {tool.name!r} end: by what their schema requires, each "
            "holds another one within"
        )
    bound(schema)
    return schema


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
