"""An encoder as a user starts it, over two ranks: vectors of base rows and of an adapter's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.helpers.encoder_models import load_encoder, make_tiny_encoder
from tests.helpers.peft_folders import quiet, randomise
from tests.helpers.server import Server

TEXTS = [[5, 9, 40], [7], [300, 21, 4, 4, 90, 12, 5, 5], [8, 8, 8]]


def save_adapter(model: Path, folder: Path) -> Path:
    """Save an adapter of the plain encoder, as PEFT's users do."""
    options = LoraConfig(
        task_type="FEATURE_EXTRACTION", r=4, target_modules=["query", "attention.output.dense"]
    )
    with quiet():
        tuned = get_peft_model(load_encoder(model), options)
        randomise(tuned, "none", 3)
        tuned.save_pretrained(folder)
    return folder


@torch.no_grad()
def means_of(model: Any) -> torch.Tensor:
    """Return the mean of what the last layer gives for each text, of length one."""
    states = [model(input_ids=torch.tensor([ids])).last_hidden_state[0] for ids in TEXTS]
    return torch.nn.functional.normalize(torch.stack([each.mean(dim=0) for each in states]))


def test_two_ranks_make_the_vectors_of_a_model_and_of_its_adapter(tmp_path: Path) -> None:
    model = make_tiny_encoder("bert", tmp_path / "model")
    adapter = save_adapter(model, tmp_path / "own")
    options = (
        "--model-id", str(model), "--served-model-name", "base", "--num-shard", "2",
        "--adapter-local-root", str(tmp_path), "--adapter-store-dir", str(tmp_path / "store"),
        "--lora-modules", f"tuned={adapter}",
    )  # fmt: skip
    with quiet():
        tuned = PeftModel.from_pretrained(load_encoder(model), adapter).eval()
    expected = {"base": means_of(load_encoder(model)), "tuned": means_of(tuned)}
    assert float((expected["base"] - expected["tuned"]).abs().max()) > 1e-2
    with Server(*options) as server:
        for name, wanted in expected.items():
            answer = server.post("/v1/embeddings", {"model": name, "input": TEXTS})
            found = torch.tensor([each["embedding"] for each in answer["data"]])
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
