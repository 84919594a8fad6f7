"""The fields by which clients ask for structured output."""

from __future__ import annotations

import json

import pytest

from lorax_contract.constraint import Constraint, ConstraintKind
from lorax_contract.errors import ValidationError
from lorax_router.service.constraints.formats import (
    of_json,
    of_regex,
    of_response_format,
    of_schema,
    of_vllm,
)

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
ANY = {"type": "object"}


def kind_and_value(constraint: Constraint | None):
    assert constraint is not None
    is_json = constraint.kind in (ConstraintKind.JSON_SCHEMA, ConstraintKind.CHOICE)
    return constraint.kind, json.loads(constraint.text) if is_json else constraint.text


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"type": "json_object"}, ANY),
        ({"type": "json_object", "schema": SCHEMA}, SCHEMA),
        ({"type": "JsonObject", "schema": SCHEMA}, SCHEMA),
        ({"type": "json_schema", "schema": SCHEMA}, SCHEMA),
        ({"type": "json_schema"}, ANY),
        ({"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}, SCHEMA),
        ({"type": "json_schema", "json_schema": {"name": "x"}}, ANY),
        # As TGI has it, which is what Hugging Face's client makes of OpenAI's form.
        ({"type": "json_object", "value": SCHEMA}, SCHEMA),
        ({"type": "json", "value": SCHEMA}, SCHEMA),
        ({"type": "json", "value": json.dumps(SCHEMA)}, SCHEMA),
        ({"type": "json_schema", "value": {"name": "x", "schema": SCHEMA}}, SCHEMA),
    ],
)  # fmt: skip
def test_a_response_format_is_a_schema(value, expected):
    assert kind_and_value(of_response_format(value)) == (ConstraintKind.JSON_SCHEMA, expected)


def test_a_response_format_is_a_pattern_as_tgi_has_it():
    bound = of_response_format({"type": "regex", "value": "[0-9]{4}"})
    assert kind_and_value(bound) == (ConstraintKind.REGEX, "[0-9]{4}")


@pytest.mark.parametrize("value", [None, {"type": "text"}, {"type": "Text", "schema": SCHEMA}])
def test_text_binds_nothing(value):
    assert of_response_format(value) is None


@pytest.mark.parametrize(
    ("value", "field"),
    [
        ("json_object", "response_format"),
        ({}, "response_format.type"),
        ({"type": 3}, "response_format.type"),
        ({"type": "xml"}, "response_format.type"),
        ({"type": "json_object", "schema": "x"}, "response_format.schema"),
        ({"type": "json_object", "schema": [1]}, "response_format.schema"),
        ({"type": "json_schema", "json_schema": "x"}, "response_format.json_schema"),
        ({"type": "json_schema", "json_schema": {"schema": 1}}, "response_format.json_schema.schema"),
        ({"type": "json_object", "schema": {"const": float("nan")}}, "response_format.schema"),
        ({"type": "json"}, "response_format.value"),
        ({"type": "regex"}, "response_format.value"),
        ({"type": "json_schema", "value": {"name": "x"}}, "response_format.value.schema"),
        ({"type": "json_object", "value": SCHEMA, "schema": SCHEMA}, "response_format.value"),
    ],
)  # fmt: skip
def test_what_is_none_is_refused_by_name(value, field):
    with pytest.raises(ValidationError, match=f"`{field}`"):
        of_response_format(value)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"guided_json": SCHEMA}, (ConstraintKind.JSON_SCHEMA, SCHEMA)),
        ({"guided_json": json.dumps(SCHEMA)}, (ConstraintKind.JSON_SCHEMA, SCHEMA)),
        ({"guided_regex": "a+"}, (ConstraintKind.REGEX, "a+")),
        ({"guided_choice": ["a", "b"]}, (ConstraintKind.CHOICE, ["a", "b"])),
        ({"guided_grammar": "start: A"}, (ConstraintKind.LARK, "start: A")),
        ({"structured_outputs": {"json": SCHEMA}}, (ConstraintKind.JSON_SCHEMA, SCHEMA)),
        ({"structured_outputs": {"json_object": True}}, (ConstraintKind.JSON_SCHEMA, ANY)),
        ({"structured_outputs": {"regex": "a+", "choice": None}}, (ConstraintKind.REGEX, "a+")),
        ({"structured_outputs": {"choice": ["a"]}}, (ConstraintKind.CHOICE, ["a"])),
        ({"structured_outputs": {"grammar": "start: A"}}, (ConstraintKind.LARK, "start: A")),
        (
            {"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}},
            (ConstraintKind.JSON_SCHEMA, SCHEMA | {"x-guidance": {"whitespace_flexible": False}}),
        ),
        (
            {"guided_json": SCHEMA, "guided_whitespace_pattern": " ?"},
            (ConstraintKind.JSON_SCHEMA, SCHEMA | {"x-guidance": {"whitespace_pattern": " ?"}}),
        ),
    ],
)
def test_vllm_s_fields_in_both_spellings(fields, expected):
    assert kind_and_value(of_vllm(fields)) == expected


@pytest.mark.parametrize(
    "fields", [{}, {"guided_json": None}, {"structured_outputs": {"regex": None}}]
)
def test_without_any_nothing_is_bound(fields):
    assert of_vllm(fields) is None


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": 3}, "guided_json"),
        ({"guided_regex": ""}, "guided_regex"),
        ({"guided_regex": 3}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": ["a", ""]}, "guided_choice"),
        ({"guided_choice": ["a", 1]}, "guided_choice"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "twice"),
        ({"guided_regex": "a", "structured_outputs": {"regex": "a"}}, "twice"),
        ({"structured_outputs": "x"}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"whitespace_pattern": " "}}, "structured_outputs.whitespace_pattern"),
        ({"structured_outputs": {"json": SCHEMA, "regex": "a"}}, "structured_outputs.regex"),
    ],
)  # fmt: skip
def test_what_vllm_s_fields_cannot_say_is_refused_by_name(fields, named):
    with pytest.raises(ValidationError, match=named):
        of_vllm(fields)


def test_a_schema_alone():
    assert kind_and_value(of_schema(SCHEMA)) == (ConstraintKind.JSON_SCHEMA, SCHEMA)


@pytest.mark.parametrize(
    ("constraint", "field"),
    [
        (of_response_format({"type": "json_object"}), "response_format"),
        (of_vllm({"guided_json": SCHEMA}), "guided_json"),
        (of_vllm({"structured_outputs": {"json_object": True}}), "structured_outputs"),
        (of_vllm({"structured_outputs": {"choice": ["a"]}}), "structured_outputs"),
        (of_vllm({"guided_grammar": "start: /a/"}), "guided_grammar"),
        (of_json("{}", "schema"), "schema"),
        (of_regex("a", "grammar.value"), "grammar"),
    ],
)
def test_a_constraint_knows_the_field_that_asked_for_it(constraint, field):
    assert constraint is not None
    assert constraint.field_name == field
