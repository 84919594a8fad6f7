"""What of a model's files is fetched: its own, and those of sentence-transformers' steps."""

from __future__ import annotations

import pytest
from huggingface_hub.utils import filter_repo_objects

from lorax_shard.prepare.hub import UNWANTED_FILES, WANTED_FILES


@pytest.mark.parametrize(
    ("name", "is_fetched"),
    [
        ("config.json", True),
        ("model-00001-of-00002.safetensors", True),
        ("1_Pooling/config.json", True),
        ("2_Dense/config.json", True),
        ("2_Dense/model.safetensors", True),
        ("2_Dense/pytorch_model.bin", False),
        ("consolidated.safetensors", False),
        ("onnx/config.json", False),
        ("original/params.json", False),
        ("8bit/model.safetensors", False),
        ("1_Pooling/onnx/config.json", False),
    ],
)
def test_a_file_is_fetched_if_the_model_is_made_of_it(name: str, is_fetched: bool) -> None:
    found = filter_repo_objects([name], allow_patterns=WANTED_FILES, ignore_patterns=UNWANTED_FILES)
    assert list(found) == [name] * is_fetched
