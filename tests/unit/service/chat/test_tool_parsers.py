"""Tool calls in the texts of models: what is one, what is none, and what comes of broken ones."""

from __future__ import annotations

import pytest
from tests.helpers.chat_texts import PARSERS, fed, parser_of, said, turn_of

from lorax_router.service.chat.deltas import (
    AssistantTurn,
    ChatDelta,
    ContentDelta,
    ToolArgumentsDelta,
    ToolCallStart,
)
from lorax_router.service.chat.tools import FunctionTool


def turn_of_deltas(deltas: list[ChatDelta]) -> AssistantTurn:
    turn = AssistantTurn()
    turn.add(deltas)
    return turn


F = ("f", '{"a": 1}')
HERMES_F = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("", "", []),
        (" hello\n", " hello\n", []),
        (HERMES_F, "", [F]),
        ("\n\n" + HERMES_F + "\n", "", [F]),
        ("I look.\n" + HERMES_F, "I look.\n", [F]),
        (HERMES_F + "\n" + HERMES_F, "", [F, F]),
        (HERMES_F + " done", " done", [F]),
        # In the other order, with what says nothing, without spaces, without arguments.
        ('<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', "", [F]),
        (
            '<tool_call>{"id":1,"name":"f","x":[{}],"arguments":{"a": 1},"y":"}"}</tool_call>',
            "",
            [F],
        ),
        ('<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
        # A list in one tag.
        (
            (
                '<tool_call>[{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]\n'
                "</tool_call>"
            ),
            "",
            [F, ("g", "{}")],
        ),
        # As the model wrote them, odd as that may be.
        (
            '<tool_call>{"name": "f", "arguments": {"a" :1,\n "b": "</tool_call>\\"é"}}</tool_call>',
            "",
            [("f", '{"a" :1,\n "b": "</tool_call>\\"é"}')],
        ),
        # A string that holds an object is that object.
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [F]),
        ('<tool_call>{"name": "f", "arguments": "x"}</tool_call>', "", [("f", '"x"')]),
        # No calls.
        ("<tool_call>what?</tool_call>", "<tool_call>what?</tool_call>", []),
        (
            '<tool_call>{"arguments": {}}</tool_call>',
            '<tool_call>{"arguments": {}}</tool_call>',
            [],
        ),
        ('<tool_call>{"name": 7, "arguments": {}}', '<tool_call>{"name": 7, "arguments": {}}', []),
        ('<tool_call>{"name": "f", "argu', '<tool_call>{"name": "f", "argu', []),
        ("1 < 2 <tool_", "1 < 2 <tool_", []),
        # Broken ones: what has begun keeps what was written.
        ('<tool_call>{"name": "f", "arguments": {"a": 1}', "", [F]),
        ('<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call>', "", [F]),
        (
            '<tool_call>{"name": "f", "arguments": {"a": tru</tool_call> x',
            " x",
            [("f", '{"a": tru')],
        ),
        ('<tool_call>{"name": "f", "arguments": {"a": "1\\', "", [("f", '{"a": "1\\')]),
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\"', "", [("f", '"{\\"a\\"')]),
        (
            '<tool_call>{"name": "f", "arguments": {"a": 1} oh</tool_call>',
            " oh</tool_call>",
            [F],
        ),
        (HERMES_F.removesuffix("_call>"), "", [F]),
    ],
)
def test_hermes(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert said("hermes", text) == (content, calls)


LLAMA_F = '{"name": "f", "parameters": {"a": 1}}'


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (LLAMA_F, "", [F]),
        (" " + LLAMA_F + "\n", "", [F]),
        ("<|python_tag|>" + LLAMA_F, "", [F]),
        ("I look. <|python_tag|>" + LLAMA_F, "I look. ", [F]),
        (f"{LLAMA_F}; {LLAMA_F};{LLAMA_F};", "", [F, F, F]),
        ('{"type": "function", "name": "f", "arguments": {"a": 1}}', "", [F]),
        # JSON that is no call of a tool of the request.
        ('{"name": "Bob", "parameters": {}}', '{"name": "Bob", "parameters": {}}', []),
        ('{"name": "f"}', '{"name": "f"}', []),
        ('{"name": "f", "age": 7}', '{"name": "f", "age": 7}', []),
        ('{"name": "f", "parameters": [1]}', '{"name": "f", "parameters": [1]}', []),
        ("text " + LLAMA_F, "text " + LLAMA_F, []),
        ('<|python_tag|>search.call(q="x")', '<|python_tag|>search.call(q="x")', []),
        (LLAMA_F + "; and", "; and", [F]),
        (LLAMA_F + " and", " and", [F]),
        ("{", "{", []),
        ("", "", []),
    ],
)
def test_llama(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert said("llama", text) == (content, calls)


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ('[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}]', "", [F]),
        ('Yes.[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}, "id": "x"}]', "Yes.", [F]),
        (
            '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]\n',
            "",
            [F, ("g", "{}")],
        ),
        ('[TOOL_CALLS]f[ARGS]{"a": 1}', "", [F]),
        ('[TOOL_CALLS]f{"a": 1}[TOOL_CALLS]g{}', "", [F, ("g", "{}")]),
        ('[TOOL_CALLS]f[CALL_ID]abcABC123[ARGS]{"a": 1}', "", [F]),
        ('[TOOL_CALLS]f[ARGS]{"a": "]', "", [("f", '{"a": "]')]),
        ('[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}', "", [F]),
        ("[TOOL_CALLS]", "[TOOL_CALLS]", []),
        ("[TOOL_CALLS]f and g", "[TOOL_CALLS]f and g", []),
        ("[TOOL_CALLS]f[ARGS]7", "[TOOL_CALLS]f[ARGS]7", []),
        ("[TOOL_CALLS][1, 2]", "[TOOL_CALLS][1, 2]", []),
        ("[1] [TOOL_", "[1] [TOOL_", []),
    ],
)
def test_mistral(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert said("mistral", text) == (content, calls)


def test_mistrals_ids_are_what_its_templates_take() -> None:
    parser = PARSERS["mistral"]([])
    text = "[TOOL_CALLS]f[CALL_ID]abcABC123[ARGS]{}[TOOL_CALLS]f{}[TOOL_CALLS]f{}"
    first, *others = [call.id for call in turn_of(parser, [text]).tool_calls]
    assert first == "abcABC123"
    assert [len(each) for each in others] == [9, 9]
    assert all(each.isalnum() and each.isascii() for each in others)
    assert len(set(others)) == 2


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("[f(a=1)]", "", [F]),
        (" [f(a=1), get_weather()]\n", "", [F, ("get_weather", "{}")]),
        ("<|python_start|>[f(a=1)]<|python_end|>", "", [F]),
        (
            """[f(a=-1.5e3, b='it\\'s "x", )', c=[True, None, (1, 2), {"k": 'v'}],)]""",
            "",
            [
                (
                    "f",
                    '{"a": -1500.0, "b": "it\'s \\"x\\", )", "c": [true, null, [1, 2], {"k": "v"}]}',
                )
            ],
        ),
        ("[f(b='''a'b''', c=\"\")]", "", [("f", '{"b": "a\'b", "c": ""}')]),
        ("[f(b='\\u00e9\\n\\x41\\q' \"!\")]", "", [("f", '{"b": "é\\nA\\\\q!"}')]),
        ("[f(b=r'\\n')]", "", [("f", '{"b": "\\\\n"}')]),
        ("[f(a=true, b=null)]", "", [("f", '{"a": true, "b": null}')]),
        # No calls: another name, no keyword, no literal, twice the same, no list.
        ("[1, 2, 3]", "[1, 2, 3]", []),
        ("[g(a=1)]", "[g(a=1)]", []),
        ("[f(1)]", "[f(1)]", []),
        ("[f(a=x)]", "[f(a=x)]", []),
        ("[f(a=f(a=1))]", "[f(a=f(a=1))]", []),
        ("[f(a=1, a=2)]", "[f(a=1, a=2)]", []),
        ("[f(a=1e999)]", "[f(a=1e999)]", []),
        ("[f(a=" + "9" * 5000 + ")]", "[f(a=" + "9" * 5000 + ")]", []),
        ("[f(a=" + "[" * 200 + "]" * 200 + ")]", "[f(a=" + "[" * 200 + "]" * 200 + ")]", []),
        ("f(a=1)", "f(a=1)", []),
        ("Hello [f(a=1)]", "Hello [f(a=1)]", []),
        ("[f(a=1", "[f(a=1", []),
        ("[", "[", []),
        # What follows a call that was whole.
        ("[f(a=1), hello]", ", hello]", [F]),
        ("[f(a=1)", "", [F]),
        ("[f(a=1)] and", " and", [F]),
    ],
)
def test_pythonic(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert said("pythonic", text) == (content, calls)


QWEN_F = "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (QWEN_F, "", [F]),
        ("I look.\n" + QWEN_F + "\n" + QWEN_F + "\n", "I look.\n", [F, F]),
        (
            (
                '<tool_call><function=f><parameter=b>\n"1" <x>\n\n</parameter><parameter=c>[1, 2]'
                "</parameter></function></tool_call>"
            ),
            "",
            [("f", '{"b": "\\"1\\" <x>\\n", "c": [1, 2]}')],
        ),
        ("<tool_call><function=f></function></tool_call>", "", [("f", "{}")]),
        # What is no number though one is asked for; what Python calls it.
        ("<tool_call><function=f><parameter=a>x</parameter></function>", "", [("f", '{"a": "x"}')]),
        ("<tool_call><function=f><parameter=a>None</parameter>", "", [("f", '{"a": null}')]),
        ("<tool_call><function=new><parameter=a>1</parameter>", "", [("new", '{"a": "1"}')]),
        # Broken ones.
        ("<tool_call>hello", "<tool_call>hello", []),
        ("<tool_call><function=f g>", "<tool_call><function=f g>", []),
        ("<tool_call><function=f><parameter=a>1", "", [("f", '{"a": 1')]),
        ("<tool_call><function=f><parameter=b>\nx\n</par", "", [("f", '{"b": "x\\n</par')]),
        ("<tool_call><function=f><parameter=b>", "", [("f", '{"b": ')]),
        ("<tool_call><function=f><parameter=b></parameter>", "", [("f", '{"b": ""}')]),
        ("<tool_call><function=f><parameter=b>\n</parameter>", "", [("f", '{"b": ""}')]),
        ("<tool_call><function=f>oh</function>", "oh</function>", [("f", "{}")]),
    ],
)
def test_qwen_coder(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert said("qwen", text) == (content, calls)


def test_qwen_coders_values_are_of_the_types_of_the_schema() -> None:
    schemas = {"a": {"enum": [1, "1"]}, "b": {"enum": [1, 2]}, "c": {"const": True}, "d": {}}
    schemas |= {"e": {"anyOf": [{"type": "number"}, {"type": "null"}]}, "f": {"type": ["string"]}}
    tool = FunctionTool(name="f", parameters={"properties": schemas})
    values = "".join(f"<parameter={name}>1</parameter>" for name in schemas)
    (call,) = said("qwen", f"<tool_call><function=f>{values}</function>", [tool])[1]
    assert call == ("f", '{"a": "1", "b": 1, "c": 1, "d": "1", "e": 1, "f": "1"}')


def test_deltas_come_as_they_form() -> None:
    parser = parser_of("hermes")
    pieces = [
        "Well",
        ". <tool",
        '_call>{"name": "f", "arg',
        'uments": {"a',
        '": 1',
        "}}</tool_call>",
    ]
    assert [parser.feed(piece) for piece in pieces] == [
        [ContentDelta("Well")],
        [ContentDelta(". ")],
        [],
        [ToolCallStart(0, "id0", "f"), ToolArgumentsDelta(0, '{"a')],
        [ToolArgumentsDelta(0, '": 1')],
        [ToolArgumentsDelta(0, "}")],
    ]
    assert parser.finish() == []


def test_texts_in_tags_come_as_they_form() -> None:
    parser = parser_of("qwen")
    assert parser.feed("<tool_call><function=f><parameter=b>\nfirst\n")[-1:] == [
        ToolArgumentsDelta(0, "first")
    ]
    assert parser.feed('"2"<') == [ToolArgumentsDelta(0, '\\n\\"2\\"')]


def test_json_that_is_no_call_is_not_held_back() -> None:
    parser = parser_of("llama")
    assert parser.feed('{"answer') == []
    assert turn_of_deltas(parser.feed('": ')).content == '{"answer": '
    assert parser.feed("4") == [ContentDelta("4")]


@pytest.mark.parametrize("name", PARSERS)
def test_long_texts_are_read_once(name: str) -> None:
    """Bounds the work: each piece costs what it has, however much is held back."""
    nested = {
        "hermes": '<tool_call>{"k": "' * 2000,
        "llama": '{"type": "' + "x" * 30_000,
        "mistral": '[TOOL_CALLS][{"k": "' * 2000,
        "pythonic": "[f(b='" + "x" * 30_000,
        "qwen": "<tool_call>  " * 2000 + "x",
    }[name]
    pieces = [nested[at : at + 4] for at in range(0, len(nested), 4)]
    deltas = fed(parser_of(name), pieces)
    assert "".join(delta.text for delta in deltas) == nested
