"""Compiles and renders chat templates as transformers does, in a sandbox.

A template can neither change what it is given nor reach into Python objects; the names
it may use are those that transformers offers. That keeps it from doing harm, not from
taking time and memory: compiling is bounded as little as rendering (``9**(9**9)`` is
computed when it compiles). So templates that come with adapters are compiled and
rendered in limited processes only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

_MAX_REASON_CHARS = 300


class InvalidTemplateError(Exception):
    """A template that does not compile; the text says why."""


class RenderError(Exception):
    """A template that failed while it rendered; the text says why."""


class TextTooLongError(RenderError):
    """A template wrote more than it may."""


def compile_template(text: str, now: Callable[[], datetime] = datetime.now) -> Template:
    """Return a template that is ready to render; raises InvalidTemplateError, MemoryError."""
    environment = _environment()
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: now().strftime(form)
    environment.globals["dict"] = _PlainDict()
    environment.globals["namespace"] = _PlainNamespace
    try:
        return environment.from_string(text)
    except RecursionError as error:
        raise InvalidTemplateError("it nests too deeply") from error
    except MemoryError:
        raise
    except Exception as error:
        raise InvalidTemplateError(_reason(error)) from error


def parse_template(text: str) -> nodes.Template:
    """Return the syntax of a template that compiles."""
    return _environment().parse(text)


def render(template: Template, values: Mapping[str, Any], max_chars: int) -> str:
    """Return what a template writes; raises RenderError, MemoryError."""
    pieces, num_chars = [], 0
    # transformers gives both, and a template may ask whether they are defined.
    values = {"tools": None, "documents": None, **values}
    try:
        for piece in template.generate(values):
            if not isinstance(piece, str):
                # As of a block that a filter makes a list of.
                raise RenderError(f"it wrote a {type(piece).__name__} where a text has to be")
            num_chars += len(piece)
            if num_chars > max_chars:
                raise TextTooLongError(f"it wrote more than {max_chars} characters")
            pieces.append(piece)
    except (RenderError, MemoryError):
        raise
    except Exception as error:
        raise RenderError(_reason(error)) from error
    return "".join(pieces)


def _environment() -> ImmutableSandboxedEnvironment:
    return ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )


def _reason(error: Exception) -> str:
    """Return an error's words in one line; foreign code may have written very many."""
    words = " ".join(str(error)[:_MAX_REASON_CHARS].split())
    return words or type(error).__name__


class _Generation(Extension):
    """Renders what is between ``generation`` tags, which only mark text for training."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A scope of its own, as in transformers: what is set inside is not seen outside.
        return nodes.CallBlock(self.call_method("_text_of"), [], [], body).set_lineno(line)

    @staticmethod
    def _text_of(caller: Callable[[], str]) -> str:
        return caller()


class _PlainDict:
    """What a template may do with ``dict``."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """As dict has it."""
        return dict.fromkeys(*args)


class _PlainNamespace(Namespace):
    """A namespace whose names begin with no underscore."""

    def __init__(self, /, *args: Any, **values: Any) -> None:
        given = dict(*args, **values)
        for name in given:
            _require_plain(name)
        super().__init__(given)

    def __setitem__(self, name: str, value: Any) -> None:
        _require_plain(name)
        super().__setitem__(name, value)


def _require_plain(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace has no name that begins with an underscore: {name[:50]}")


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON; jinja2's own filter escapes for HTML, which a prompt is not."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
