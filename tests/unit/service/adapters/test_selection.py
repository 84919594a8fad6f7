"""From adapter fields to selections: defaults, merges, refusals."""

from __future__ import annotations

from typing import Any

import pytest

from lorax_contract.adapters import AdapterRef, Combination, MajoritySign, MergeSpec
from lorax_contract.errors import ValidationError
from lorax_router.service.adapters.catalog import AdapterSelection
from lorax_router.service.adapters.selection import SelectionPolicy
from lorax_router.service.requests import GenerateParameters, MergedAdapters

OWN = AdapterSelection(refs=(AdapterRef.of("local", "own"),))


def selection_of(policy: SelectionPolicy | None = None, **params: Any) -> AdapterSelection | None:
    return (policy or SelectionPolicy()).selection_of(GenerateParameters(**params))


def merge(*ids: str, **fields: Any) -> AdapterSelection:
    weights = fields.pop("weights", [1.0] * len(ids))
    found = selection_of(merged_adapters=MergedAdapters(ids=list(ids), weights=weights, **fields))
    assert found is not None
    return found


def test_who_names_nothing_gets_what_the_server_has_for_that():
    for name in (None, "", "__base_model__"):
        assert selection_of(adapter_id=name) is None
    policy = SelectionPolicy(static=OWN)
    assert selection_of(policy) is OWN
    assert selection_of(policy, adapter_id="") is OWN


def test_a_source_is_the_requests_or_the_servers():
    policy = SelectionPolicy(default_source="s3")
    assert selection_of(policy, adapter_id="x").refs == (AdapterRef.of("s3", "x"),)
    assert selection_of(policy, adapter_id="x", adapter_source="local").refs[0].source == "local"
    assert selection_of(adapter_id="x").refs[0].source == "hub"


def test_a_token_is_kept_and_never_shown():
    found = selection_of(adapter_id="x", api_token="s3cret")
    assert found.token == "s3cret"
    assert "s3cret" not in repr(found)


def test_a_merge_has_lorax_defaults():
    found = merge("a", "b", weights=[0.25, 2.0])
    assert found.merge == MergeSpec(weights=(0.25, 2.0))
    assert (found.merge.combination, found.merge.majority_sign) == (
        Combination.LINEAR,
        MajoritySign.TOTAL,
    )
    assert (found.ids, found.label) == ("a,b", "merged:a+b")


@pytest.mark.parametrize("word", ["linear", "ties", "dare_linear", "dare_ties", "cat"])
def test_every_strategy_is_known_by_its_name(word):
    found = merge("a", "b", merge_strategy=word, density=0.5, majority_sign_method="frequency")
    assert found.merge.combination.value == word
    assert found.merge.majority_sign is MajoritySign.FREQUENCY


def test_one_adapter_can_be_merged_too():
    assert merge("a", weights=[0.5]).merge == MergeSpec(weights=(0.5,))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"ids": []}, "takes 1 to 16 adapters, got 0"),
        ({"ids": ["a"] * 17, "weights": [1.0] * 17}, "takes 1 to 16 adapters, got 17"),
        ({"ids": ["a", "b"]}, "one weight for each of the 2 ids, got 0"),
        ({"ids": ["a", "b"], "weights": [1.0]}, "one weight for each of the 2 ids, got 1"),
        ({"ids": ["a"], "weights": [1.0, 2.0]}, "one weight for each of the 1 ids, got 2"),
        ({"ids": ["a"], "weights": [float("inf")]}, "finite weight"),
        ({"ids": ["a"], "weights": [1.0], "merge_strategy": "slerp"}, "'slerp' is not known"),
        (
            {"ids": ["a"], "weights": [1.0], "majority_sign_method": "most"},
            "'most' is not known; choose one of total, frequency",
        ),
        ({"ids": ["a"], "weights": [1.0], "merge_strategy": "ties"}, "needs a density"),
        (
            {"ids": ["a"], "weights": [1.0], "merge_strategy": "ties", "density": 0.0},
            "above 0 and at most 1",
        ),
        (
            {"ids": ["a"], "weights": [1.0], "merge_strategy": "dare_ties", "density": 1.5},
            "above 0 and at most 1",
        ),
        ({"ids": ["a\x85"], "weights": [1.0]}, "control characters"),
        ({"ids": [""], "weights": [1.0]}, "empty"),
    ],
)
def test_w1_merges_that_lorax_dies_of_are_refused_in_words(fields, words):
    with pytest.raises(ValidationError, match=words):
        selection_of(merged_adapters=MergedAdapters(**fields))


def test_a_name_and_a_merge_exclude_each_other():
    merged = MergedAdapters(ids=["a"], weights=[1.0])
    with pytest.raises(ValidationError, match="exclude each other"):
        selection_of(adapter_id="x", merged_adapters=merged)
    assert selection_of(adapter_id="__base_model__", merged_adapters=merged) is not None
    assert selection_of(SelectionPolicy(static=OWN), merged_adapters=merged) != OWN


@pytest.mark.parametrize("field", ["adapter_id", "adapter_source", "revision"])
@pytest.mark.parametrize("char", ["\n", "\r", "\x00", "\x1f", "\x7f", "\x85", "\x9f"])
def test_w2_control_characters_are_refused_before_anything_is_asked(field, char):
    sent = {"adapter_id": "x", field: f"a{char}b"}
    with pytest.raises(ValidationError, match=f"`{field}` must not contain control characters"):
        selection_of(**sent)


def test_a_server_without_adapters_says_why():
    policy = SelectionPolicy(refusal="one is merged into the weights")
    with pytest.raises(ValidationError, match="`adapter_id`: one is merged"):
        selection_of(policy, adapter_id="x")
    with pytest.raises(ValidationError, match="`merged_adapters`: one is merged"):
        selection_of(policy, merged_adapters=MergedAdapters(ids=["a"], weights=[1.0]))
    assert selection_of(policy) is None
