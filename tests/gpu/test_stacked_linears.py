"""Linears that read one input, stacked into one product on a GPU, with and without adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.helpers.tiny_models import make_tiny_model

from lorax_contract.config import Device, ShardConfig
from lorax_shard.linear.packed import PackedLinear, SiblingKernel
from lorax_shard.model.hf_model import HFPagedModel
from lorax_shard.model.loader import load_paged_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch can use"),
]


def load(model_dir: Path, device: Device) -> HFPagedModel:
    config = ShardConfig(
        model_dir=str(model_dir), model_id="tiny", shard_uris=["unix:/unused"], device=device,
        dtype="float32", linear_backend="torch",
    )  # fmt: skip
    return load_paged_model(config)


def test_siblings_are_one_product_and_weigh_what_they_weighed(tmp_path: Path) -> None:
    model_dir = make_tiny_model("llama", tmp_path)
    plain, stacked = load(model_dir, "cpu"), load(model_dir, "cuda")
    modules = dict(stacked._model.named_modules())
    for name in ("q_proj", "k_proj", "v_proj"):
        module = modules[f"model.layers.0.self_attn.{name}"]
        assert isinstance(module, PackedLinear)
        assert isinstance(module.kernel, SiblingKernel)
    assert stacked.weight_bytes == plain.weight_bytes
    for name, module in plain._model.named_modules():
        if isinstance(module, PackedLinear):
            torch.testing.assert_close(modules[name].weight.cpu(), module.weight)
