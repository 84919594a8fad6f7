"""Matchers over real kinds of tokenizers: which tokens a grammar allows."""

from __future__ import annotations

import numpy as np
import pytest
from llguidance import LLMatcher
from tests.helpers import tiny_tokenizers
from tests.helpers.constraints import choice, lark, regex, schema
from tests.helpers.grammar_world import GrammarWorld, allowed
from tokenizers import Tokenizer

from lorax_contract.constraint import Constraint, ConstraintKind
from lorax_contract.errors import ValidationError
from lorax_shard.constraints.matchers import Matchers, TokenTables
from lorax_shard.constraints.row import RowConstraint
from lorax_shard.constraints.tokens import OwnTokens
from lorax_shard.engine.detokenizer import Detokenizer
from lorax_shard.vocabulary import vocabulary_of

KINDS = [
    tiny_tokenizers.byte_level,
    tiny_tokenizers.byte_fallback,
    tiny_tokenizers.unigram,
    tiny_tokenizers.end_of_word,
]


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("first", [True, False])
def test_the_text_of_an_output_is_what_the_grammar_says(make, first):
    world = GrammarWorld(make())
    texts = ["the dog", "there again", "again"]
    output = world.walk(choice(*texts), min if first else max)
    assert output[-1] == world.eos
    assert b"".join(map(world.bytes_of, output[:-1])).decode() in texts


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_a_token_is_allowed_if_its_text_is_and_no_other(make):
    world = GrammarWorld(make(), padding=3)
    row = RowConstraint(world.matchers.of(regex("[a-f ]{1,40}x"), None))
    row.start()
    expected = [
        token_id
        for token_id in range(world.size)
        if not world.reader.is_special(token_id)
        and (raw := world.bytes_of(token_id))
        and set(raw.rstrip(b"x") if raw.endswith(b"x") else raw) <= set(b"abcdef ")
        and raw != b"x"
        and raw.count(b"x") <= 1
    ]
    assert allowed(row.mask()) == expected


def test_masks_are_those_of_the_library():
    world = GrammarWorld(tiny_tokenizers.byte_level())
    constraint = schema({"type": "object", "properties": {"the": {"type": "integer"}}})
    _, tokens = world.tables.get(None)
    theirs = LLMatcher(tokens, constraint.grammar)
    row = RowConstraint(world.matchers.of(constraint, None))
    row.start()
    for _ in range(30):
        words = np.empty(row.num_words, dtype=np.int32)
        theirs.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        assert (row.mask() == words).all()
        token_id = allowed(row.mask())[-1]
        if token_id == world.eos:
            break
        theirs.consume_token(token_id)
        row.accept(token_id)
        row.fill()


def test_a_row_built_anew_from_its_output_goes_on_as_before():
    world = GrammarWorld(tiny_tokenizers.byte_level())
    constraint = choice("the quick brown fox", "the quick dog")
    output = world.walk(constraint, max)
    for count in range(len(output)):
        row = RowConstraint(world.matchers.of(constraint, None), output[:count])
        row.start()
        assert output[count] in allowed(row.mask())


def test_an_adapter_s_own_tokens_are_allowed_by_their_text():
    base = tiny_tokenizers.byte_level()
    world = GrammarWorld(base)
    tokenizer = Tokenizer.from_str(base.to_str())
    tokenizer.add_tokens(["lazylazy", "🙂dog"])
    vocabulary = vocabulary_of(tokenizer)
    own = OwnTokens(vocabulary, len(vocabulary) + 5, frozenset({world.eos}))
    row = RowConstraint(world.matchers.of(choice("lazylazylazy", "🙂dogs"), own))
    row.start()
    by_text = {tokenizer.id_to_token(token_id): token_id for token_id in range(len(vocabulary))}
    assert {by_text["lazylazy"], by_text["🙂dog"]} <= set(allowed(row.mask()))
    assert max(allowed(row.mask())) < len(vocabulary)
    # Those of the base are not touched by it.
    base_row = RowConstraint(world.matchers.of(choice("lazylazylazy"), None))
    base_row.start()
    assert max(allowed(base_row.mask())) < world.size


def test_an_adapter_that_shares_few_tokens_gets_whole_texts_too():
    world = GrammarWorld(tiny_tokenizers.byte_level())
    other = Tokenizer.from_str(world.tokenizer.to_str())
    vocabulary = vocabulary_of(other)
    shifted = [vocabulary.token(0), "<one more>"]
    shifted += [vocabulary.token(token_id) for token_id in range(1, len(vocabulary))]
    starts = np.cumsum([0, *(len(each.encode()) for each in shifted)], dtype=np.int32)
    text = np.frombuffer("".join(shifted).encode(), dtype=np.uint8)
    kinds = np.insert(vocabulary.kinds, 1, vocabulary.kinds[-1])
    moved = type(vocabulary)(starts, text, kinds, vocabulary.end_ids)
    own = OwnTokens(moved, len(moved), frozenset({world.eos}))
    reader = world.reader.with_tokens(moved)
    output = world.walk(choice("the quick brown fox"), min, own)
    pieces = [reader.piece(token_id) for token_id in output[:-1]]
    raw = b"".join(each if isinstance(each, bytes) else each.encode() for each in pieces)
    assert raw.decode() == "the quick brown fox"


@pytest.mark.parametrize(
    ("constraint", "words"),
    [
        (schema({"type": "object", "uniqueItems": True}), "uniqueItems"),
        (schema({"type": "nonsense"}), "cannot be used"),
        (regex("("), "cannot be used"),
        (lark("start: nothing"), "cannot be used"),
        (lark("start: <|no such token|>"), "token"),
        (Constraint(kind=ConstraintKind.JSON_SCHEMA, text="{"), "cannot be read"),
        (Constraint(kind=ConstraintKind.LLGUIDANCE, text="{}"), "cannot be used"),
    ],
)
def test_what_cannot_be_compiled_is_refused_in_words(constraint, words):
    world = GrammarWorld(tiny_tokenizers.byte_level())
    with pytest.raises(ValidationError, match=words):
        world.matchers.copied(constraint, None)


def test_a_model_without_an_end_binds_nothing():
    tokenizer = tiny_tokenizers.byte_level()
    reader = Detokenizer(tokenizer)
    tables = TokenTables(tokenizer, reader, 500, [], reader.with_tokens)
    with pytest.raises(ValidationError, match="ends a text"):
        Matchers(tables).copied(regex("a"), None)


def test_a_grammar_is_compiled_once_for_the_same_tokens(monkeypatch):
    world = GrammarWorld(tiny_tokenizers.byte_level())
    compiled = []
    from lorax_shard.constraints import matchers

    real = matchers._compiled
    monkeypatch.setattr(
        matchers, "_compiled", lambda *each: compiled.append(each[1]) or real(*each)
    )
    for _ in range(3):
        world.matchers.copied(regex("a+"), None)
    assert compiled == [regex("a+")]


def test_an_error_of_another_row_with_the_same_grammar_is_no_error_of_this_one():
    """Copies share a lexer; should one pass its limits, the others go on without it."""
    world = GrammarWorld(tiny_tokenizers.byte_level())
    constraint = regex("[a-z ]+")
    row = RowConstraint(world.matchers.of(constraint, None))
    row.start()
    token_id = allowed(row.mask())[0]
    row.accept(token_id)
    # What a shared lexer that gave up looks like.
    row.matcher.consume_token(world.tokenizer.token_to_id("!"))
    assert row.matcher.is_error()
    row.fill()
    assert token_id in allowed(row.mask())


def test_a_matcher_in_error_ends_its_row_in_words():
    world = GrammarWorld(tiny_tokenizers.byte_level())
    row = RowConstraint(world.matchers.of(regex("[a-z ]+"), None))
    row.start()
    wrong = world.tokenizer.token_to_id("!")
    row.accept(wrong)
    row.fill()
    with pytest.raises(Exception, match="cannot be kept to its grammar"):
        row.mask()
