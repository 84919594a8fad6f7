"""How an adapter's folder names the labels of its head, and which names are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers.any_values import JSON
from tests.helpers.examples import examples
from tests.helpers.small_adapters import make_base

from lorax_contract.pooling import HeadFacts, Pooling, ScoreKind
from lorax_shard.lora.delta import HostAdapter, ModuleDelta
from lorax_shard.peft.base import BaseDescription, HeadDescription, ModuleInfo
from lorax_shard.peft.errors import AdapterRefusedError
from lorax_shard.peft.files import AdapterLimits
from lorax_shard.peft.labels import named_facts, with_labels

OUTPUT = ModuleInfo(kind="linear", type_name="Linear", in_features=8, out_features=3)
HEAD = HeadDescription(
    architecture="BertForSequenceClassification", prefix="bert", modules={"classifier": OUTPUT},
    has_pooler=False, output="classifier", pooling=Pooling.FIRST,
)  # fmt: skip
BASE = BaseDescription(
    architecture="BertModel", modules={}, is_backbone=True, heads={"sequence": HEAD}
)
PLAIN = HeadFacts(pooling=Pooling.FIRST, labels=("LABEL_0", "LABEL_1", "LABEL_2"))
NAMES = {"0": "bad", "1": "so-so", "2": "good"}


def adapter() -> HostAdapter:
    weight = ModuleDelta(weight=torch.zeros(3, 8))
    return HostAdapter(digest="", modules={"sequence_head.classifier": weight}, head="sequence")


def facts(folder: Path, text: str | None) -> HeadFacts | None:
    if text is not None:
        (folder / "config.json").write_text(text)
    return with_labels(adapter(), BASE, folder, AdapterLimits()).head_facts


def test_a_folder_without_names_has_those_of_transformers(tmp_path: Path) -> None:
    assert facts(tmp_path, None) == PLAIN
    assert facts(tmp_path, json.dumps({"model_type": "bert", "hidden_size": 8})) == PLAIN


def test_a_folder_names_labels_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    shuffled = {"2": "good", "0": "bad", "1": "so-so"}
    found = facts(tmp_path, json.dumps({"id2label": shuffled, "label2id": {"bad": 0}}))
    assert found == HeadFacts(pooling=Pooling.FIRST, labels=("bad", "so-so", "good"))


def test_transformers_own_file_is_read(tmp_path: Path) -> None:
    from transformers import BertConfig

    names: dict[Any, str] = {0: "bad", 1: "so-so", 2: "good"}
    config = BertConfig(id2label=names, problem_type="multi_label_classification")
    config.save_pretrained(tmp_path)
    found = facts(tmp_path, None)
    assert found is not None
    assert found.labels == ("bad", "so-so", "good")
    assert found.scores is ScoreKind.ANY_OF


@pytest.mark.parametrize(
    ("kind", "num", "scores"),
    [
        ("single_label_classification", 3, ScoreKind.ONE_OF),
        ("single_label_classification", 1, ScoreKind.ANY_OF),
        ("multi_label_classification", 3, ScoreKind.ANY_OF),
        ("regression", 1, ScoreKind.NUMBERS),
        ("regression", 3, ScoreKind.NUMBERS),
    ],
)
def test_the_kind_of_problem_says_what_scores_are(kind: str, num: int, scores: ScoreKind) -> None:
    found = named_facts({"problem_type": kind}, HEAD.facts_with(num))
    assert found.scores is scores
    assert found.labels == HEAD.facts_with(num).labels


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"id2label": {"0": "no", "1": "yes"}}, "names 2 labels, and the adapter's head gives 3"),
        ({"id2label": {**NAMES, "3": "best"}}, "names 4 labels"),
        ({"id2label": {}}, "names 0 labels"),
        ({"id2label": {"1": "a", "2": "b", "3": "c"}}, "has the numbers 3; those of 3 .* 0 to 2"),
        ({"id2label": {"0": "a", "1": "b", "-1": "c"}}, "has the numbers -1"),
        ({"id2label": {"0": "a", "1": "b", "02": "c"}}, "has the numbers 02"),
        ({"id2label": {**NAMES, "2": "bad"}}, "several labels called bad"),
        ({"id2label": {**NAMES, "2": 7}}, "has the label 7; a label is a text"),
        ({"id2label": {**NAMES, "2": " "}}, "a label is a text"),
        ({"id2label": {**NAMES, "2": "\ud800"}}, "a label is a text"),
        ({"id2label": ["a", "b", "c"]}, "no object"),
        ({"problem_type": "ranking"}, "problem_type in config.json is 'ranking'; it can be single"),
        ({"problem_type": ["regression"]}, "it can be single"),
    ],
)
def test_labels_that_contradict_the_head_are_refused(
    document: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(AdapterRefusedError, match=words):
        facts(tmp_path, json.dumps(document))


@settings(max_examples=examples(100), deadline=None)
@given(
    labels=JSON | st.dictionaries(st.sampled_from(["0", "1", "2"]), st.text(max_size=3) | JSON),
    kind=JSON | st.sampled_from(["regression", "single_label_classification"]),
)
def test_any_labels_are_the_head_s_or_refused(labels: Any, kind: Any) -> None:
    try:
        found = named_facts({"id2label": labels, "problem_type": kind}, PLAIN)
    except AdapterRefusedError:
        return
    assert len(set(found.labels)) == 3
    # An answer can hold them.
    assert all(label.encode() for label in found.labels)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "config.json is not valid JSON"),
        ("[]", "config.json is not a JSON object"),
        ("version https://git-lfs.github.com/spec/v1", "config.json is a Git LFS pointer"),
        (" " * ((1 << 20) + 1), "config.json has 1048577 bytes"),
    ],
)
def test_files_that_cannot_be_read_are_refused(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterRefusedError, match=words):
        facts(tmp_path, text)


def test_an_adapter_without_a_head_has_no_labels(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    plain = HostAdapter(digest="", modules={})
    assert with_labels(plain, make_base(), tmp_path, AdapterLimits()) is plain
