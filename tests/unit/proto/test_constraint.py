"""Constraints as llguidance reads them."""

from __future__ import annotations

import json

import pytest
from llguidance import LLMatcher, LLTokenizer
from tests.helpers.constraints import choice, lark, regex, schema

from lorax_contract.constraint import PARSER_LIMITS, Constraint, ConstraintKind


def accepts(constraint: Constraint, text: str) -> bool:
    """Whether a text is an output that the constraint allows."""
    tokenizer = LLTokenizer("byte")
    matcher = LLMatcher(tokenizer, constraint.grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    return matcher.consume_tokens(tokenizer.tokenize_str(text)) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("constraint", "fits", "fits_not"),
    [
        (schema({"type": "integer"}), "12", "x"),
        (regex("[a-c]+"), "abca", "abd"),
        (regex("a/b"), "a/b", "ab"),
        (regex(r"a\/b"), "a/b", r"a\b"),
        (regex(r"\d\\\."), "7\\.", "7."),
        (regex("a\nb\tc"), "a\nb\tc", "abc"),
        (lark('start: "a" b\nb: "x" | "y"'), "ay", "ab"),
        (choice("yes", "no"), "no", "maybe"),
        (choice('a "quoted" one', "an ümlaut 🙂", "two\nlines", "back\\slash"), "an ümlaut 🙂", "an"),
        (choice('a "quoted" one', "x"), 'a "quoted" one', "a quoted one"),
        (choice("two\nlines", "back\\slash"), "back\\slash", "backslash"),
        (
            Constraint(kind=ConstraintKind.LLGUIDANCE, text=regex("z+").grammar),
            "zz",
            "a",
        ),
    ],
)  # fmt: skip
def test_the_grammar_of_a_constraint_takes_what_fits_and_nothing_else(constraint, fits, fits_not):
    assert accepts(constraint, fits)
    assert not accepts(constraint, fits_not)


@pytest.mark.parametrize("pattern", ["a/b", r"\/", "[/]+", r"\\/", r"\d+", "a|b/", "ü\n"])
def test_a_pattern_is_written_as_the_library_writes_it(pattern):
    own = json.loads(regex(pattern).grammar)["grammars"][0]["lark_grammar"]
    theirs = json.loads(LLMatcher.grammar_from_regex(pattern))["grammars"][0]["lark_grammar"]
    assert own == theirs


@pytest.mark.parametrize(
    "constraint",
    [
        regex(""),
        choice(),
        choice("a", ""),
        Constraint(kind=ConstraintKind.CHOICE, text='{"a": 1}'),
        Constraint(kind=ConstraintKind.CHOICE, text="[1, 2]"),
        Constraint(kind=ConstraintKind.JSON_SCHEMA, text="{"),
    ],
)
def test_a_text_that_is_not_of_its_kind_has_no_grammar(constraint):
    with pytest.raises(ValueError):
        _ = constraint.grammar


def test_keys_tell_kinds_and_texts_apart():
    texts = [regex("a"), regex("b"), lark("a"), choice("a")]
    assert len({each.key for each in texts}) == len(texts)
    assert regex("a").key == regex("a").key


def test_a_repr_shows_no_schema():
    assert "secret" not in repr(schema({"const": "secret"}))


def test_the_library_takes_the_limits():
    from llguidance import LLParserLimits

    limits = LLParserLimits(**PARSER_LIMITS)
    assert {name: getattr(limits, name) for name in PARSER_LIMITS} == PARSER_LIMITS
