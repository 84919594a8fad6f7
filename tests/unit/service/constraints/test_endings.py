"""Outputs within bounds come to an end, whatever a model likes to write best."""

from __future__ import annotations

import itertools
import json

import jsonschema
import pytest
from llguidance import LLMatcher, LLTokenizer

from lorax_contract.constraint import Constraint, ConstraintKind
from lorax_router.service.constraints.check_process import compiled

TOKENS = LLTokenizer("byte")
NUMBER = {"type": "number", "minimum": -90, "maximum": 90}
WORD = {"type": "string", "maxLength": 20}
MOST_BYTES = 600


def allowed_bytes(matcher: LLMatcher) -> set[int]:
    mask = matcher.compute_bitmask()
    return {byte for byte in range(256) if mask[byte // 8] >> byte % 8 & 1}


@pytest.mark.parametrize(
    "schema",
    [
        NUMBER,
        {"type": ["number", "null"], "minimum": -90, "exclusiveMaximum": 90},
        {"type": "number", "exclusiveMinimum": 0.1, "exclusiveMaximum": 0.2},
        {"anyOf": [NUMBER, {"type": "null"}]},
        {"$ref": "#/$defs/x", "$defs": {"x": NUMBER}},
        {"type": "integer", "minimum": -90, "maximum": 90},
        {"type": "string", "format": "time"},
        {"type": "string", "format": "date-time"},
        {"type": "string", "format": "duration"},
        {"type": "string", "format": "email"},
        {"type": "string", "format": "hostname"},
        {"anyOf": [{"type": "string", "format": "time"}, {"type": "null"}]},
        {"format": "time", "allOf": [{"type": "string"}, {"minLength": 1}]},
        {"type": "array", "items": NUMBER, "maxItems": 2},
        {"type": "object", "properties": {"x": NUMBER, "y": WORD}, "required": ["x", "y"]},
    ],
    ids=json.dumps,
)
@pytest.mark.parametrize("liked", ["0123456789", "9876543210", "1", "3", "ab.", " \n\t"])
def test_an_output_within_bounds_ends_whatever_the_model_likes_best(schema, liked):
    constraint = Constraint(kind=ConstraintKind.JSON_SCHEMA, text=json.dumps(schema))
    matcher = LLMatcher(TOKENS, compiled(constraint, TOKENS), log_level=0)
    text, favourites = bytearray(), itertools.cycle(liked.encode())
    while not matcher.is_stopped():
        assert len(text) < MOST_BYTES, bytes(text)
        allowed = allowed_bytes(matcher)
        wanted = [next(favourites) for _ in liked]
        byte = next((each for each in wanted if each in allowed), None)
        if byte is None:
            if matcher.is_accepting():
                break
            # What closes or separates, else whatever comes first.
            byte = next((each for each in b'"}],:{[' if each in allowed), min(allowed))
        assert matcher.consume_token(byte)
        text.append(byte)
    jsonschema.validate(json.loads(bytes(text)), schema)
