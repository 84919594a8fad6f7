"""Chat templates: where they come from, what they may use, how they fail."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest

from lorax_contract.errors import StartupError, TemplateError
from lorax_router.service.prompts.chat_template import (
    ChatTemplate,
    TemplateSource,
    load_chat_template,
)

HELLO = [{"role": "user", "content": "hello"}]


def render(text: str, **variables: object) -> str:
    source = TemplateSource(text, {"bos_token": "<s>", "eos_token": "</s>"})
    return ChatTemplate(source, now=lambda: datetime(2024, 5, 6, tzinfo=UTC)).render(
        HELLO, **variables
    )


def test_messages_and_special_tokens():
    template = (
        "{{ bos_token }}{% for message in messages %}\n"
        "[{{ message['role'] }}] {{ message['content'] | trim }}{{ eos_token }}\n"
        "{% endfor %}\n"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    assert render(template) == "<s>[user] hello</s>\n[assistant]"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ strftime_now('%d %b %Y') }}", "06 May 2024"),
        ("{{ {'b': '<é>', 'a': 1} | tojson }}", '{"b": "<é>", "a": 1}'),
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ("{% for m in [1,2,3] %}{% if m == 2 %}{% break %}{% endif %}{{ m }}{% endfor %}", "1"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", "hello"),
        ("{{ messages[0].content.upper() }}", "HELLO"),
        ("{% set ns = namespace(x=1) %}{% set ns.x = 2 %}{{ ns.x }}", "2"),
        ("{% if tools is defined %}yes{% else %}no{% endif %}", "no"),
    ],
)
def test_what_templates_may_use(template, expected):
    assert render(template) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.append(1) }}", "failed"),
        ("{{ ''.__class__.__mro__ }}", "failed"),
        ("{{ messages[0].content + 1 }}", "failed"),
        ("{{ 1 / 0 }}", "failed"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "failed"),
    ],
)
def test_failures_are_template_errors(template, message):
    with pytest.raises(TemplateError, match=message):
        render(template)


def folder(tmp_path, config=None, jinja=None):
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    if jinja is not None:
        (tmp_path / "chat_template.jinja").write_text(jinja)
    return str(tmp_path)


def test_template_and_tokens_of_the_config(tmp_path):
    config = {"chat_template": "{{ bos_token }}!{{ eos_token }}", "bos_token": "<b>"}
    config["eos_token"] = {"content": "<e>"}
    assert load_chat_template(folder(tmp_path, config)).render(HELLO) == "<b>!<e>"


def test_the_default_of_several_templates(tmp_path):
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    assert load_chat_template(folder(tmp_path, {"chat_template": named})).render(HELLO) == "D"


def test_a_template_file_wins_over_the_config(tmp_path):
    path = folder(tmp_path, {"chat_template": "config", "bos_token": "<b>"}, "{{ bos_token }}file")
    assert load_chat_template(path).render(HELLO) == "<b>file"


def test_an_override_wins_over_both(tmp_path):
    path = folder(tmp_path, {"chat_template": "config", "eos_token": "<e>"}, "file")
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"chat_template": "{{ eos_token }}other"}))
    assert load_chat_template(path, str(other)).render(HELLO) == "<e>other"
    plain = tmp_path / "plain.jinja"
    plain.write_text("plain")
    assert load_chat_template(path, str(plain)).render(HELLO) == "plain"


def test_no_template_at_all(tmp_path):
    template = load_chat_template(str(tmp_path))
    assert not template.is_present
    with pytest.raises(TemplateError, match="no chat template"):
        template.render(HELLO)


@pytest.mark.parametrize("text", ["{", "[]", "{% for %}"])
def test_files_that_cannot_be_used_are_named(tmp_path, text):
    path = tmp_path / ("bad.jinja" if "%" in text else "bad.json")
    path.write_text(text)
    with pytest.raises(StartupError, match="bad"):
        load_chat_template(str(tmp_path), str(path))


def test_a_missing_override_is_named(tmp_path):
    with pytest.raises(StartupError, match=r"missing\.json"):
        load_chat_template(str(tmp_path), str(tmp_path / "missing.json"))
