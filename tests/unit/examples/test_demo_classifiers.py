"""The demo classifiers' texts, and the folders that are committed."""

from __future__ import annotations

import json
import random
import re

import pytest
from examples.classify.classifier import Classifier, Labelled, NamedPart, numbers_of
from examples.classify.names import NAMES
from examples.train_classifiers import CLASSIFIERS, FOLDER
from safetensors import safe_open

SIZE_LIMIT = 1_000_000
each_one = pytest.mark.parametrize("classifier", CLASSIFIERS.values(), ids=CLASSIFIERS)


@each_one
def test_the_same_seed_draws_the_same_texts(classifier: Classifier) -> None:
    first, again, other = (classifier.texts(random.Random(seed), "train", 50) for seed in (1, 1, 2))
    assert first == again != other


@each_one
def test_training_and_held_out_share_no_text(classifier: Classifier) -> None:
    train = {each.text for each in classifier.texts(random.Random(1), "train", 400)}
    held_out = classifier.texts(random.Random(2), "held-out", 200)
    assert len(held_out) == 200
    named = {each.text for each in held_out if each.names or each.label}
    assert named and not train & named
    for each in held_out:
        assert not re.search(r"[{}]", each.text), each.text


@each_one
def test_texts_have_all_labels(classifier: Classifier) -> None:
    for split in ("train", "held-out"):
        texts = classifier.texts(random.Random(3), split, 200)
        found = {each.label for each in texts} - {""}
        kinds = {name.kind for each in texts for name in each.names}
        assert found | kinds == {label.rpartition("-")[2] for label in classifier.labels} - {"O"}


def test_names_are_where_they_stand() -> None:
    for each in NAMES.texts(random.Random(4), "train", 200):
        for name in each.names:
            assert re.fullmatch(r"[A-Z][\w ]+", each.text[name.start : name.end]), each


def test_tokens_of_names_are_told_apart() -> None:
    text = Labelled("Mr Ho in Rome", names=(NamedPart(0, 5, "PER"), NamedPart(9, 13, "LOC")))
    tokens = [(0, 0), (0, 2), (3, 5), (6, 8), (9, 11), (11, 13), (0, 0)]
    found = [NAMES.labels[number] for number in numbers_of(NAMES, text, tokens)]
    assert found == ["O", "B-PER", "I-PER", "O", "B-LOC", "I-LOC", "O"]


@each_one
def test_a_committed_folder_is_small_and_names_its_labels(classifier: Classifier) -> None:
    folder = FOLDER / classifier.name
    weights = folder / "adapter_model.safetensors"
    assert weights.stat().st_size < SIZE_LIMIT
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["task_type"] == classifier.task_type
    names = json.loads((folder / "config.json").read_text())["id2label"]
    assert names == {str(number): label for number, label in enumerate(classifier.labels)}
    with safe_open(weights, framework="pt") as file:
        assert {file.get_tensor(key).dtype.itemsize for key in file.keys()} == {2}  # noqa: SIM118
    card = (folder / "README.md").read_text()
    (share,) = re.findall(r"^([\d.]+)% of \d+ held-out texts", card, re.MULTILINE)
    assert float(share) > 90
