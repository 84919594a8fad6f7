"""Templates that a grammar of the language makes, right or wrong in what they mean."""

from __future__ import annotations

import random

_NAMES = ("messages", "m", "loop", "namespace", "tools", "bos_token", "range", "dict", "x", "self", "caller", "cycler", "joiner",
          "lipsum", "raise_exception", "strftime_now", "undefined_name", "add_generation_prompt", "varargs")  # fmt: skip
_ATTRIBUTES = ("role", "content", "items", "format", "__class__", "mro", "index0", "cycle", "get", "join", "x", "upper", "split", "0",
               "pop", "append", "__init__", "gi_frame", "replace", "startswith", "previtem", "strip", "changed")  # fmt: skip
_FILTERS = ("tojson", "length", "trim", "upper", "join", "list", "map", "select", "sort", "groupby", "batch", "slice", "int", "float",
            "string", "first", "last", "sum", "unique", "reverse", "attr", "xmlattr", "wordwrap", "indent", "center", "format", "e",
            "urlize", "random", "dictsort", "filesizeformat", "truncate", "items", "nofilter", "pprint", "striptags", "replace")  # fmt: skip
_CALLS = (
    "()",
    "(1)",
    "('x')",
    "(messages)",
    "(10**9)",
    "(x=1)",
    "(*messages)",
    "(**m)",
    "(0)",
    "('%s')",
    "(-1)",
    "(none)",
)


def expression(draw: random.Random, depth: int = 0) -> str:
    """Return an expression of the language, right or wrong in what it means."""
    if depth > 3 or draw.random() < 0.3:
        return draw.choice(
            [
                *_NAMES,
                "'a'",
                "1",
                "0",
                "-1",
                "none",
                "true",
                "[]",
                "{}",
                "'é'",
                "1.5",
                "9**9",
                "''",
                "messages[0]",
            ]
        )
    inner = expression(draw, depth + 1)
    match draw.randrange(9):
        case 0:
            return f"{inner}.{draw.choice(_ATTRIBUTES)}"
        case 1:
            return f"{inner}[{expression(draw, depth + 1)}]"
        case 2:
            return f"({inner} | {draw.choice(_FILTERS)}{draw.choice(['', '', *_CALLS])})"
        case 3:
            return f"{inner}{draw.choice(_CALLS)}"
        case 4:
            sign = draw.choice(
                [
                    "+",
                    "-",
                    "*",
                    "/",
                    "//",
                    "%",
                    "~",
                    "==",
                    "<",
                    "in",
                    "and",
                    "or",
                    "is",
                    "**",
                    "not in",
                ]
            )
            return f"({inner} {sign} {expression(draw, depth + 1)})"
        case 5:
            test = draw.choice(
                [
                    "defined",
                    "string",
                    "mapping",
                    "none",
                    "iterable",
                    "sameas(1)",
                    "divisibleby(0)",
                    "notest",
                ]
            )
            return f"({inner} is {test})"
        case 6:
            return f"[{inner}, {expression(draw, depth + 1)}]"
        case 7:
            return f"({inner} if {expression(draw, depth + 1)} else {expression(draw, depth + 1)})"
    return f"{{'a': {inner}}}"


def statement(draw: random.Random, depth: int = 0) -> str:
    """Return a piece of a template."""
    inner = (
        "" if depth > 3 else "".join(statement(draw, depth + 1) for _ in range(draw.randint(0, 2)))
    )
    value = expression(draw)
    match draw.randrange(11):
        case 0 | 1:
            return f"{{{{ {value} }}}}{inner}"
        case 2:
            return f"{{% for m in {value} %}}{inner}{draw.choice(['', '{% break %}', '{% else %}x'])}{{% endfor %}}"
        case 3:
            return f"{{% if {value} %}}{inner}{draw.choice(['', '{% else %}y'])}{{% endif %}}"
        case 4:
            return f"{{% set x = {value} %}}{inner}"
        case 5:
            return f"{{% macro f(a, b={value}) %}}{inner}{{% endmacro %}}{{{{ f(1) }}}}"
        case 6:
            return f"{{% filter {draw.choice(_FILTERS)} %}}{inner}{{% endfilter %}}"
        case 7:
            return f"{{% generation %}}{inner}{{% endgeneration %}}"
        case 8:
            return f"{{% set ns = namespace(a={value}) %}}{{% set ns.a = {expression(draw)} %}}{{{{ ns.a }}}}"
        case 9:
            return draw.choice(["{% include 'x' %}", "{% import 'x' as y %}", "{% extends x %}", "{% block a %}{% endblock %}",
                                "{% raw %}{{ x }}{% endraw %}", "{# x #}", "{% call f() %}{% endcall %}", "{% autoescape true %}x{% endautoescape %}",
                                "{% with a = 1 %}{{ a }}{% endwith %}", "{% continue %}", "{% for a, b in x %}{% endfor %}",
                                "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}", "{% do x %}"])  # fmt: skip
    return draw.choice(["x", "\n", "<|im_start|>", "é", "{{", "%}", inner])
