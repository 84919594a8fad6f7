"""Events whose text alone changes; arrays of numbers."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lorax_router.http_api.json_text import EventOfText, dumps, event

TEXTS = [
    "",
    " plain",
    'quotes " and \\',
    "line\nend\r\n\n",
    "é 漢 \U0001f600",
    "\x00\x1f\u2028",
    "\ud800",
]


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_an_event_written_around_a_text_is_the_event_of_that_text(text):
    def document(said: str) -> dict[str, object]:
        # Of what a client sends, a model's name is in each event.
        return {"model": 'a "b"\ud800', "choices": [{"delta": {"content": said}, "end": None}]}

    assert EventOfText(document).of(text) == event(document(text))


@pytest.mark.parametrize("name", ["plain", "\ud800"], ids=ascii)
def test_arrays_are_lists_of_the_very_numbers(name):
    numbers = np.random.default_rng(3).standard_normal(200).astype(np.float32)
    scores = numbers.astype(np.float64) / 3
    found = json.loads(dumps({"name": name, "vector": numbers, "rows": [scores]}))
    assert np.array_equal(np.array(found["vector"], dtype=np.float32), numbers)
    assert np.array_equal(np.array(found["rows"][0]), scores)
