"""The process that compiles what outputs are to be bound to: ``python -m`` it with the tokenizer.

A grammar is a program: compiling it, and following it with an output, may take any time and any
memory. Here it gets both within bounds, and with the model's own tokens
takes the way that it will take in a shard.
"""

from __future__ import annotations

import json
import logging
import random
import re
import sys
from dataclasses import replace
from functools import partial
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import gbnf_to_lark

from lorax_contract.constraint import PARSER_LIMITS, Constraint, ConstraintKind
from lorax_router.service.constraints import schemas
from lorax_router.service.processes.serving import nurse

_MAX_WORDS = 300
# The first rule of Lark with its options, or a word of llguidance's; GBNF has ``::=``.
_LARK = re.compile(r"(?m)^\s*(%llguidance\b|start\s*(\[[^\]]*\])?\s*:(?!:=))")
# How many outputs are tried, drawn at random, and how many tokens of each.
_NUM_OUTPUTS, _NUM_TOKENS = 3, 16


class UnusableGrammarError(Exception):
    """No output can be bound to it; the text says why."""


def tokens_of(path: str) -> LLTokenizer:
    """Return the tokens in a tokenizer's file; those of single bytes where it cannot be read."""
    try:
        return LLTokenizer(path)
    except BaseException as error:  # noqa: BLE001 - the library's panics are no Exception
        logging.getLogger(__name__).info("grammars are checked with single bytes: %s", error)
        return LLTokenizer("byte")


def compiled(constraint: Constraint, tokens: LLTokenizer) -> str:
    """Return the grammar of a constraint, as shards compile it; raises UnusableGrammarError."""
    match constraint.kind:
        case ConstraintKind.JSON_SCHEMA:
            grammar = replace(constraint, text=_closed(constraint.text)).grammar
        case ConstraintKind.LARK:
            grammar = replace(constraint, text=_as_lark(constraint.text)).grammar
        case _:
            grammar = constraint.grammar
    _try(grammar, tokens)
    return grammar


def _as_lark(text: str) -> str:
    """Return a grammar that may be llama.cpp's (GBNF), where a rule may be called start, too."""
    return text if _LARK.search(text) else str(gbnf_to_lark(text))


def _closed(text: str) -> str:
    schema = json.loads(text)
    if not isinstance(schema, dict):
        raise UnusableGrammarError("it is no object")
    if not schemas.can_end(schema):
        raise UnusableGrammarError(
            "no value of it ends: by what it requires, each holds another one within"
        )
    return json.dumps(schemas.prepared(schema))


def _try(grammar: str, tokens: LLTokenizer) -> None:
    limits = LLParserLimits(**PARSER_LIMITS, verbose_errors=False)
    if fault := LLMatcher.validate_grammar(grammar, tokens, limits=limits):
        raise UnusableGrammarError(fault)
    matcher = LLMatcher(tokens, grammar, log_level=0, limits=limits)
    # What a grammar takes shows when outputs follow it, one token after another.
    for seed in range(_NUM_OUTPUTS):
        output = matcher.deep_copy()
        _follow(output, random.Random(seed))
        if output.is_error():
            raise UnusableGrammarError(f"no output could follow it: {output.get_error()}")


def _follow(matcher: LLMatcher, rng: random.Random) -> None:
    for _ in range(_NUM_TOKENS):
        mask = matcher.compute_bitmask()
        if matcher.is_stopped():
            return
        matcher.consume_token(_some_token(mask, rng))


def _some_token(mask: bytes, rng: random.Random) -> int:
    """Return one of the tokens that a mask allows; there is one."""
    place = rng.choice([place for place, octet in enumerate(mask) if octet])
    return 8 * place + rng.choice([bit for bit in range(8) if mask[place] >> bit & 1])


def answer(tokens: LLTokenizer, question: dict[str, Any], _blobs: list[bytes]) -> dict[str, Any]:
    """Return the ``grammar``, or why it cannot be used: ``refused`` or ``memory``."""
    constraint = Constraint(
        kind=ConstraintKind(question["kind"]), text=question["text"], frame=question["frame"]
    )
    try:
        return {"grammar": compiled(constraint, tokens)}
    except MemoryError:
        return {"memory": ""}
    except RecursionError:
        return {"refused": "it is nested too deeply"}
    except (UnusableGrammarError, ValueError) as error:
        return {"refused": _in_a_line(str(error))}
    except BaseException as error:  # noqa: BLE001 - the library's panics are no Exception
        return {"refused": f"it cannot be compiled ({_in_a_line(str(error))})"}


def _in_a_line(text: str) -> str:
    line = " ".join(text.replace("<non-verbose/>", "").split())
    return line if len(line) <= _MAX_WORDS else line[:_MAX_WORDS] + " ..."


if __name__ == "__main__":
    nurse(partial(answer, tokens_of(sys.argv[1])))
