"""Ways out of a template's sandbox that are known in the field: each is refused, or gets nothing."""

from __future__ import annotations

import contextlib
import re

import pytest
from jinja2 import Environment
from tests.unit.service.prompts.test_sandbox import HELLO, rendered

from lorax_router.service.prompts.sandbox import InvalidTemplateError, RenderError

# What a template would write that came to Python's own objects, or to a file.
_INSIDE = re.compile(r"<class|<module|<function|<built-in|object at 0x|root:|__\w+__")
ATTRIBUTES = [
    "{{ ().__class__.__base__.__subclasses__() }}",
    "{{ ''['__class__']['__mro__'] }}",
    "{{ '' | attr('__class__') }}",
    "{{ [].__reduce_ex__(2) }}",
    "{{ messages | map(attribute='__class__') | list }}",
    "{{ messages | groupby('__class__') }}",
    "{{ messages | sum('__class__') }}",
    "{{ [messages] | sort(attribute='__class__') }}",
    "{{ messages | selectattr('__class__') | list }}",
    "{% for x in [1] %}{{ loop.__class__.__init__.__globals__ }}{{ loop._iterator }}{% endfor %}",
    "{% set ns = namespace() %}{{ ns.__init__.__globals__ }}",
    "{% set ns = namespace() %}{% set ns.__class__ = dict %}{{ ns }}",
]
FUNCTIONS = [
    "{{ lipsum.__globals__['os'] }}",
    "{{ cycler.__init__.__globals__.os }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__closure__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ namespace.mro() }}",
    "{{ dict.fromkeys.__func__.__globals__ }}",
    "{{ dict.fromkeys | attr('__func__') }}",
    "{% macro m() %}{{ caller.__globals__ }}{% endmacro %}{% call m() %}{% endcall %}",
    "{{ open('/etc/passwd').read() }}",
    "{{ __import__('os') }}",
    "{{ eval('1') }}",
]
# Formatting takes attributes by names in a text.
FORMATS = [
    "{{ '{0.__class__.__mro__}'.format(1) }}",
    "{% set f = '{0.__class__.__mro__}'.format %}{{ f(1) }}",
    "{{ ('{0.__class__}' | attr('format'))(1) }}",
    "{{ (['{0.__class__}'] | map(attribute='format') | first)(1) }}",
    "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "{{ '%s' | format(messages.__class__) }}",
    "{{ messages | tojson(indent='x'.__class__) }}",
]
FILES = [
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
    "{% from '/etc/passwd' import root %}{{ root }}",
    "{% extends '/etc/passwd' %}",
]


@pytest.mark.parametrize("template", [*ATTRIBUTES, *FUNCTIONS, *FORMATS, *FILES])
def test_no_way_leads_out_of_the_sandbox(template: str) -> None:
    written = ""
    with contextlib.suppress(RenderError, InvalidTemplateError):
        written = rendered(template)
    assert not _INSIDE.search(written), written


@pytest.mark.parametrize("template", [ATTRIBUTES[0], FUNCTIONS[0], FORMATS[0]])
def test_without_the_sandbox_they_lead_out(template: str) -> None:
    written = Environment().from_string(template).render(messages=HELLO)
    assert _INSIDE.search(written)


@pytest.mark.parametrize(
    "template",
    ["{{ messages.pop() }}", "{{ messages[0].update(role='system') }}", "{{ messages.clear() }}"],
)
def test_what_it_is_given_it_cannot_change(template: str) -> None:
    with pytest.raises(RenderError, match="unsafe"):
        rendered(template)
    assert HELLO == [{"role": "user", "content": "hello"}]
