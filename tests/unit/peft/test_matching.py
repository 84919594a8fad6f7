"""Patterns of an adapter are matched within a second of computing, or the adapter is refused."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
from tests.helpers.small_adapters import QUERY, config, make_base

from lorax_shard.peft.config import LoraOptions, parse_config
from lorax_shard.peft.errors import AdapterRefusedError
from lorax_shard.peft.matching import select_in_time
from lorax_shard.peft.targets import select

# Doubles with each letter of a name that does not end in "!".
ENDLESS = r"(([a-z_0-9.])*)*!"


def options(**values: Any) -> LoraOptions:
    return parse_config(json.dumps(config(**values)))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("target_modules", ENDLESS),
        # Passes one module quickly and never ends on another.
        ("target_modules", rf"{QUERY}|(?=model\.layers\.1\.attn\.q_proj){ENDLESS}"),
        ("exclude_modules", ENDLESS),
        ("modules_to_save", [ENDLESS]),
        ("rank_pattern", {ENDLESS: 3}),
        ("alpha_pattern", {ENDLESS: 3}),
    ],
)
def test_a_pattern_that_does_not_end_is_refused_by_its_options_name(
    option: str, value: Any
) -> None:
    started = os.times().children_user
    with pytest.raises(AdapterRefusedError) as caught:
        select_in_time(options(**{option: value}), make_base(), limit_s=0.2)
    assert caught.value.public.startswith(f"{option} of adapter_config.json has a pattern that ")
    assert "takes more than 0.2 s" in caught.value.public
    # What was computed for it; what else this machine does is not counted.
    assert os.times().children_user - started < 2.0


def test_a_pattern_of_layers_that_does_not_end_is_refused() -> None:
    told = options(target_modules=["q_proj"], layers_to_transform=[0], layers_pattern=[ENDLESS])
    with pytest.raises(AdapterRefusedError, match=r"^layers_pattern of .* takes more than 0.2 s"):
        select_in_time(told, make_base(), limit_s=0.2)


def test_very_many_patterns_are_bounded_too() -> None:
    patterns = {f"{'a' * 1980}[0-9]{number}": 3 for number in range(5000)}
    told = options(target_modules="all-linear", rank_pattern=patterns)
    with pytest.raises(AdapterRefusedError, match=r"^rank_pattern of .* takes more than 0.05 s"):
        select_in_time(told, make_base(), limit_s=0.05)


@pytest.mark.parametrize(
    "values",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": r".*\.(q|o)_proj", "exclude_modules": r".*\.0\..*"},
        {"target_modules": r".*\.(q|o)_proj", "rank_pattern": {r"1\..*": 9}, "use_rslora": True},
        {"target_modules": r".*q_proj", "modules_to_save": ["lm_head", "nothing"]},
        {"target_modules": r".*q_proj", "trainable_token_indices": [3, 1]},
        {"target_modules": r".*(q_proj|tokens|head)", "ensure_weight_tying": True},
    ],
)
def test_what_is_matched_apart_is_what_is_matched_here(values: dict[str, Any]) -> None:
    told, base = options(**values), make_base(tied=True)
    assert select_in_time(told, base) == select(told, base)


def test_a_refusal_comes_across_in_its_words() -> None:
    told = options(target_modules=r".*\.w[12]")
    with pytest.raises(AdapterRefusedError, match=r"names nothing in this server's base model"):
        select_in_time(told, make_base())


@pytest.mark.parametrize("pattern", ["(" * 5000 + ")" * 5000, "a{99999999999}", "("])
def test_what_cannot_be_compiled_is_no_pattern(pattern: str) -> None:
    told = options(target_modules=pattern[:2000])
    with pytest.raises(AdapterRefusedError, match=r"target_modules .* is no regular expression"):
        select_in_time(told, make_base())
