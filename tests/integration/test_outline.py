"""What is said of a model by its config alone is what the loader says of it with its weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from tests.helpers.head_world import HeadWorld

from lorax_shard.check import check
from lorax_shard.model.loader import load_paged_model, read_config
from lorax_shard.model.outline import outline


@pytest.mark.parametrize(
    ("family", "head", "without"),
    [
        ("bert", "", ""),
        # A model that was saved without its pooler has no head for texts.
        ("bert", "TOKEN_CLS", "SEQ_CLS"),
        ("distilbert", "SEQ_CLS", ""),
        ("llama", "", ""),
    ],
)
def test_an_outline_is_the_loaded_model_s_description(
    family: str, head: str, without: str, tmp_path: Path
) -> None:
    world = HeadWorld(tmp_path, family, head, without)
    loaded = load_paged_model(world.config).base
    assert loaded is not None
    found = outline(read_config(world.path, trust_remote_code=False))
    assert found == dataclasses.replace(loaded, weight_digests={})
    for folder in world.folders:
        report = check(folder, None, world.path, max_rank=64)
        assert report.refusal is None, folder
    heads = [check(each, None, world.path, max_rank=64).facts["head"] for each in world.folders]
    labels = [0 if each is None else len(each["labels"]) for each in heads]
    assert labels == [each.num_labels for each in world.adapters]
