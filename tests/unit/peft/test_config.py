"""Every option of PEFT's configuration is classified; refusals name the option."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import peft
import pytest
from peft.utils.peft_types import PeftType
from tests.helpers.small_adapters import config

from lorax_shard.peft.config import parse_config
from lorax_shard.peft.docs import renew
from lorax_shard.peft.errors import AdapterRefusedError
from lorax_shard.peft.fields import BY_NAME, OPTIONS, Treatment, refuse_option

ROOT = Path(__file__).parents[3]


def refusal(**options: Any) -> str:
    with pytest.raises(AdapterRefusedError) as caught:
        parse_config(json.dumps(config(**options)))
    return caught.value.public


def test_every_field_of_pefts_configuration_is_classified() -> None:
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert "r" in fields
    assert fields <= set(BY_NAME), "classify these in peft_fields.py"


def test_no_option_is_classified_twice() -> None:
    assert len(OPTIONS) == len(BY_NAME)


def test_the_documents_table_is_up_to_date() -> None:
    page = (ROOT / "docs/adapters.md").read_text()
    assert renew(page) == page, "run `make docs`"


def test_a_page_without_a_place_for_the_table_is_an_error() -> None:
    with pytest.raises(ValueError, match="no place for the table"):
        renew("# Adapters\n")


def test_pefts_defaults_are_accepted() -> None:
    written = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM").to_dict()
    written["target_modules"] = list(written["target_modules"])
    options = parse_config(json.dumps(written))
    assert (options.rank, options.alpha, options.target_modules) == (8, 8, ("q_proj",))


@pytest.mark.parametrize(
    "name", [option.name for option in OPTIONS if option.treatment is Treatment.REFUSED]
)
def test_refused_options_are_named_and_accepted_when_off(name: str) -> None:
    text = refusal(**{name: {"anything": 1}})
    assert text.startswith(f"{name} is not supported: ")
    for off in (None, False, [], {}):
        assert refuse_option(name, off) is None


@pytest.mark.parametrize("kind", sorted(each.value for each in PeftType if each.value != "LORA"))
def test_other_types_of_adapters_are_refused(kind: str) -> None:
    assert refusal(peft_type=kind) == (
        f"peft_type '{kind}' is not supported: this server computes LORA adapters only"
    )


def test_a_stub_of_a_configuration_is_refused_for_what_is_missing() -> None:
    for text in ("{}", '{"base_model_name_or_path": "org/model"}'):
        with pytest.raises(AdapterRefusedError) as caught:
            parse_config(text)
        assert caught.value.public.startswith("peft_type is missing in adapter_config.json, which")
        assert "PEFT writes peft_type, r and target_modules there" in caught.value.public


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga"])
def test_starts_that_changed_the_base_are_refused(init: str) -> None:
    text = refusal(init_lora_weights=init)
    assert text.startswith(f"init_lora_weights='{init}' is not supported: it took its start out")
    assert "compute that start again" in text
    assert "path_initial_model_for_weight_conversion" in text


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"init_lora_weights": "loftq"}, "LoftQ replaces the base weights"),
        ({"init_lora_weights": "next_idea"}, "does not know whether it changes the base"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "task_type 'SEQ_2_SEQ_LM' is not supported"),
        ({"bias": "some"}, "bias 'some' is unknown"),
        ({"r": 0}, "r of adapter_config.json is 0; it must be a positive whole number"),
        ({"r": True}, "it must be a positive whole number"),
        ({"r": 4.0}, "it must be a positive whole number"),
        ({"lora_alpha": "16"}, "lora_alpha of adapter_config.json is '16'; it must be a number"),
        ({"lora_alpha": float("nan")}, "it must be a finite number"),
        ({"lora_alpha": 10**400}, "it must be a finite number"),
        ({"use_dora": 1}, "it must be true or false"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern['q'] of adapter_config.json is 0"),
        ({"alpha_pattern": [1]}, "it must be an object"),
        ({"target_modules": None}, "target_modules is missing"),
        ({"target_modules": [1]}, "it must be names"),
        ({"target_modules": "q" * 3000}, "it must be a list"),
        ({"exclude_modules": 5}, "it must be a list"),
        ({"layers_to_transform": ["0"]}, "it must be a layer's number"),
        ({"target_modules": ".*", "layers_to_transform": [1]}, "need target_modules to be a list"),
        ({"layers_pattern": "layers"}, "layers_pattern needs layers_to_transform"),
        ({"trainable_token_indices": [1, 1]}, "it must be a list without repetitions"),
        ({"trainable_token_indices": [-1]}, "it must be a list of token ids"),
        ({"trainable_token_indices": 3}, "it must be a list, or an object of lists"),
        ({"modules_to_save": "lm_head"}, "it must be a list"),
        ({"alora_invocation_tokens": 5}, "it must be a list of at most 1,000 token ids"),
        ({"alora_invocation_tokens": [5, "6"]}, "it must be a list of token ids"),
        ({"alora_invocation_tokens": [-1]}, "it must be a list of token ids"),
        ({"alora_invocation_tokens": [5], "use_dora": True}, "use_dora exclude each other"),
        ({"alora_invocation_tokens": [5], "init_lora_weights": "mica"}, "'mica' exclude each"),
        ({"new_option": 3}, "the option 'new_option' of adapter_config.json is unknown"),
    ],
)
def test_values_that_are_refused(options: dict[str, Any], text: str) -> None:
    assert text in refusal(**options)


@pytest.mark.parametrize("off", [None, "", []])
def test_choices_that_are_empty_choose_nothing(off: Any) -> None:
    document = config() | {"layers_pattern": off, "exclude_modules": off}
    options = parse_config(json.dumps(document))
    assert options.layers_pattern == ()
    assert not options.exclude_modules
    assert parse_config(json.dumps(config(layers_to_transform=0))).layers_to_transform == (0,)


@pytest.mark.parametrize("value", [None, False, 0, "", [], {}])
def test_unknown_options_are_accepted_while_they_are_off(value: Any) -> None:
    document = {**config(), "enable_lora": value}
    assert parse_config(json.dumps(document)).rank == 2


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "[" * 100_000, "\ud800"])
def test_what_is_no_json_object_is_refused(text: str) -> None:
    with pytest.raises(AdapterRefusedError, match="adapter_config.json is not"):
        parse_config(text.encode("utf-8", "surrogatepass"))


def test_long_values_are_shortened_in_texts() -> None:
    assert len(refusal(r="x" * 10_000)) < 300
