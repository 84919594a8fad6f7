"""A tiny model on disk, and the launcher that serves it as a user starts it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.helpers.server import Server
from tests.helpers.tiny_models import make_tiny_model

NUM_BLOCKS = 96
# 1,536 tokens of KV cache; steps of 64 tokens, so that prompts come in chunks.
OPTIONS = (
    "--num-blocks", str(NUM_BLOCKS), "--max-batch-prefill-tokens", "64", "--max-batch-size", "16",
    "--max-concurrent-requests", "48", "--max-stop-sequences", "4",
)  # fmt: skip


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("model") / "tiny-llama")


@pytest.fixture(scope="session")
def launch(tiny_model: Path) -> Callable[..., Server]:
    def make(*options: str) -> Server:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return Server("--model-id", str(tiny_model), *OPTIONS, *options, env=environment)

    return make
