"""Schemas without an end, and what is closed before a grammar is made."""

from __future__ import annotations

import copy
import itertools
import json

import pytest

from lorax_router.service.constraints.schema_tree import References
from lorax_router.service.constraints.schemas import can_end, prepared

LEAF = {"type": "object", "properties": {"value": {"type": "integer"}}, "required": ["value"]}
ENDLESS = {"type": "object", "properties": {"next": {"$ref": "#"}}, "required": ["next"]}


@pytest.mark.parametrize(
    "schema",
    [
        ENDLESS,
        {"$ref": "#"},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
        {"type": "array", "items": {"$ref": "#"}, "minItems": 1},
        {"type": "array", "prefixItems": [{"$ref": "#"}], "minItems": 1},
        {"anyOf": [ENDLESS, {"$ref": "#"}]},
        {"allOf": [{"type": "object"}, {"$ref": "#"}]},
        {
            "type": "object",
            "required": ["x"],
            "additionalProperties": {"$ref": "#"},
        },
        {
            "$ref": "#/definitions/node",
            "definitions": {
                "node": {
                    "type": "object",
                    "properties": {"left": {"$ref": "#/definitions/node"}, "v": {"type": "null"}},
                    "required": ["left"],
                }
            },
        },
    ],
)
def test_a_schema_of_which_no_value_ends_is_found(schema):
    assert not can_end(schema)


@pytest.mark.parametrize(
    "schema",
    [
        {},
        LEAF,
        {"type": "object", "properties": {"next": {"$ref": "#"}}},
        {"type": ["object", "null"], "properties": {"next": {"$ref": "#"}}, "required": ["next"]},
        {"type": "array", "items": {"$ref": "#"}},
        {"anyOf": [{"$ref": "#"}, {"type": "string"}]},
        {"properties": {"next": {"$ref": "#"}}, "required": ["next"]},
        {"$ref": "#/$defs/unknown"},
        {"$ref": "https://example.org/schema"},
        {"$ref": "#/components/x", "components": {"x": LEAF}},
        {"enum": [1], "allOf": [{"$ref": "#"}]},
        {
            "type": "object",
            "properties": {"child": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
            "required": ["child"],
        },
    ],
)
def test_a_schema_that_can_end_is_left_alone(schema):
    assert can_end(schema)


@pytest.mark.parametrize(
    ("reference", "name", "more", "root"),
    [
        ("#/$defs/an%20item", "an item", {}, {}),
        ("#/$defs/gr%C3%B6%C3%9Fe", "größe", {}, {}),
        ("#/$defs/a~1b~0%22", 'a/b~"', {}, {}),
        ("#item", "node", {"$anchor": "item"}, {}),
        ("https://example.org/list#/$defs/node", "node", {}, {"$id": "https://example.org/list"}),
        ("list#/$defs/node", "node", {}, {"$id": "https://example.org/list"}),
        ("https://example.org/node", "node", {"$id": "node"}, {"$id": "https://example.org/list"}),
        ("urn:x:list#/$defs/node", "node", {}, {"$id": "urn:x:list"}),
        ("#/$defs/node", "node", {}, {"$id": "urn:x:list"}),
    ],
)
def test_references_within_the_document_are_followed_however_they_are_written(
    reference, name, more, root
):
    endless = {
        **more,
        "type": "object",
        "properties": {"x": {"$ref": reference}},
        "required": ["x"],
    }
    if more.get("$id"):
        # Of what has a name of its own, a pointer begins there.
        endless["properties"]["x"] = {"$ref": "#"}
    assert not can_end({**root, "$ref": reference, "$defs": {name: endless}})
    leaf = {**more, "type": "object", "properties": {"a": {}}}
    assert can_end({**root, "$ref": reference, "$defs": {name: leaf}})
    # What is combined stays open where it is referred to.
    both = {"allOf": [{"$ref": reference}, {"type": "object", "properties": {"b": {}}}]}
    after = prepared({**root, "properties": {"both": both}, "$defs": {name: leaf}})
    assert "additionalProperties" not in after["$defs"][name]


def test_what_a_schema_takes_to_look_at_grows_with_its_size_alone(monkeypatch):
    """A chain of references each of which ends once the next one does, and a wide object of them."""
    num = 2000
    names = [f"d{number}" for number in range(num)]
    chain = {a: {"$ref": f"#/$defs/{b}"} for a, b in itertools.pairwise(names)}
    wide = {"type": "object", "properties": {a: {"$ref": f"#/$defs/{a}"} for a in names[:50]}}
    document = {**wide, "required": names[:50], "$defs": {**chain, names[-1]: LEAF}}
    num_calls = 0
    target = References.target

    def counted(self, node):
        nonlocal num_calls
        num_calls += 1
        return target(self, node)

    monkeypatch.setattr(References, "target", counted)
    assert can_end(document)
    prepared(document)
    assert num_calls < 20 * num


def test_objects_have_no_other_properties_than_they_declare():
    schema = {
        "type": "object",
        "properties": {"one": LEAF, "list": {"type": "array", "items": LEAF}},
        "$defs": {"two": LEAF},
    }
    closed = prepared(copy.deepcopy(schema))
    shut = LEAF | {"additionalProperties": False}
    assert closed["additionalProperties"] is False
    assert closed["properties"] == {"one": shut, "list": {"type": "array", "items": shut}}
    assert closed["$defs"] == {"two": shut}


def test_a_property_of_the_name_properties_is_no_schema():
    schema = {"type": "object", "properties": {"properties": {"type": "string"}}}
    closed = prepared(copy.deepcopy(schema))
    assert closed["properties"] == schema["properties"]


def test_what_is_combined_with_nothing_is_closed_beside_what_is():
    number = {"allOf": [{"type": "integer"}, {"maximum": 6}]}
    both = {"allOf": [{"$ref": "#/$defs/a"}, {"type": "object", "properties": {"b": LEAF}}]}
    schema = {
        "type": "object",
        "properties": {"n": number, "one": LEAF, "both": both},
        "$defs": {"a": copy.deepcopy(LEAF), "c": copy.deepcopy(LEAF)},
    }
    after = prepared(json.loads(json.dumps(schema)))
    shut = LEAF | {"additionalProperties": False}
    assert after["additionalProperties"] is False
    assert after["properties"] == {"n": number, "one": shut, "both": both}
    assert after["$defs"] == {"a": LEAF, "c": shut}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"a": {}}, "additionalProperties": True},
        {"type": "object", "properties": {"a": {}}, "patternProperties": {"^x": {}}},
        {"type": "object", "properties": {"a": {}}, "required": ["a", "b"]},
        {"type": "object", "properties": {"a": {}}, "anyOf": [LEAF]},
        {"allOf": [LEAF, {"type": "object", "properties": {"b": {}}}]},
        {"type": "object"},
    ],
)
def test_where_a_schema_says_something_of_other_properties_it_stays_open(schema):
    after = prepared(copy.deepcopy(schema))
    del after["x-guidance"]
    assert after == schema


def test_white_space_is_bounded_unless_the_schema_says_how_much():
    assert "whitespace_pattern" in prepared({"type": "object"})["x-guidance"]
    own = {"type": "object", "x-guidance": {"whitespace_flexible": False}}
    assert prepared(own)["x-guidance"] == {"whitespace_flexible": False}
    lenient = {"type": "object", "x-guidance": {"lenient": True}}
    assert prepared(lenient)["x-guidance"].keys() == {"lenient", "whitespace_pattern"}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "number", "minimum": 0},
        {"type": "number", "minimum": 0, "maximum": 1e-9},
        {"type": "number", "minimum": 0, "maximum": 10, "multipleOf": 7},
        {"type": "number", "enum": [0.1]},
        {"allOf": [{"type": "number", "minimum": 0, "maximum": 100}, {"multipleOf": 7}]},
        {"type": "number", "minimum": 0, "maximum": 100, "$ref": "#/$defs/x", "$defs": {"x": {}}},
        {"type": "string", "format": "time", "maxLength": 99},
        {"type": "string", "format": "time", "minLength": 99},
        {"type": "string", "format": "uri"},
        {"type": "number", "minimum": "0", "maximum": [1]},
        {"format": []},
    ],
)
def test_what_has_no_bounds_or_others_is_not_given_any(schema):
    after = prepared(copy.deepcopy(schema))
    del after["x-guidance"]
    assert after == schema
