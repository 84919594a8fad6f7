"""Events whose text alone changes."""

from __future__ import annotations

import pytest

from lorax_router.http_api.json_text import EventOfText, event

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
