"""What folders say of their vectors, in the files of sentence-transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.encoder_models import make_tiny_encoder

from lorax_contract.config import ShardConfig
from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_contract.pooling import Pooling, VectorFacts
from lorax_shard.model.loader import load_paged_model
from lorax_shard.model.vector_facts import longest_text, read_vector_facts

OLD = "sentence_transformers.models."
FLAGS = {
    "pooling_mode_cls_token": Pooling.FIRST,
    "pooling_mode_max_tokens": Pooling.MAX,
    "pooling_mode_mean_tokens": Pooling.MEAN,
    "pooling_mode_mean_sqrt_len_tokens": Pooling.MEAN_SQRT,
    "pooling_mode_weightedmean_tokens": Pooling.WEIGHTED_MEAN,
    "pooling_mode_lasttoken": Pooling.LAST,
}
NAMES = {
    "cls": Pooling.FIRST,
    "max": Pooling.MAX,
    "mean": Pooling.MEAN,
    "mean_sqrt_len_tokens": Pooling.MEAN_SQRT,
    "weightedmean": Pooling.WEIGHTED_MEAN,
    "lasttoken": Pooling.LAST,
}


def write(folder: Path, name: str, document: Any) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(document if isinstance(document, str) else json.dumps(document))


def described(
    folder: Path,
    pooling: dict[str, Any],
    steps: tuple[str, ...] = (f"{OLD}Transformer", f"{OLD}Pooling", f"{OLD}Normalize"),
) -> Path:
    """Write a folder with these steps and this pooling."""
    places = [f"{at}_{step.rpartition('.')[2]}" if at else "" for at, step in enumerate(steps)]
    modules = [{"type": step, "path": place} for step, place in zip(steps, places, strict=True)]
    write(folder, "modules.json", modules)
    for place in places:
        if place.endswith("Pooling"):
            write(folder, f"{place}/config.json", pooling)
    return folder


def facts(folder: Path, *, is_encoder: bool = True) -> VectorFacts:
    return read_vector_facts(folder, is_encoder=is_encoder)


def refusal_of(folder: Path) -> StartupError:
    with pytest.raises(StartupError) as caught:
        facts(folder)
    return caught.value


@pytest.mark.parametrize("flag", FLAGS)
def test_each_flag_of_old_releases_is_its_pooling(flag: str, tmp_path: Path) -> None:
    flags = dict.fromkeys(FLAGS, False) | {flag: True, "word_embedding_dimension": 48}
    assert facts(described(tmp_path, flags)).pooling is FLAGS[flag]


@pytest.mark.parametrize("is_listed", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_each_name_of_later_releases_is_its_pooling(
    name: str, is_listed: bool, tmp_path: Path
) -> None:
    named = {"pooling_mode": [name] if is_listed else name, "include_prompt": True}
    assert facts(described(tmp_path, named)).pooling is NAMES[name]


def test_a_pooling_without_settings_is_the_mean(tmp_path: Path) -> None:
    assert facts(described(tmp_path, {"embedding_dimension": 48})).pooling is Pooling.MEAN


@pytest.mark.parametrize(("is_encoder", "pooling"), [(True, Pooling.MEAN), (False, Pooling.LAST)])
def test_a_folder_without_such_files_is_as_its_kind_is(
    is_encoder: bool, pooling: Pooling, tmp_path: Path
) -> None:
    assert facts(tmp_path, is_encoder=is_encoder) == VectorFacts(pooling=pooling, normalize=True)


@pytest.mark.parametrize("has_norm", [True, False])
def test_vectors_have_the_length_one_where_a_step_makes_it(has_norm: bool, tmp_path: Path) -> None:
    later = "sentence_transformers.base.modules."
    steps = (f"{later}transformer.Transformer", f"{later}pooling.Pooling")
    steps += (f"{later}normalize.Normalize",) * has_norm
    assert facts(described(tmp_path, {"pooling_mode": "cls"}, steps)).normalize == has_norm


def test_prompts_are_read_by_name(tmp_path: Path) -> None:
    prompts = {"query": "query: ", "document": "passage: "}
    write(
        tmp_path,
        "config_sentence_transformers.json",
        {"prompts": prompts, "default_prompt_name": "query"},
    )
    found = facts(tmp_path)
    assert dict(found.prompts) == prompts
    assert found.default_prompt == "query"


@pytest.mark.parametrize(
    ("pooling", "words"),
    [
        ({"pooling_mode": "mean", "include_prompt": False}, "include_prompt"),
        ({"pooling_mode": ["mean", "max"]}, "sets 2 kinds of pooling"),
        ({"pooling_mode_cls_token": True, "pooling_mode_lasttoken": True}, "sets 2 kinds"),
        ({"pooling_mode": []}, "sets 0 kinds of pooling"),
        ({"pooling_mode": "median"}, "names the pooling 'median'"),
    ],
)
def test_a_pooling_that_is_not_computed_is_refused(
    pooling: dict[str, Any], words: str, tmp_path: Path
) -> None:
    error = refusal_of(described(tmp_path, pooling))
    assert error.exit_code is ExitCode.MODEL_UNSUPPORTED
    assert words in str(error)


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (f"{OLD}LayerNorm", "modules.json names LayerNorm"),
        (f"{OLD}Pooling", "has the steps Transformer, Pooling, Pooling"),
        (f"{OLD}Transformer", "has the steps Transformer, Pooling, Transformer"),
        ("custom_st.Pooling", "modules.json names custom_st.Pooling"),
        ("my.own.Transformer", "modules.json names my.own.Transformer"),
    ],
)
def test_a_step_that_is_not_computed_is_refused(step: str, words: str, tmp_path: Path) -> None:
    steps = (f"{OLD}Transformer", f"{OLD}Pooling", step)
    error = refusal_of(described(tmp_path, {"pooling_mode": "mean"}, steps))
    assert error.exit_code is ExitCode.MODEL_UNSUPPORTED
    assert words in str(error)


@pytest.mark.parametrize(
    ("name", "document", "words"),
    [
        ("modules.json", "[{", "modules.json cannot be read"),
        ("modules.json", {"type": "x"}, "it must hold one list"),
        ("modules.json", ["Pooling"], "each of its steps must have a type and a path"),
        ("modules.json", [{"type": f"{OLD}Pooling"}], "must have a type and a path"),
        ("config_sentence_transformers.json", "[]", "it must hold one JSON object"),
        ("config_sentence_transformers.json", {"prompts": ["query: "]}, "prompts must be one"),
        ("1_Pooling/config.json", "nothing", "1_Pooling/config.json cannot be read"),
        ("1_Pooling/config.json", "\xff", "1_Pooling/config.json cannot be read"),
    ],
)
def test_a_damaged_file_is_named(name: str, document: Any, words: str, tmp_path: Path) -> None:
    described(tmp_path, {"pooling_mode": "mean"})
    write(tmp_path, name, document)
    if document == "\xff":
        (tmp_path / name).write_bytes(b"\xff{}")
    error = refusal_of(tmp_path)
    assert error.exit_code is ExitCode.MODEL_CORRUPT
    assert words in str(error)


@pytest.mark.parametrize(
    ("files", "longest"),
    [
        ({}, 0),
        ({"sentence_bert_config.json": {"max_seq_length": 256}}, 256),
        ({"sentence_xlm-roberta_config.json": {"max_seq_length": 128}}, 128),
        # Where later releases write it.
        ({"sentence_bert_config.json": {"transformer_task": "x"},
          "tokenizer_config.json": {"model_max_length": 384}}, 384),
        ({"sentence_bert_config.json": {"max_seq_length": 64},
          "tokenizer_config.json": {"model_max_length": 512}}, 64),
        ({"tokenizer_config.json": {"model_max_length": 10**30}}, 0),
        ({"tokenizer_config.json": {"model_max_length": 1e30}}, 0),
        ({"sentence_bert_config.json": {"max_seq_length": None}}, 0),
    ],
)  # fmt: skip
def test_how_long_a_text_may_be(files: dict[str, Any], longest: int, tmp_path: Path) -> None:
    for name, document in files.items():
        write(tmp_path, name, document)
    assert longest_text(tmp_path) == longest


@pytest.mark.parametrize(
    ("normalizer", "is_refused"),
    [
        (None, True),
        ({"type": "BertNormalizer", "lowercase": False}, True),
        ({"type": "BertNormalizer", "lowercase": True}, False),
        ({"type": "Sequence", "normalizers": [{"type": "NFD"}, {"type": "Lowercase"}]}, False),
    ],
)
def test_lower_case_is_the_tokenizers_work(
    normalizer: Any, is_refused: bool, tmp_path: Path
) -> None:
    write(tmp_path, "sentence_bert_config.json", {"do_lower_case": True})
    write(tmp_path, "tokenizer.json", {"normalizer": normalizer})
    if is_refused:
        assert "lower case" in str(refusal_of(tmp_path))
    else:
        assert facts(tmp_path).pooling is Pooling.MEAN


def config_of(folder: Path) -> ShardConfig:
    return ShardConfig(model_dir=str(folder), model_id="tiny", shard_uris=["unix:///unused"])


def test_a_model_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    make_tiny_encoder("bert", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    described(tmp_path, {"pooling_mode": "mean"}, (f"{OLD}Transformer", f"{OLD}CNN"))
    with pytest.raises(StartupError, match="modules.json names CNN"):
        load_paged_model(config_of(tmp_path))


@pytest.mark.parametrize(("named", "served"), [(24, 24), (9999, 40)])
def test_a_text_is_as_long_as_the_folder_says_within_its_positions(
    named: int, served: int, tmp_path: Path
) -> None:
    make_tiny_encoder("roberta", tmp_path)
    write(tmp_path, "sentence_bert_config.json", {"max_seq_length": named})
    assert load_paged_model(config_of(tmp_path)).max_positions == served
