"""What binds answers to calls: the grammar lets calls through, those alone, and all are parsed."""

from __future__ import annotations

import contextlib
import functools
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer
from tests.helpers.chat_texts import PARSERS, TOOLS, turn_of
from tests.helpers.tiny_tokenizers import byte_level

from lorax_contract.constraint import Constraint, ConstraintKind
from lorax_contract.errors import ValidationError
from lorax_router.service.chat.forced_calls import constraint_of
from lorax_router.service.chat.grammars import MAX_CALLS
from lorax_router.service.chat.hermes import HermesParser
from lorax_router.service.chat.llama import LlamaJsonParser
from lorax_router.service.chat.mistral import MistralArgumentsParser
from lorax_router.service.chat.output_parser import OutputParser
from lorax_router.service.chat.outputs import OutputParsers
from lorax_router.service.chat.reasoning import ThinkParser
from lorax_router.service.chat.tool_parser import ToolCallParser
from lorax_router.service.chat.tool_schemas import object_schema, rebased
from lorax_router.service.chat.tools import FunctionTool, ToolChoice, tools_of
from lorax_router.service.requests import ChatPrompt

ALL = {**PARSERS, "mistral newer": MistralArgumentsParser}
REQUIRED = ToolChoice(mode="required")
AUTO = ToolChoice()
BOUNDED = [
    FunctionTool(
        name="f",
        parameters={
            "type": "object",
            "properties": {
                "a": {"type": "integer", "minimum": 1, "maximum": 99},
                "b": {"enum": ["x", 'y</para> "q"']},
                "c": {"type": "array", "items": {"$ref": "#/$defs/flag"}, "maxItems": 2},
                "d": {"type": "string", "maxLength": 3},
            },
            "required": ["a", "c"],
            "additionalProperties": False,
            "$defs": {"flag": {"type": ["boolean", "null"]}},
        },
    ),
    FunctionTool(name="get_weather"),
]
STRICT = [replace(BOUNDED[0], strict=True), TOOLS[1]]
SPECIAL = {"<|end|>": 0}


@functools.cache
def tokenizer() -> LLTokenizer:
    return LLTokenizer(byte_level().to_str(), eos_token=0)


def matcher(constraint: Constraint | None) -> LLMatcher:
    assert constraint is not None
    made = LLMatcher(tokenizer(), constraint.grammar)
    assert not made.is_error(), made.get_error()
    return made


def lets_through(constraint: Constraint | None, text: str) -> bool:
    made, ids = matcher(constraint), tokenizer().tokenize_str(text)
    return made.try_consume_tokens(ids) == len(ids) and made.is_accepting()


def drawn(constraint: Constraint | None, seed: int, most: int = 400) -> str | None:
    """Return a text that the constraint lets through, drawn token by token; None: too long."""
    made, rng, ids = matcher(constraint), random.Random(seed), []
    while len(ids) < most:
        mask = made.compute_logit_bias()
        allowed = [token for token, bias in enumerate(mask) if bias]
        if 0 in allowed and (rng.random() < 0.5 or len(allowed) == 1):
            return tokenizer().decode_str(ids)
        token = rng.choice([token for token in allowed if token] or [0])
        assert made.consume_token(token), made.get_error()
        if made.is_stopped():
            return tokenizer().decode_str([each for each in [*ids, token] if each])
        ids.append(token)
    return None


def forced(
    parser: type[ToolCallParser],
    tools: Sequence[FunctionTool] = BOUNDED,
    choice: ToolChoice = REQUIRED,
    **options: Any,
) -> Constraint | None:
    return constraint_of(tools, choice, parser, {}, **options)


@pytest.mark.parametrize("name", ALL)
def test_all_that_is_let_through_is_calls_that_the_parser_reads(name: str) -> None:
    constraint = forced(ALL[name])
    texts = [drawn(constraint, seed) for seed in range(40)]
    whole = [text for text in texts if text is not None]
    assert len(whole) >= 10
    for text in whole:
        turn = turn_of(ALL[name](BOUNDED), list(text))
        assert turn.content == "", text
        assert turn.tool_calls, text
        for call in turn.tool_calls:
            arguments = json.loads(call.arguments)
            if call.name == "f":
                assert 1 <= arguments["a"] <= 99
                assert set(arguments["c"]) <= {True, False, None}
                assert set(arguments) <= set("abcd")
            else:
                assert (call.name, arguments) == ("get_weather", {})


@pytest.mark.parametrize("name", ALL)
def test_one_call_where_one_is_named(name: str) -> None:
    named = ToolChoice(mode="named", name="get_weather")
    constraint = forced(ALL[name], BOUNDED[1:], named)
    text = drawn(constraint, 1)
    assert text is not None
    assert [each.name for each in turn_of(ALL[name](BOUNDED), [text]).tool_calls] == ["get_weather"]
    assert not lets_through(constraint, text + "\n" + text)
    assert not lets_through(constraint, "")
    assert not lets_through(constraint, "I would rather not.")


def test_the_forms_of_calls_are_let_through() -> None:
    call = '{"name": "f", "arguments": {"a": 1, "c": [true]}}'
    hermes = f"<tool_call>\n{call}\n</tool_call>"
    assert lets_through(forced(HermesParser), f"{hermes}\n{hermes}")
    assert not lets_through(forced(HermesParser, is_single=True), f"{hermes}\n{hermes}")
    assert not lets_through(forced(HermesParser), hermes.replace("true", "7"))
    assert lets_through(forced(PARSERS["mistral"]), f"[TOOL_CALLS][{call}, {call}]")
    assert lets_through(forced(HermesParser), "\n".join([hermes] * MAX_CALLS))
    assert not lets_through(forced(HermesParser), "\n".join([hermes] * (MAX_CALLS + 1)))
    newer = '[TOOL_CALLS]f[ARGS]{"a": 1, "c": []}[TOOL_CALLS]get_weather[ARGS]{}'
    assert lets_through(forced(MistralArgumentsParser), newer)
    assert lets_through(forced(PARSERS["pythonic"]), "[f(a=1, c=[null]), get_weather()]")
    assert not lets_through(forced(PARSERS["pythonic"]), "[f(c=[null])]")


def test_a_marker_that_is_a_special_token_is_written_as_one() -> None:
    constraint = constraint_of(BOUNDED, REQUIRED, MistralArgumentsParser, {"[TOOL_CALLS]": 1})
    made = matcher(constraint)
    assert [token for token, bias in enumerate(made.compute_logit_bias()) if bias] == [1]


@pytest.mark.parametrize("name", ALL)
def test_strict_tools_bind_their_calls_and_nothing_else(name: str) -> None:
    parser = ALL[name]
    constraint = forced(parser, STRICT, AUTO)
    assert lets_through(constraint, "")
    assert lets_through(constraint, "No call is needed, 1 < 2.")
    single = forced(parser, STRICT[:1], is_single=True)
    good = next(text for seed in range(20) if (text := drawn(single, seed)) is not None)
    assert lets_through(constraint, good)
    assert not lets_through(constraint, good.replace("f", "g", 1).replace("function", "gunction"))
    if parser.begin_marker:
        assert lets_through(constraint, f"I look. {good}\nDone.")
        assert not lets_through(constraint, f"I look. {parser.begin_marker}oh")
    assert forced(parser, BOUNDED, AUTO) is None
    assert forced(parser, STRICT, ToolChoice(mode="none")) is None


def test_calls_are_forced_behind_the_reasoning() -> None:
    call = '<tool_call>\n{"name": "get_weather", "arguments": {}}\n</tool_call>'
    inside = forced(HermesParser, reasoning=ThinkParser, is_inside=True)
    assert lets_through(inside, f"I look.\n</think>\n\n{call}")
    assert not lets_through(inside, "I look.")
    before = forced(HermesParser, reasoning=ThinkParser)
    assert lets_through(before, call)
    assert lets_through(before, f"<think>\nhm\n</think>\n\n{call}")
    assert not lets_through(before, f"hm</think>{call}")
    parser = OutputParser(ThinkParser(is_inside=False), HermesParser(BOUNDED))
    turn = turn_of(parser, [f"<think>\nhm\n</think>\n\n{call}"])
    assert (turn.reasoning, turn.content, len(turn.tool_calls)) == ("hm", "", 1)


def test_references_lead_to_where_the_schema_stands() -> None:
    schema = {
        "$ref": "#/$defs/a", "items": [{"$ref": "#"}], "const": {"$ref": "#"}, "x": 1,
        "properties": {"enum": {"$ref": "#/a"}},
    }  # fmt: skip
    assert rebased(schema, "#/t") == {
        "$ref": "#/t/$defs/a", "items": [{"$ref": "#/t"}], "const": {"$ref": "#"}, "x": 1,
        "properties": {"enum": {"$ref": "#/t/a"}},
    }  # fmt: skip


def test_objects_have_what_they_declare() -> None:
    inner = {"properties": {"x": {}}}
    schema = {"properties": {"a": inner, "properties": {"items": inner}}, "$defs": {"b": inner}}
    tool = FunctionTool(name="f", parameters=schema)
    closed = {**inner, "additionalProperties": False}
    assert object_schema(tool) == {
        "type": "object",
        "properties": {"a": closed, "properties": {"items": closed}},
        "$defs": {"b": closed},
        "additionalProperties": False,
    }
    for left_open in (
        {"allOf": [inner, {**inner}]}, {"anyOf": [inner], **inner}, {"$ref": "#/$defs/a", **inner},
    ):  # fmt: skip
        assert object_schema(FunctionTool(name="f", parameters={"items": left_open})) == {
            "type": "object",
            "items": left_open,
        }
    for own in ({"additionalProperties": {}}, {"patternProperties": {}}, {"required": ["y"]}):
        open_one = {"type": "object", **inner, **own}
        assert object_schema(FunctionTool(name="f", parameters=open_one)) == open_one


# Between tags a text is any text.
@pytest.mark.parametrize("name", sorted(ALL.keys() - {"qwen"}))
@pytest.mark.parametrize(
    "schema",
    [{"type": "number", "minimum": 0, "maximum": 9}, {"type": "string", "format": "time"}],
    ids=json.dumps,
)
def test_arguments_within_bounds_end_whatever_digit_the_model_likes_best(
    name: str, schema: dict[str, Any]
) -> None:
    """It writes one digit as long as that is allowed, as small models do."""
    parameters = {"type": "object", "properties": {"x": schema}, "required": ["x"]}
    constraint = forced(ALL[name], [FunctionTool(name="f", parameters=parameters)])
    made = matcher(constraint)
    digits = [tokenizer().tokenize_str(digit)[0] for digit in ".30"]
    rng, num = random.Random(1), 0
    while not made.is_accepting():
        mask = made.compute_bitmask()
        allowed = [each for each in range(8 * len(mask)) if mask[each // 8] >> each % 8 & 1]
        liked = [each for each in digits if each in allowed]
        assert made.consume_token(liked[0] if liked else rng.choice(allowed))
        num += 1
        assert num < 200


@pytest.mark.parametrize("name", ALL)
def test_arguments_of_which_none_end_are_refused_in_words(name: str) -> None:
    node = {"type": "object", "properties": {"next": {"$ref": "#/$defs/n"}}, "required": ["next"]}
    endless = {"properties": {"a": {"$ref": "#/$defs/n"}}, "required": ["a"], "$defs": {"n": node}}
    with pytest.raises(ValidationError, match="`tools`: no arguments of 'f' end"):
        forced(ALL[name], [FunctionTool(name="f", parameters=endless)])


def test_a_schema_that_nests_without_end_is_refused_in_words() -> None:
    schema: dict[str, Any] = {}
    for _ in range(5000):
        schema = {"items": schema}
    for name in ALL:
        tool = FunctionTool(name="f", parameters={"properties": {"a": schema}})
        with pytest.raises(ValidationError, match="nests too deeply"):
            forced(ALL[name], [tool])


@pytest.mark.parametrize("name", ALL)
def test_parameters_that_are_no_object_are_refused(name: str) -> None:
    tool = FunctionTool(name="f", parameters={"type": "string"})
    with pytest.raises(ValidationError, match="'f' must be a schema of the type `object`"):
        forced(ALL[name], [tool])


@pytest.mark.parametrize(
    ("name", "tool"),
    [
        ("pythonic", FunctionTool(name="f g")),
        ("pythonic", FunctionTool(name="f", parameters={"properties": {"a-b": {}}})),
        ("qwen", FunctionTool(name="f>")),
        ("qwen", FunctionTool(name="f", parameters={"properties": {"a b": {}}})),
        ("mistral newer", FunctionTool(name="f[ARGS]")),
        (
            "qwen",
            FunctionTool(name="f", parameters={"properties": {"a": {"const": "</parameter>"}}}),
        ),
    ],
)
def test_names_without_a_place_in_the_form_are_refused(name: str, tool: FunctionTool) -> None:
    with pytest.raises(ValidationError, match=r"is no name (that|of an arg)|cannot be written"):
        forced(ALL[name], [tool])


ODD = [None, 1, "x", [], {}, True, {"type": []}, {"enum": 1}, {"$ref": 1}, {"properties": {"a": 1}}]


@pytest.mark.parametrize("name", ALL)
def test_odd_schemas_are_refused_in_words_or_left_to_the_check_of_the_grammar(name: str) -> None:
    for odd in ODD:
        for parameters in ({"properties": odd}, {"required": odd}, {"properties": {"a": odd}}, odd):
            tool = FunctionTool(
                name="f", parameters=parameters if isinstance(parameters, dict) else {}
            )
            calls = "<tool_call><function=f><parameter=a>1</parameter>"
            assert turn_of(ALL[name]([tool]), [calls]).content in ("", calls)
            with contextlib.suppress(ValidationError):
                assert forced(ALL[name], [replace(tool, strict=True)]) is not None


class NoGrammar(LlamaJsonParser):
    grammar = ToolCallParser.grammar


def test_a_parser_without_a_grammar_says_so() -> None:
    with pytest.raises(ValidationError, match="`tool_choice`: the calls of this model have no"):
        forced(NoGrammar)


def test_definitions_become_tools() -> None:
    definitions = [
        {"type": "function", "function": {"name": "f", "parameters": None, "strict": None}},
        {"type": "function", "function": {"name": "g", "parameters": {"a": 1}, "strict": True}},
    ]
    first, second = tools_of(definitions)
    assert first.parameters == {"type": "object", "properties": {}, "additionalProperties": False}
    assert (first.strict, second.strict, second.parameters) == (False, True, {"a": 1})


def chat(tools: Sequence[FunctionTool] = (), choice: ToolChoice = AUTO, **more: Any) -> ChatPrompt:
    definitions = [
        {
            "type": "function",
            "function": {
                "name": tool.name, "parameters": dict(tool.parameters), "strict": tool.strict
            },
        }
        for tool in tools
    ]  # fmt: skip
    messages = [{"role": "user", "content": "a"}]
    return ChatPrompt(messages=messages, tools=definitions, tool_choice=choice, **more)


def test_a_forced_call_comes_behind_the_reasoning_that_its_prompt_begins() -> None:
    outputs = OutputParsers(HermesParser, ThinkParser, {})
    inside = outputs.constraint(chat(BOUNDED, REQUIRED), "assistant\n<think>\n")
    outside = outputs.constraint(chat(BOUNDED, REQUIRED), "assistant\n")
    assert inside == forced(HermesParser, reasoning=ThinkParser, is_inside=True)
    assert outside == forced(HermesParser, reasoning=ThinkParser)
    assert outputs.constraint(chat(BOUNDED), "assistant\n") is None


CONTENT = Constraint(
    kind=ConstraintKind.JSON_SCHEMA,
    text=json.dumps(
        {
            "type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}},
            "required": ["city"], "additionalProperties": False,
        }
    ),
)  # fmt: skip
CITY = '{"city": "Rome"}'
WHOLE_CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1, "c": []}}\n</tool_call>'


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("tools", [BOUNDED, STRICT], ids=["free", "strict"])
def test_an_answer_that_is_bound_is_its_content_or_calls(
    name: str, tools: Sequence[FunctionTool]
) -> None:
    constraint = constraint_of(tools, AUTO, ALL[name], {}, content=CONTENT)
    alone = forced(ALL[name], tools[:1])
    calls = next(text for seed in range(40) if (text := drawn(alone, seed)))
    assert lets_through(constraint, CITY)
    assert lets_through(constraint, calls), calls
    for other in ("Rome", '{"city": "Paris"}', f"{CITY} {calls}", ""):
        assert not lets_through(constraint, other), other
    assert constraint is not None
    assert constraint.field_name == "response_format"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (Constraint(kind=ConstraintKind.REGEX, text="[0-9]{4}/x"), "2024/x"),
        (Constraint(kind=ConstraintKind.CHOICE, text='["yes", "no"]'), "no"),
        (Constraint(kind=ConstraintKind.LARK, text='start: A B\nA: "a"\nB: "b"'), "ab"),
    ],
)
def test_whatever_binds_the_content_does_so_beside_tools(content: Constraint, text: str) -> None:
    constraint = constraint_of(BOUNDED, AUTO, HermesParser, {}, content=content)
    assert lets_through(constraint, text)
    assert lets_through(constraint, WHOLE_CALL)
    assert not lets_through(constraint, text + text)


def test_where_calls_are_forced_there_is_no_content_to_bind() -> None:
    for choice in (REQUIRED, ToolChoice(mode="named", name="f")):
        assert constraint_of(
            BOUNDED, choice, HermesParser, {}, content=CONTENT
        ) == constraint_of(BOUNDED, choice, HermesParser, {})  # fmt: skip


def test_content_is_bound_behind_the_reasoning() -> None:
    outputs = OutputParsers(HermesParser, ThinkParser, {})
    inside = outputs.constraint(chat(), "assistant\n<think>\n", CONTENT)
    outside = outputs.constraint(chat(), "assistant\n", CONTENT)
    assert lets_through(inside, f"hm {{</think>\n\n{CITY}")
    assert not lets_through(inside, CITY)
    assert lets_through(outside, CITY)
    assert lets_through(outside, f"<think>hm</think>{CITY}")
    assert not lets_through(outside, f"hm{CITY}")
    beside = outputs.constraint(chat(BOUNDED), "assistant\n<think>\n", CONTENT)
    for text in (CITY, WHOLE_CALL):
        assert lets_through(beside, f"hm</think>{text}")


def test_content_that_nothing_stands_beside_is_bound_as_it_is() -> None:
    assert OutputParsers().constraint(chat(), "", CONTENT) is CONTENT
    assert OutputParsers(None).constraint(chat(BOUNDED), "", CONTENT) is CONTENT
    as_one_text = ChatPrompt.of_user("a")
    thinks = OutputParsers(HermesParser, ThinkParser, {})
    assert thinks.constraint(as_one_text, "<think>\n", CONTENT) is CONTENT


def test_a_server_that_reads_no_calls_forces_none() -> None:
    outputs = OutputParsers(None)
    assert outputs.constraint(chat(BOUNDED)) is None
    with pytest.raises(ValidationError, match="reads no tool calls"):
        outputs.constraint(chat(BOUNDED, REQUIRED))
    assert outputs.new(chat(BOUNDED)).feed("<tool_call>") != []


def test_an_answer_is_read_by_what_its_prompt_ends_with() -> None:
    outputs = OutputParsers(HermesParser, ThinkParser)
    turn = turn_of(outputs.new(chat(), "assistant\n<think>\n"), ["hm</think>x"])
    assert (turn.reasoning, turn.content) == ("hm", "x")
    assert turn_of(outputs.new(chat(), "assistant\n"), ["hm</think>x"]).reasoning == ""
    none = chat(BOUNDED, ToolChoice(mode="none"))
    assert turn_of(outputs.new(none), ["<tool_call>"]).content == "<tool_call>"


CALL = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'


def test_calls_after_the_first_are_left_out_where_one_is_wanted() -> None:
    single = chat(BOUNDED, ToolChoice(is_single=True))
    for pieces in ([CALL + CALL + "x"], list(CALL + CALL + "x")):
        turn = turn_of(OutputParsers().new(single), pieces)
        assert [call.name for call in turn.tool_calls] == ["f"]
        assert turn.content == "x"
    assert len(turn_of(OutputParsers().new(chat(BOUNDED)), [CALL + CALL]).tool_calls) == 2
