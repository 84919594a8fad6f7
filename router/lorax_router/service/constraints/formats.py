"""Constraints from the fields in which clients ask for them; errors name the field."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lorax_contract.constraint import Constraint, ConstraintKind
from lorax_contract.errors import ValidationError

_FIELD = "response_format"
# What only TGI has, and where the others have their schema.
_TGI_TYPES = ("json", "regex")
_OTHER_PLACES = ("schema", "json_schema")
_ANY_OBJECT: dict[str, Any] = {"type": "object"}
# How vLLM names what binds an output, in `structured_outputs` and before that by itself.
_OLD_NAMES = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "guided_whitespace_pattern": "whitespace_pattern",
}
_LANGUAGES = ("json", "regex", "choice", "grammar", "json_object")
_SPACING = ("whitespace_pattern", "disable_any_whitespace", "disable_additional_properties")


def of_response_format(value: Any) -> Constraint | None:
    """Return what OpenAI's, LoRAX's or TGI's ``response_format`` asks for; None: nothing.

    ``{"type": "text" | "json_object" | "json_schema"}``, the schema in ``schema`` or, as OpenAI
    has it, in ``json_schema.schema``; what TGI has in ``value`` is read as its ``grammar``.
    Raises ValidationError.
    """
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise ValidationError(f"`{_FIELD}` must be an object with a `type`")
    kind = value.get("type")
    if value.get("value") is not None or kind in _TGI_TYPES:
        if also := next((name for name in _OTHER_PLACES if value.get(name) is not None), None):
            raise ValidationError(
                f"`{_FIELD}.value` and `{_FIELD}.{also}` bind the output twice; give one of them"
            )
        return of_grammar(value, _FIELD)
    # LoRAX takes the names of its own enumeration too.
    match kind.lower().replace("_", "") if isinstance(kind, str) else None:
        case "text":
            return None
        case "jsonobject":
            return of_schema(value.get("schema"), f"{_FIELD}.schema")
        case "jsonschema":
            return _of_json_schema(value)
    raise ValidationError(f"`{_FIELD}.type` must be text, json_object or json_schema")


def _of_json_schema(value: Mapping[str, Any]) -> Constraint:
    wrapped = value.get("json_schema")
    if wrapped is None:
        return of_schema(value.get("schema"), f"{_FIELD}.schema")
    if not isinstance(wrapped, Mapping):
        raise ValidationError(f"`{_FIELD}.json_schema` must be an object with a `schema`")
    return of_schema(wrapped.get("schema"), f"{_FIELD}.json_schema.schema")


def of_schema(schema: Any, field: str = "schema") -> Constraint:
    """Return what a JSON schema asks for; None is any JSON object."""
    schema = _ANY_OBJECT if schema is None else schema
    if not isinstance(schema, Mapping):
        raise ValidationError(f"`{field}` must be a JSON schema, which is an object")
    return _asked_by(field, ConstraintKind.JSON_SCHEMA, _as_json(schema, field))


def of_json(schema: Any, field: str) -> Constraint:
    """Return what a JSON schema asks for, which may come as text; raises ValidationError."""
    if schema is None:
        raise ValidationError(f"`{field}` must be a JSON schema")
    return of_schema(_schema_of(schema, field), field)


def of_regex(pattern: Any, field: str) -> Constraint:
    """Return what a regular expression asks for; raises ValidationError."""
    return _asked_by(field, ConstraintKind.REGEX, _text(pattern, field))


def of_grammar(grammar: Any, field: str = "grammar") -> Constraint:
    """Return what TGI's ``{"type": "json" | "json_schema" | "regex", "value": ...}`` asks for.

    Raises ValidationError.
    """
    if not isinstance(grammar, Mapping):
        raise ValidationError(f"`{field}` must be an object with a `type` and a `value`")
    kind, value = grammar.get("type"), grammar.get("value")
    if kind in ("json", "json_object"):
        return of_json(value, f"{field}.value")
    if kind == "json_schema":
        if not isinstance(value, Mapping):
            raise ValidationError(f"`{field}.value` must be an object with a `schema`")
        return of_json(value.get("schema"), f"{field}.value.schema")
    if kind == "regex":
        return of_regex(value, f"{field}.value")
    raise ValidationError(f"`{field}.type` must be json, json_schema or regex")


def of_vllm(fields: Mapping[str, Any]) -> Constraint | None:
    """Return what vLLM's ``structured_outputs`` or ``guided_*`` fields of a body ask for.

    Raises ValidationError.
    """
    given = fields.get("structured_outputs")
    old = {name: fields[name] for name in _OLD_NAMES if fields.get(name) is not None}
    if given is not None and old:
        raise ValidationError(
            f"`structured_outputs` and `{next(iter(old))}` bind the output twice; give one of them"
        )
    if given is None:
        return _of_options({_OLD_NAMES[name]: value for name, value in old.items()}, old)
    if not isinstance(given, Mapping):
        raise ValidationError("`structured_outputs` must be an object")
    said = {name: value for name, value in given.items() if value not in (None, False)}
    if unknown := said.keys() - {*_LANGUAGES, *_SPACING}:
        raise ValidationError(f"`structured_outputs.{min(unknown)}` is not offered; leave it out")
    return _of_options(said, [f"structured_outputs.{name}" for name in said])


def _of_options(said: Mapping[str, Any], fields: Any) -> Constraint | None:
    named = dict(zip(said, fields, strict=True))
    languages = [name for name in said if name in _LANGUAGES]
    if not languages:
        if said:
            raise ValidationError(f"`{named[next(iter(said))]}` alone binds no output")
        return None
    if len(languages) > 1:
        one, two = (named[name] for name in languages[:2])
        raise ValidationError(f"`{one}` and `{two}` bind the output twice; give one of them")
    (language,) = languages
    field, value = named[language], said[language]
    match language:
        case "json_object":
            return of_schema(None, field)
        case "json":
            return of_schema(_spaced(_schema_of(value, field), said), field)
        case "choice":
            return _of_choice(value, field)
        case "regex":
            return of_regex(value, field)
        case _:
            return _asked_by(field, ConstraintKind.LARK, _text(value, field))


def _schema_of(value: Any, field: str) -> Any:
    """Return a schema that may come as text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise ValidationError(f"`{field}` must be a JSON schema; it is no JSON") from None


def _spaced(schema: Any, said: Mapping[str, Any]) -> Any:
    """Return a schema with what was said of white space in llguidance's words."""
    options: dict[str, Any] = {}
    if (pattern := said.get("whitespace_pattern")) is not None:
        options["whitespace_pattern"] = pattern
    elif said.get("disable_any_whitespace"):
        options["whitespace_flexible"] = False
    if not options or not isinstance(schema, Mapping):
        return schema
    own = schema.get("x-guidance")
    return {**schema, "x-guidance": {**options, **(own if isinstance(own, Mapping) else {})}}


def _of_choice(value: Any, field: str) -> Constraint:
    is_list = isinstance(value, list) and value
    if not is_list or not all(isinstance(each, str) and each for each in value):
        raise ValidationError(f"`{field}` must be a list of texts, none of them empty")
    return _asked_by(field, ConstraintKind.CHOICE, _as_json(value, field))


def _asked_by(field: str, kind: ConstraintKind, text: str) -> Constraint:
    return Constraint(kind=kind, text=text, field_name=field.partition(".")[0])


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str) or not value:
        raise ValidationError(f"`{field}` must be a text that is not empty")
    return value


def _as_json(value: Any, field: str) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        # A lone surrogate can be written, and not sent.
        text.encode()
        return text
    except (ValueError, RecursionError):
        raise ValidationError(f"`{field}` cannot be written as JSON") from None
