"""What outputs are to be bound to is checked in processes that can be ended."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import dataclasses
import functools
import json
import re
import socket
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from tests.helpers.constraints import choice, lark, regex, schema
from tests.helpers.in_loop import in_loop
from tests.helpers.tiny_models import make_tokenizer

from lorax_contract.adapters import AdapterUnavailableError, Reason
from lorax_contract.constraint import Constraint, ConstraintKind
from lorax_contract.errors import OverloadedError, ValidationError
from lorax_router.service.constraints import check_process
from lorax_router.service.constraints.checker import CheckLimits, ConstraintChecker
from lorax_router.service.constraints.readiness import Constraints

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}
GBNF = 'root ::= "yes" | "no" more\nmore ::= [0-9]+'
# Takes long enough in any process that it is never done in a thousandth of a second.
LARGE = schema({"type": "object", "properties": {f"p{i}": {"enum": list(range(40))} for i in range(900)}})  # fmt: skip


@functools.cache
def tokenizer_file() -> str:
    """Return the file of a small tokenizer, which lasts as long as the tests do."""
    folder = TemporaryDirectory()
    atexit.register(folder.cleanup)
    make_tokenizer(Path(folder.name))
    return str(Path(folder.name, "tokenizer.json"))


def asked(constraint: Constraint) -> dict[str, Any]:
    """Return what the process answers."""
    tokens = check_process.tokens_of(tokenizer_file())
    question = {
        "kind": constraint.kind.value, "text": constraint.text, "frame": constraint.frame,
    }  # fmt: skip
    return check_process.answer(tokens, question, [])


@pytest.mark.parametrize("constraint", [schema(PERSON), lark('start: "a"'), lark(GBNF)])
def test_what_binds_a_part_is_made_ready_as_what_binds_the_whole(constraint: Constraint) -> None:
    part = dataclasses.replace(constraint, frame='start: "<" content ">"')
    (grammar,) = json.loads(asked(part)["grammar"])["grammars"]
    assert grammar["lark_grammar"].startswith(f"{part.frame}\ncontent: %")
    if constraint.kind is ConstraintKind.JSON_SCHEMA:
        assert '"additionalProperties": false' in grammar["lark_grammar"]
    assert part.key != constraint.key


@pytest.mark.parametrize(
    "text",
    [
        "start: /a+/", "  start : /a+/", 'start[max_tokens=5]: "a"', "%llguidance {}\nstart: /a+/",
        GBNF,
    ],
)  # fmt: skip
def test_a_grammar_is_read_in_its_own_language(text: str) -> None:
    assert "grammar" in asked(lark(text))


def test_what_cannot_be_used_is_refused_as_a_part_too() -> None:
    frame = 'start: "<" content ">"'
    for constraint in (schema({"$ref": "#"}), schema({"uniqueItems": True}), regex("(")):
        assert "refused" in asked(dataclasses.replace(constraint, frame=frame))
    assert "refused" in asked(dataclasses.replace(schema(PERSON), frame="start: missing content"))


@in_loop
async def test_the_part_that_is_at_fault_is_named() -> None:
    broken = 'start: call | content\ncall: %json {"uniqueItems": true}'
    checker = ConstraintChecker(tokenizer_file())
    try:
        for constraint, field in (
            (dataclasses.replace(schema(PERSON), frame=broken), "tools"),
            (dataclasses.replace(schema({"uniqueItems": True}), frame=broken), "response_format"),
        ):
            with pytest.raises(ValidationError) as caught:
                await checker.check(constraint)
            assert f" `{field}`: " in caught.value.public
            assert "uniqueItems" in caught.value.public
            assert "uniqueItems" not in str(caught.value)
    finally:
        await checker.close()


@pytest.mark.parametrize(
    "constraint",
    [
        schema(PERSON),
        schema({"type": "object"}),
        regex("[a-z]+@[a-z]+"),
        choice("a", "b"),
        lark('start: "a" b\nb: /[0-9]+/'),
        lark(GBNF),
        lark("start: <|im_start|> /.*/"),
        choice(*(f"choice {i}" for i in range(5000))),
        Constraint(kind=ConstraintKind.LLGUIDANCE, text=regex("a+").grammar),
    ],
)
def test_what_can_be_compiled_becomes_a_grammar(constraint):
    said = asked(constraint)
    assert "grammars" in json.loads(said["grammar"])


@pytest.mark.parametrize(
    ("constraint", "words"),
    [
        (schema({**PERSON, "dependentRequired": {"name": ["age"]}}), "dependentRequired"),
        (schema({"type": "array", "uniqueItems": True, "items": {"type": "integer"}}), "uniqueItems"),
        (schema({"type": "string", "pattern": "(?=a)b"}), "pattern|look"),
        (schema({"type": "string", "format": "no-such-format"}), "no-such-format"),
        (schema({"type": "object", "required": ["a"], "properties": {"a": False}}), "nsatisfiable"),
        (schema({"type": "integer", "minimum": 5, "maximum": 3}), "."),
        (schema({"$ref": "#"}), "no value of it ends"),
        (schema({"$ref": "https://example.org/x"}), "."),
        (schema({"$ref": "#/$defs/missing"}), "."),
        (schema({"type": 5}), "."),
        (lark('start: "a" start'), "no output could follow"),
        (lark("start: <|no such token|>"), "token"),
        (regex("(((a{1000}){1000}){1000}){1000}"), "."),
        (schema([1]), "no object"),
        (regex("(a"), "."),
        (regex(r"(a)\1"), "."),
        (lark("start: nothing"), "nothing"),
        (lark("begin: "), "."),
        (choice("a", ""), "none of them empty"),
        (Constraint(kind=ConstraintKind.LLGUIDANCE, text='{"grammars": []}'), "."),
        (Constraint(kind=ConstraintKind.JSON_SCHEMA, text="{"), "."),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_said_in_a_line(constraint, words):
    said = asked(constraint)
    assert re.search(words, said["refused"]), said
    assert "\n" not in said["refused"]
    assert len(said["refused"]) < 500


@in_loop
async def test_a_request_learns_in_words_what_is_wrong_and_answers_are_remembered():
    checker = ConstraintChecker(tokenizer_file())
    try:
        grammar = await checker.check(schema(PERSON))
        assert grammar.kind is ConstraintKind.LLGUIDANCE
        bad = schema({"type": "array", "uniqueItems": True})
        with pytest.raises(ValidationError) as caught:
            await checker.check(bad)
        assert re.search("`response_format`: the JSON schema.*uniqueItems", caught.value.public)
        await checker._quick.close()
        checker._quick.ask = None
        assert await checker.check(schema(PERSON)) == grammar
        with pytest.raises(ValidationError) as caught:
            await checker.check(bad)
        assert "uniqueItems" in caught.value.public
    finally:
        await checker.close()


@in_loop
async def test_the_fault_of_one_schema_is_told_by_the_field_that_each_request_sent():
    checker = ConstraintChecker(tokenizer_file())
    try:
        for name in ("schema", "guided_json", "response_format"):
            wrong = dataclasses.replace(schema({"type": "nonsense"}), field_name=name)
            with pytest.raises(ValidationError, match=f"^`{name}`: the JSON schema cannot be used"):
                await checker.check(wrong)
    finally:
        await checker.close()


@in_loop
async def test_what_is_too_large_is_not_looked_at():
    checker = ConstraintChecker(tokenizer_file(), CheckLimits(max_chars=10))
    with pytest.raises(ValidationError, match="has 11 characters; the limit is 10"):
        await checker.check(regex("a" * 11))


@in_loop
async def test_what_takes_too_long_is_refused_and_later_not_tried():
    checker = ConstraintChecker(tokenizer_file(), CheckLimits(quick_s=0.001, deadline_s=0.001))
    try:
        for _ in range(2):
            with pytest.raises(ValidationError, match="takes longer than 0.001 s"):
                await checker.check(LARGE)
        with pytest.raises(ValidationError, match="again and again; it is not tried for"):
            await checker.check(LARGE)
    finally:
        await checker.close()


@in_loop
async def test_what_takes_long_is_tried_once_more_where_it_holds_up_nobody():
    checker = ConstraintChecker(tokenizer_file(), CheckLimits(quick_s=0.001, deadline_s=60.0))
    try:
        assert (await checker.check(LARGE)).kind is ConstraintKind.LLGUIDANCE
    finally:
        await checker.close()


@in_loop
async def test_what_takes_too_much_memory_is_refused_and_the_next_is_served():
    checker = ConstraintChecker(tokenizer_file(), CheckLimits(memory_bytes=1 << 20))
    try:
        with pytest.raises(ValidationError, match="response_format"):
            await checker.check(LARGE)
        assert await checker.check(regex("a"))
    finally:
        await checker.close()


@pytest.mark.parametrize(
    "constraint",
    [
        Constraint(
            kind=ConstraintKind.JSON_SCHEMA,
            text='{"items": ' * 20_000 + '{"type": "null"}' + "}" * 20_000,
        ),
        lark("start: " + "(" * 60_000 + '"a"' + ")" * 60_000),
        regex("(" * 60_000 + "a" + ")" * 60_000),
        regex("(((a{1000}){1000}){1000}){1000}"),
        lark('start: "a" start'),
        schema({"type": "string", "maxLength": 10**15}),
        schema({"type": "string", "pattern": "^(a?){500}(a){500}$"}),
        schema({"type": "array", "items": {"type": "integer"}, "maxItems": 10**9}),
        schema({"allOf": [{"anyOf": [{"type": "object", "properties": {f"a{i}{j}": {"type": "string"}}}
                                      for j in range(30)]} for i in range(8)]}),
    ],
    ids=range(9),
)  # fmt: skip
def test_a_program_of_a_grammar_harms_its_own_request_only(constraint):
    async def run() -> None:
        checker = ConstraintChecker(tokenizer_file(), CheckLimits(quick_s=3.0, deadline_s=3.0))
        try:
            with contextlib.suppress(ValidationError):
                await checker.check(constraint)
            assert await checker.check(schema(PERSON))
        finally:
            await checker.close()

    asyncio.run(run())


@in_loop
async def test_no_more_wait_than_are_served_in_time():
    checker = ConstraintChecker(tokenizer_file(), CheckLimits(max_waiting=1))
    try:
        first = asyncio.create_task(checker.check(regex("a")))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError):
            await checker.check(regex("b"))
        await first
    finally:
        await checker.close()


@pytest.mark.parametrize("key", ["$ref", "$schema", "$id", "$dynamicRef"])
def test_no_schema_has_anything_fetched(key: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.0)
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/schema.json"
        asked(schema({"type": "object", "properties": {"a": {key: address}}}))
        asked(schema({key: address, "type": "object"}))
        with pytest.raises(BlockingIOError):
            listener.accept()


@in_loop
async def test_the_shard_has_the_last_word():
    asked = []

    async def prepare(constraint, content):
        asked.append((constraint, content))
        raise refusals.pop()

    constraints = Constraints(prepare, tokenizer_file())
    refusals = [
        ValidationError("there is no such token"),
        AdapterUnavailableError(Reason.EVICTED, "its files are gone"),
    ]
    try:
        # Fetched again it will be compiled when the row enters.
        grammar = await constraints.ready(regex("a"))
        with pytest.raises(ValidationError) as caught:
            await constraints.ready(regex("a"))
        assert "`response_format`: there is no such token" in caught.value.public
    finally:
        await constraints.close()
    assert asked == [(grammar, None)] * 2


@in_loop
async def test_what_quotes_a_schema_is_for_the_client_and_for_no_log():
    async def prepare(constraint, content):
        raise ValidationError("zzcanaryzz")

    constraints = Constraints(prepare, tokenizer_file())
    try:
        quoted = schema({"type": "object", "properties": {"a": {"$ref": "#/zzcanaryzz"}}})
        for constraint in (quoted, regex("zzcanaryzz(["), regex("a")):
            with pytest.raises(ValidationError) as caught:
                await constraints.ready(constraint)
            assert "zzcanaryzz" not in str(caught.value)
            assert "zzcanaryzz" in caught.value.public
    finally:
        await constraints.close()
