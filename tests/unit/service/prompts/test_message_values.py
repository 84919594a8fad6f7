"""What templates are given of messages: forms of contents, calls, reasoning, the end of the last."""

from __future__ import annotations

from typing import Any

import pytest
from tests.helpers.chat_formats import BRACKETS, FORMATS, SPECIAL_TOKENS, TURNS
from tests.helpers.in_loop import in_loop
from tests.helpers.inline_templates import InlineTemplates

from lorax_contract.errors import TemplateError, ValidationError
from lorax_router.service.prompts.chat_renderers import ChatRenderers, check_chat
from lorax_router.service.prompts.chat_template import ChatTemplate
from lorax_router.service.prompts.content_format import content_format_of
from lorax_router.service.prompts.message_values import messages_for_template
from lorax_router.service.prompts.render_process import rendered
from lorax_router.service.prompts.sandbox import RenderError
from lorax_router.service.requests import ChatPrompt

PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
LOOP = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize("name", FORMATS)
def test_of_the_public_formats_the_one_with_parts_is_known(name: str) -> None:
    assert content_format_of(FORMATS[name]) == ("openai" if name == "turns" else "string")


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% for p in m['content'] %}{{ p.text }}{% endfor %}{% endfor %}",
        "{% for m in messages[1:] %}{% set c = m.content %}{% for p in c %}{% endfor %}{% endfor %}",
        "{% set m = messages[0] %}{% for p in m.get('content') %}{{ p }}{% endfor %}",
        "{% for p in (messages | first).content | selectattr('text') %}{% endfor %}",
        (
            "{% set ns = namespace() %}{% set ns.c = messages[-1]['content'] %}"
            "{% for p in ns.c %}{% endfor %}"
        ),
        (
            "{% macro say(c) %}{% for p in c %}{{ p.text }}{% endfor %}{% endmacro %}"
            "{% for m in messages %}{{ say(m.content) }}{% endfor %}"
        ),
        (
            "{% set rest = messages[1:] if messages[0].role == 'system' else messages %}"
            "{% for m in rest %}{{ m.content | map(attribute='text') | join }}{% endfor %}"
        ),
    ],
)
def test_a_template_that_walks_over_parts_is_known_by_its_syntax(template: str) -> None:
    assert content_format_of(template) == "openai"


@pytest.mark.parametrize(
    "template",
    [
        LOOP,
        "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}",
        "{% for m in messages %}{% for c in m.tool_calls %}{{ c.content }}{% endfor %}{% endfor %}",
        "{% for p in tools %}{{ p.content }}{% for q in p.content %}{% endfor %}{% endfor %}",
        "{% for word in messages[0].content.split() %}{{ word }}{% endfor %}",
        "",
    ],
)
def test_a_template_that_writes_contents_gets_texts(template: str) -> None:
    assert content_format_of(template) == "string"


def test_parts_become_one_text_where_no_parts_are_read() -> None:
    values = {"messages": [{"role": "user", "content": PARTS}]}
    assert rendered(LOOP, values, {}, 99) == "a\nb"
    assert "'type'" in rendered(LOOP, values, {"content_format": "openai"}, 99)
    walking = "{% for p in messages[0].content %}[{{ p.text }}]{% endfor %}"
    assert rendered(walking, values, {}, 99) == "[a][b]"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([], ""),
        (["a", {"type": "text", "text": "b"}], "a\nb"),
        ([{"type": "refusal", "refusal": "no"}], "no"),
        ([{"type": "output_text", "text": "x"}], "x"),
        ("text", "text"),
    ],
)
def test_contents_as_texts(content: object, expected: str) -> None:
    (message,) = messages_for_template([{"role": "user", "content": content}], "string")
    assert message["content"] == expected


def test_what_is_no_text_is_refused_in_words() -> None:
    image = [{"type": "image_url", "image_url": {"url": "data:"}}]
    with pytest.raises(RenderError, match="takes texts only, .* of type 'image_url'"):
        messages_for_template([{"role": "user", "content": image}], "string")
    with pytest.raises(RenderError, match="message 1 is no object"):
        messages_for_template([{}, "hello"], "string")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"a": [1, 2.50]}', {"a": [1, 2.5]}),
        ("", {}),
        (" ", {}),
        ("{broken", "{broken"),
        ("[" * 100_000, "[" * 100_000),
        ("9" * 5000, "9" * 5000),
        ({"a": 1}, {"a": 1}),
    ],
)
def test_arguments_of_calls_become_objects(arguments: object, expected: object) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    sent = {"role": "assistant", "content": None, "tool_calls": [call]}
    (message,) = messages_for_template([sent], "string")
    assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": expected}
    # The client's own message is as it was.
    assert call["function"]["arguments"] == arguments
    assert "content" not in message


@pytest.mark.parametrize(
    "calls",
    [None, [], ["x"], [{}], [{"function": None}], [{"function": {"arguments": 1}}], "calls"],
)
def test_odd_calls_are_left_to_the_template(calls: Any) -> None:
    (message,) = messages_for_template([{"role": "assistant", "tool_calls": calls}], "string")
    assert message.get("tool_calls") == calls


def test_reasoning_goes_by_the_names_that_templates_read() -> None:
    for name in ("reasoning_content", "thinking", "reasoning"):
        (message,) = messages_for_template([{name: "hm", "content": "x"}], "string")
        assert message["reasoning_content"] == message["thinking"] == "hm"


CONTINUED = ChatPrompt(
    messages=[{"role": "user", "content": "a"}, {"role": "assistant", "content": PARTS}],
    add_generation_prompt=False,
    continue_final_message=True,
)


@in_loop
async def test_a_last_message_in_parts_is_continued_within_its_last_text() -> None:
    text = await InlineTemplates(ChatTemplate(TURNS, SPECIAL_TOKENS)).render(CONTINUED)
    assert text.endswith("<start_of_turn>model\nab")
    text = await InlineTemplates(ChatTemplate(BRACKETS, SPECIAL_TOKENS)).render(CONTINUED)
    assert text.endswith("[INST] a[/INST] a\nb")


@pytest.mark.parametrize(
    ("template", "content", "reason"),
    [
        ("{{ messages[-1].text }}", "x", "does not read `content`"),
        (LOOP, None, "has no `content`"),
        ("{{ messages[0].content }}{# content #}", "xyz", "leaves out a part"),
        ("{% for p in messages[-1].content %}{% endfor %}", [{"type": "a"}], "no text"),
        ("{{ messages[-1].content[:3] }}", "abcdef", "leaves out a part"),
    ],
)
@in_loop
async def test_a_message_that_cannot_be_continued_says_why(
    template: str, content: object, reason: str
) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": content}]
    chat = ChatPrompt(messages=messages, add_generation_prompt=False, continue_final_message=True)
    with pytest.raises(TemplateError, match=f"of this model failed: .*{reason}"):
        await InlineTemplates(template).render(chat)


@pytest.mark.parametrize(
    "name",
    ["messages", "tools", "documents", "add_generation_prompt", "continue_final_message",
     "chat_template", "conversation", "tokenize"],
)  # fmt: skip
def test_what_has_a_field_of_its_own_is_no_option_of_a_template(name: str) -> None:
    with pytest.raises(ValidationError, match=f"`template_kwargs` must not have `{name}`"):
        check_chat(ChatPrompt(messages=[{}], template_kwargs={name: 1, "zebra": 2}))


def test_a_message_is_continued_or_begun() -> None:
    with pytest.raises(ValidationError, match="exclude each other"):
        check_chat(ChatPrompt(messages=[{}], continue_final_message=True))


@in_loop
async def test_of_two_templates_tools_choose() -> None:
    base = ChatTemplate("plain {{ bos_token }}", {"bos_token": "<s>"}, tool_use="tools {{ tools }}")
    renderers = ChatRenderers(base)
    chat = ChatPrompt.of_user("hello")
    try:
        assert await renderers.render(chat) == "plain <s>"
        with_tools = ChatPrompt(messages=chat.messages, tools=[{"a": 1}])
        assert await renderers.render(with_tools) == "tools [{'a': 1}]"
        own = ChatTemplate("own", tool_use="own {{ tools[0].a }}").of("adapter a")
        assert await renderers.render(with_tools, own) == "own 1"
    finally:
        await renderers.close()


@in_loop
async def test_the_operator_says_which_form_contents_have() -> None:
    renderers = ChatRenderers(ChatTemplate(LOOP), content_format="openai")
    try:
        chat = ChatPrompt(messages=[{"role": "user", "content": PARTS}])
        assert (await renderers.render(chat)).startswith("[{")
        # An adapter's own template says it itself.
        assert await renderers.render(chat, ChatTemplate(LOOP + "!").of("adapter a")) == "a\nb!"
    finally:
        await renderers.close()
