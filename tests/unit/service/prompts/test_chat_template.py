"""Chat templates: which of a folder's files has them, and the special tokens beside them."""

from __future__ import annotations

import json

import pytest

from lorax_contract.errors import StartupError
from lorax_router.service.prompts.chat_template import (
    ChatTemplate,
    load_chat_template,
    load_special_tokens,
    template_of_files,
)
from lorax_router.service.prompts.render_process import rendered
from lorax_router.service.prompts.sandbox import RenderError


def folder(tmp_path, config=None, jinja=None):
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    if jinja is not None:
        (tmp_path / "chat_template.jinja").write_text(jinja)
    return str(tmp_path)


def test_template_and_tokens_of_the_config(tmp_path):
    config = {"chat_template": "{{ bos_token }}", "bos_token": "<b>", "sep_token": "<sep>"}
    config |= {"eos_token": {"content": "<e>"}, "unk_token": None, "other_token": "<o>"}
    assert load_chat_template(folder(tmp_path, config)) == ChatTemplate(
        "{{ bos_token }}", {"bos_token": "<b>", "eos_token": "<e>", "sep_token": "<sep>"}
    )


def test_the_default_of_several_templates(tmp_path):
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    template = load_chat_template(folder(tmp_path, {"chat_template": named}))
    assert (template.text, template.tool_use) == ("D", "T")
    assert template.chosen(with_tools=False).text == "D"
    assert template.chosen(with_tools=True) == ChatTemplate("T")


def test_templates_by_name_without_a_default(tmp_path):
    named = [{"name": "tool_use", "template": "T"}, {"name": "rag", "template": "R"}]
    template = load_chat_template(folder(tmp_path, {"chat_template": named}))
    assert template.chosen(with_tools=True).text == "T"
    text = template.chosen(with_tools=False).text
    with pytest.raises(RenderError, match='none of which is called "default"'):
        rendered(text, {}, {}, 99)


def test_templates_in_files_replace_those_of_the_config(tmp_path):
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("T")
    path = folder(tmp_path, {"chat_template": "config"})
    # As transformers has it: a file by name leaves no default.
    assert "raise_exception" in load_chat_template(path).text
    assert load_chat_template(folder(tmp_path, jinja="D")) == ChatTemplate("D", tool_use="T")


def test_a_template_may_be_given_as_text_or_file(tmp_path):
    path = folder(tmp_path, {"chat_template": "config", "bos_token": "<b>"}, "file")
    (tmp_path / "given").write_text("given")
    expected = {"{{ 1 }}": "{{ 1 }}", "a\nb": "a\nb", str(tmp_path / "given"): "given"}
    for given, text in expected.items():
        assert load_chat_template(path, None, given) == ChatTemplate(text, {"bos_token": "<b>"})
    with pytest.raises(StartupError, match="nowhere"):
        load_chat_template(path, None, "nowhere")
    with pytest.raises(StartupError, match=r"--chat-template is not valid: Expected"):
        load_chat_template(path, None, "{% for %}")


def test_a_template_file_wins_over_the_config(tmp_path):
    path = folder(tmp_path, {"chat_template": "config", "bos_token": "<b>"}, "file")
    assert load_chat_template(path) == ChatTemplate("file", {"bos_token": "<b>"})


def test_an_override_wins_over_both(tmp_path):
    path = folder(tmp_path, {"chat_template": "config", "eos_token": "<e>"}, "file")
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"chat_template": "other"}))
    assert load_chat_template(path, str(other)) == ChatTemplate("other", {"eos_token": "<e>"})
    plain = tmp_path / "plain.jinja"
    plain.write_text("plain")
    assert load_chat_template(path, str(plain)).text == "plain"


def test_no_template_at_all(tmp_path):
    assert load_chat_template(str(tmp_path)) is None


@pytest.mark.parametrize(
    "text", ["{", "[]", "{% for %}", "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}"]
)
def test_files_that_cannot_be_used_are_named(tmp_path, text):
    path = tmp_path / ("bad.jinja" if "}" in text else "bad.json")
    path.write_text(text)
    with pytest.raises(StartupError, match="bad"):
        load_chat_template(str(tmp_path), str(path))


def test_a_missing_override_is_named(tmp_path):
    with pytest.raises(StartupError, match=r"missing\.json"):
        load_chat_template(str(tmp_path), str(tmp_path / "missing.json"))


def test_an_adapters_template_is_read_and_nothing_of_it_run():
    endless = "{{ 9**(9**9) }}"
    files = {
        "tokenizer_config.json": json.dumps({"chat_template": "C", "eos_token": "<e>"}).encode(),
        "chat_template.jinja": endless.encode(),
    }
    template = template_of_files(files, "adapter a")
    assert template == ChatTemplate(endless, {"eos_token": "<e>"}, "adapter a")
    assert template_of_files({}, "adapter a") is None


def test_a_template_that_comes_without_special_tokens_writes_the_models():
    template, config = {"chat_template.jinja": b"T"}, {"tokenizer_config.json": b"{}"}
    base = {"eos_token": "<e>"}
    assert template_of_files(template, "a", base) == ChatTemplate("T", base, "a")
    # A file that names none says that there are none, as for transformers.
    assert template_of_files(template | config, "a", base) == ChatTemplate("T", {}, "a")


def test_a_models_special_tokens_are_read_without_a_template_too(tmp_path):
    assert load_special_tokens(str(tmp_path)) == {}
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<e>"}}')
    assert load_special_tokens(str(tmp_path)) == {"eos_token": "<e>"}


@pytest.mark.parametrize(
    "named", [[{"name": {}, "template": "T"}], [{"name": "default"}], [1, None], {"default": 1}, 7]
)
def test_odd_named_templates_are_none(named):
    files = {"tokenizer_config.json": json.dumps({"chat_template": named}).encode()}
    assert template_of_files(files, "adapter a") is None


def test_templates_that_write_the_same_have_one_key():
    one = ChatTemplate("T", {"bos_token": "<s>", "eos_token": "<e>"}, "adapter a")
    assert one.key == ChatTemplate("T", {"eos_token": "<e>", "bos_token": "<s>"}).key
    assert one.key != ChatTemplate("T", {"bos_token": "<s>"}).key
