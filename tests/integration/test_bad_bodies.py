"""Bodies that are none, to every route that reads one: 4xx in words, in the dialect's envelope."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.helpers.asking import Asking, fields_of_all, play
from tests.helpers.dialects import DIALECTS, EXAMPLES, LORAX, LORAX_FIELDS, RESPONSES, TGI, Dialect

# What a field is sent that wants another type, or a value within bounds.
ODD: tuple[Any, ...] = (
    "x", "", [], {}, [[]], [{}], [5], ["x"], {"a": {"b": 5}}, {"type": "x"}, True, 0, -1, 1.5,
    10**12, 10**30, -(10**30), float("nan"), float("inf"), "9" * 5_000, ["x"] * 3_000,
    {"9" * 5_000: 1}, {"a": 10**30}, {"a": float("nan")},
)  # fmt: skip
# Fields that mean something in one of the two modes only, or are read otherwise there, as LoRAX does.
OF_ONE_MODE = {"best_of", "decoder_input_details", "stream", "stream_options"}
# Whose fields are all sent by the test of streams, whole ones too.
BOTH_MODES = {dialect.path for dialect in DIALECTS} - {LORAX.path, TGI.path}


# --- whatever a field is sent -----------------------------------------------------


@pytest.mark.parametrize("path", [path for path in EXAMPLES if path != "/generate_stream"])
def test_whatever_a_field_is_sent_it_is_answered_or_refused_in_words(path: str) -> None:
    async def scene(ask: Asking) -> None:
        fields = await fields_of_all(ask.world)
        assert set(fields) == set(EXAMPLES)
        for field in fields[path]:
            if path in BOTH_MODES and field not in OF_ONE_MODE:
                continue
            for odd in ODD:
                await ask.post(path, {**EXAMPLES[path], field: odd})

    play(scene)


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda each: each.name)
def test_whatever_a_field_is_sent_a_stream_says_what_a_whole_answer_says(dialect: Dialect) -> None:
    is_lorax = dialect in (LORAX, TGI)

    async def scene(ask: Asking) -> None:
        fields = LORAX_FIELDS if is_lorax else (await fields_of_all(ask.world))[dialect.path]
        for field in sorted({*fields} - OF_ONE_MODE):
            for odd in ODD:
                sent: dict[str, Any] = {field: odd}
                if is_lorax:
                    sent = {"parameters": {"max_new_tokens": 2, **sent}}
                whole, streamed = [
                    await ask.post(*dialect.asked(sent, stream=stream)) for stream in (False, True)
                ]
                assert whole == streamed, (dialect.name, field, str(odd)[:80])

    play(scene)


# --- what is no JSON --------------------------------------------------------------

NO_JSON = {
    "nothing": b"",
    "half": b"{",
    "two": b'{"model": "fake"} {}',
    "a lone surrogate": b'{"x": "\\ud800"}',
    "a lone surrogate in a name": b'{"\\udc00": 1}',
    "bytes that are no text": b'{"x": "\xff"}',
    "another encoding": '{"x": 1}'.encode("utf-16"),
    "a byte order mark": b'\xef\xbb\xbf{"x": 1}',
    "deep lists": b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"a": ' * 50_000 + b"1" + b"}" * 50_000,
    "a number of many digits": b'{"x": ' + b"9" * 6_000 + b"}",
}
# Where a value may be anything: what is not finite is no JSON there either.
NOT_FINITE = (b"NaN", b"Infinity", b"-Infinity")


@pytest.mark.parametrize("path", EXAMPLES)
def test_what_is_no_json_is_a_400_everywhere(path: str) -> None:
    async def scene(ask: Asking) -> None:
        example = json.dumps(EXAMPLES[path])[1:].encode()
        beside = {
            f"{each!r} beside": b'{"unknown": ' + each + b", " + example for each in NOT_FINITE
        }
        for name, raw in {**NO_JSON, **beside}.items():
            fault = await ask.post(path, raw)
            assert fault is not None, name
            assert fault.status == 400, (name, fault)
            assert "the body is not valid JSON" in fault.text

    play(scene)


@pytest.fixture(scope="module")
def many_tools() -> bytes:
    """A list of ten megabytes."""
    tools = [
        {"type": "function", "function": {"name": f"f{n}"}, "x": "y" * 200} for n in range(40_000)
    ]
    return json.dumps(tools).encode()


@pytest.mark.parametrize("path", EXAMPLES)
def test_a_body_that_is_too_large_is_a_413_everywhere(path: str, many_tools: bytes) -> None:
    async def scene(ask: Asking) -> None:
        example = json.dumps(EXAMPLES[path])[:-1].encode()
        fault = await ask.post(path, example + b', "tools": ' + many_tools + b"}")
        assert fault is not None
        assert fault.status == 413
        assert "larger than" in fault.text

    play(scene)


@pytest.mark.parametrize("raw", [b"[]", b"5", b'"x"', b"null", b"[[]]"])
def test_what_is_no_object_is_refused_by_every_route(raw: bytes) -> None:
    async def scene(ask: Asking) -> None:
        for path in EXAMPLES:
            fault = await ask.post(path, raw)
            assert fault is not None
            assert fault.status in (400, 422)

    play(scene)


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda each: each.name)
def test_of_a_key_that_is_there_twice_the_last_counts(dialect: Dialect) -> None:
    """As in nearly every parser; whole or streamed, and within nested values, too."""
    most = {LORAX.name: "max_new_tokens", TGI.name: "max_new_tokens",
            RESPONSES.name: "max_output_tokens"}.get(dialect.name, "max_tokens")  # fmt: skip

    async def scene(ask: Asking) -> None:
        for stream in (False, True):
            path, body = dialect.asked({}, stream=stream)
            text = json.dumps(body)
            good, bad = f'"{most}": 2', f'"{most}": -1'
            assert good in text
            assert await ask.post(path, text.replace(good, f"{bad}, {good}").encode()) is None
            fault = await ask.post(path, text.replace(good, f"{good}, {bad}").encode())
            assert fault is not None
            assert fault.status == dialect.refused

    play(scene)
