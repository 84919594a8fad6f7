"""LoRAX's and TGI's fields that bind an output."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lorax_contract.constraint import Constraint, ConstraintKind
from lorax_contract.errors import ValidationError
from lorax_router.http_api.json_body import parse_body
from lorax_router.http_api.lorax.bodies import GenerateBody

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def bound(**params: Any) -> Constraint | None:
    raw = json.dumps({"inputs": "w1", "parameters": params}).encode()
    return parse_body(GenerateBody, raw).to_domain(None).parameters.constraint


@pytest.mark.parametrize(
    "params",
    [
        {"schema": json.dumps(SCHEMA)},
        {"schema": SCHEMA},
        {"grammar": {"type": "json", "value": SCHEMA}},
        {"grammar": {"type": "json", "value": json.dumps(SCHEMA)}},
        {"grammar": {"type": "json_schema", "value": {"name": "x", "schema": SCHEMA}}},
        {"schema": SCHEMA, "response_format": {"type": "text"}, "grammar": None},
    ],
)
def test_a_schema_binds_under_each_of_its_names(params):
    same = bound(response_format={"type": "json_object", "schema": SCHEMA})
    assert bound(**params) == same
    assert same is not None


def test_a_pattern_of_tgi_s_binds():
    constraint = bound(grammar={"type": "regex", "value": "[0-9]{4}"})
    assert constraint == Constraint(kind=ConstraintKind.REGEX, text="[0-9]{4}")


def test_nothing_binds_nothing():
    assert bound() is None
    assert bound(schema=None, grammar=None, response_format=None) is None


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"schema": "{"}, "`schema` must be a JSON schema; it is no JSON"),
        ({"schema": "3"}, "`schema` must be a JSON schema, which is an object"),
        ({"schema": 3}, "`parameters.schema"),
        ({"grammar": "x"}, "`grammar` must be an object"),
        ({"grammar": {}}, "`grammar.type` must be json"),
        ({"grammar": {"type": "xml", "value": "x"}}, "`grammar.type` must be json"),
        ({"grammar": {"type": "json"}}, "`grammar.value` must be a JSON schema"),
        ({"grammar": {"type": "json_schema", "value": "x"}}, "`grammar.value` must be an object"),
        ({"grammar": {"type": "json_schema", "value": {}}}, "`grammar.value.schema`"),
        ({"grammar": {"type": "regex", "value": ""}}, "`grammar.value` must be a text"),
        (
            {"schema": SCHEMA, "grammar": {"type": "regex", "value": "a"}},
            "`schema` and `grammar` bind the output twice",
        ),
        (
            {"schema": SCHEMA, "response_format": {"type": "json_object"}},
            "`response_format` and `schema` bind the output twice",
        ),
    ],
)
def test_what_cannot_bind_is_refused_by_the_name_that_was_sent(params, words):
    with pytest.raises(ValidationError) as caught:
        bound(**params)
    assert words in str(caught.value)
