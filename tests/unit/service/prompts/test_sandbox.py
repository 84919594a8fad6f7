"""What chat templates may use, how they fail, and that they write what transformers writes."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime
from typing import Any

import pytest

from lorax_router.service.prompts.sandbox import (
    InvalidTemplateError,
    RenderError,
    TextTooLongError,
    compile_template,
    render,
)

HELLO = [{"role": "user", "content": "hello"}]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{{ message['content'] | trim }}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HEADERS = (
    "{{- bos_token }}\n{%- if tools is not none and tools is defined %}{{ tools | tojson }}"
    "{%- endif %}\n{%- for m in messages if m.role != 'system' %}\n"
    "    {%- if loop.first %}<first>{% endif %}\n"
    "    {{- '<|header|>' ~ m['role'] ~ '<|end|>\n\n' ~ m['content'] }}{{ eos_token }}\n"
    "{%- endfor %}\n{%- if add_generation_prompt %}<|header|>assistant{% endif %}\n"
)
ALTERNATING = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %}"
    "{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
SCOPES = (
    "{% set ns = namespace(found=false) %}{% for m in messages %}{% set ns.found = true %}"
    "{% endfor %}{{ ns.found }}{{ dict(a=1) }}{{ dict.fromkeys(['k'], 2) }}"
)
TALK = [
    {"role": "user", "content": " Who's <there>? "},
    {"role": "assistant", "content": "Näemmä 🙂\n\n"},
    {"role": "user", "content": "{{ 1 + 1 }}"},
]


def rendered(text: str, max_chars: int = 1000, **values: Any) -> str:
    template = compile_template(text, now=lambda: datetime(2024, 5, 6, tzinfo=UTC))
    values = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True, **values}
    return render(template, {"messages": HELLO, **values}, max_chars)


def test_messages_and_special_tokens() -> None:
    template = (
        "{{ bos_token }}{% for message in messages %}\n"
        "[{{ message['role'] }}] {{ message['content'] | trim }}{{ eos_token }}\n"
        "{% endfor %}\n"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    assert rendered(template) == "<s>[user] hello</s>\n[assistant]"


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
    ],
)
def test_what_templates_may_use(template: str, expected: str) -> None:
    assert rendered(template) == expected


@pytest.mark.parametrize(
    "template",
    [
        CHATML,
        HEADERS,
        ALTERNATING,
        # What transformers gives without being asked.
        "{% if tools is defined %}{{ tools }}{% endif %}{{ documents is none }}{{ undefined }}",
        "{{ messages[1:] | tojson(indent=1) }}{{ messages | length }}{{ 'a<b' | tojson }}",
        "{% generation %}{% set x = 1 %}{{ x }}{% endgeneration %}[{{ x }}]",
        SCOPES,
        "{% macro say(m, n=2) -%}\n  {{ m.content }}{{ n }}\n{%- endmacro %}{{ say(messages[0]) }}",
        "  {% if true %}\n  indented\n  {% endif %}\n",
    ],
)
def test_a_template_writes_what_transformers_makes_of_it(template: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    (expected,), _ = render_jinja_template(
        [TALK], chat_template=template, add_generation_prompt=True, **tokens
    )
    assert rendered(template, messages=TALK) == expected


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ namespace(__init__=1) }}", "underscore"),
        ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "underscore"),
        ("{{ messages[0].content + 1 }}", "str"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ raise_exception('') }}", "TemplateError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ raise_exception('long ' * 1000) }}", "^(long ){59}long$"),
    ],
)
def test_a_template_that_fails_says_why_in_a_line(template: str, reason: str) -> None:
    with pytest.raises(RenderError, match=reason) as caught:
        rendered(template)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 300


def test_a_template_that_writes_no_text_says_so() -> None:
    template = compile_template("{% filter sort %}{% endfilter %}")
    with pytest.raises(RenderError, match="it wrote a list where a text has to be"):
        render(template, {}, 100)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for %}", "Expected"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "nests too deeply"),
        ("{% if 1 %}" * 400 + "{% endif %}" * 400, "indent|nest"),
        ("{% for i in [1] %}" * 30 + "{% endfor %}" * 30, "nested"),
    ],
)
def test_a_template_that_does_not_compile_says_why(template: str, reason: str) -> None:
    with pytest.raises(InvalidTemplateError, match=reason):
        compile_template(template)


def test_a_template_that_writes_too_much_is_stopped() -> None:
    assert rendered("{{ 'a' * 1000 }}") == "a" * 1000
    with pytest.raises(TextTooLongError, match="more than 1000 characters"):
        rendered("{% for i in range(100000) %}{{ 'a' * 1000 }}{% endfor %}")


def test_the_process_that_renders_holds_little() -> None:
    code = (
        "import sys, lorax_router.service.prompts.render_process\n"
        "loaded = {name.partition('.')[0] for name in sys.modules}\n"
        "print(*sorted(loaded & {'fastapi', 'grpc', 'numpy', 'tokenizers', 'transformers', 'uvloop'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("", "")
