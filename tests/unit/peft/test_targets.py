"""Which modules are selected, beside what the oracle shows."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.helpers.small_adapters import EMBEDDING, HEAD, NORM, QUERY, config, make_base

from lorax_shard.peft.config import parse_config
from lorax_shard.peft.errors import AdapterRefusedError
from lorax_shard.peft.targets import LowRank, Selection, select


def selected(*, tied: bool = False, **options: Any) -> Selection:
    return select(parse_config(json.dumps(config(**options))), make_base(tied=tied))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"target_modules": ["w1"]}, "names nothing in this server's base model (ToyForCausalLM)"),
        ({"target_modules": ["norm"]}, f"target_modules names {NORM}, a LayerNorm"),
        ({"target_modules": ".*("}, "is no regular expression: '.*('"),
        ({"rank_pattern": {"[": 4}}, "is no regular expression"),
        ({"modules_to_save": ["model"]}, "modules_to_save names model, a ToyModel; only linears,"),
        ({"modules_to_save": ["["]}, "is no regular expression"),
        ({"trainable_token_indices": {"wte": [1]}}, "trainable_token_indices names 'wte', which"),
        (
            {"target_modules": ["embed_tokens"], "trainable_token_indices": [1]},
            f"{EMBEDDING} has LoRA and is in trainable_token_indices too",
        ),
        (
            {"modules_to_save": ["embed_tokens"], "trainable_token_indices": [1]},
            f"{EMBEDDING} is in modules_to_save and trainable_token_indices",
        ),
        # The end of a name suffices for modules_to_save, and does not keep LoRA off.
        (
            {"target_modules": [HEAD], "modules_to_save": ["head"]},
            "lm_head has LoRA and is in modules_to_save too",
        ),
    ],
)
def test_refusals(options: dict[str, Any], text: str) -> None:
    with pytest.raises(AdapterRefusedError) as caught:
        selected(**options)
    assert text in caught.value.public


@pytest.mark.parametrize(
    ("targets", "names"),
    [("q_proj", '["q_proj"]'), ("q_proj,o_proj", '["q_proj", "o_proj"]'), ("attn", '["attn"]')],
)
def test_a_string_where_a_list_is_meant_is_refused_by_its_list(targets: str, names: str) -> None:
    with pytest.raises(AdapterRefusedError) as caught:
        selected(target_modules=targets)
    assert caught.value.public == (
        f"target_modules is the string '{targets}', which is a pattern for whole names of "
        f"modules and matches none; write a list to name their ends: {names}"
    )


@pytest.mark.parametrize(
    ("options", "warnings"),
    [
        ({}, []),
        ({"lora_alpha": 0}, ["lora_alpha is 0 for every module: nothing is added there"]),
        (
            {"target_modules": ["q_proj"], "alpha_pattern": {"0.attn.q_proj": 0}},
            [f"lora_alpha is 0 for {QUERY}: nothing is added there"],
        ),
        (
            {"modules_to_save": ["lm_head", "score", "classifier"]},
            ["modules_to_save has entries that fit nothing in this base model: score, classifier"],
        ),
        (
            {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score", "pre"]},
            ["modules_to_save has entries that fit nothing in this base model: pre"],
        ),
        (
            {"rank_pattern": {"q_proj": 2, "w1": 3}, "alpha_pattern": {"w2": 3}},
            [
                "rank_pattern has entries that fit nothing in this base model: w1",
                "alpha_pattern has entries that fit nothing in this base model: w2",
            ],
        ),
        ({"exclude_modules": ["w1"]}, ["exclude_modules excludes nothing of this base model"]),
        ({"target_modules": ["q_proj"], "exclude_modules": [QUERY]}, []),
    ],
)
def test_options_without_effect_are_warnings(options: dict[str, Any], warnings: list[str]) -> None:
    assert list(selected(**options).warnings) == warnings


def test_different_ids_for_tied_modules_cannot_be_tied() -> None:
    ids = {"embed_tokens": [1], HEAD: [2]}
    with pytest.raises(AdapterRefusedError, match="different ids for tied modules"):
        selected(tied=True, trainable_token_indices=ids, ensure_weight_tying=True)
    assert selected(tied=True, trainable_token_indices=ids).tokens == {
        EMBEDDING: ((1,), ""),
        HEAD: ((2,), ""),
    }


def test_the_first_pattern_that_fits_decides() -> None:
    chosen = selected(
        target_modules=["q_proj"],
        rank_pattern={"q_pro": 9, "attn.q_proj": 3, "q_proj": 5},
        alpha_pattern={r"1\..*q_proj": 6},
        use_rslora=True,
    ).low_rank
    # "q_pro" fits no whole name; alpha follows its own patterns.
    assert chosen == {
        QUERY: LowRank(3, 4 / 3**0.5),
        QUERY.replace("0", "1"): LowRank(3, 6 / 3**0.5),
    }


def test_all_linear_means_all_but_the_head() -> None:
    chosen = selected(target_modules="ALL-linear", exclude_modules=[QUERY])
    assert set(chosen.low_rank) == {
        name for name in make_base().modules if "proj" in name and name != QUERY
    }


def test_tying_by_the_heads_name_adapts_the_embedding_too() -> None:
    chosen = selected(tied=True, target_modules=[HEAD], ensure_weight_tying=True).low_rank
    assert chosen == {EMBEDDING: LowRank(2, 2.0), HEAD: LowRank(2, 2.0, tied_to=EMBEDDING)}
