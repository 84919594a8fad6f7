"""Adapters on a quantized base, against transformers and PEFT that hold the dequantized weights."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.default_model import default_model_dir
from tests.helpers.family_rows import FamilyRows
from tests.helpers.paged_runner import (
    RELATIVE_TOLERANCE,
    Fault,
    LogitsDifferError,
    PagedRunner,
    check_logits,
    stock_logits,
)
from tests.helpers.schedules import SCHEDULES, chunked
from tests.helpers.tiny_models import make_tiny_model
from transformers import AutoModelForCausalLM

from lorax_contract.config import ShardConfig
from lorax_shard.linear.packed import PackedLinear
from lorax_shard.linear.quantized.formats import to_int8
from lorax_shard.linear.quantized.install import quantize
from lorax_shard.linear.quantized.kernel import load_quantized
from lorax_shard.model.hf_model import HFPagedModel
from lorax_shard.model.loader import load_paged_model

pytestmark = pytest.mark.skipif(load_quantized()[0] is None, reason=str(load_quantized()[1]))


def dequantized_copy(folder: Path) -> Path:
    """Return a folder that holds the weights that int8 makes of a model's."""
    target = Path(shutil.copytree(folder, folder.with_name("dequantized")))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    quantize(model, to_int8)
    model.save_pretrained(target)
    return target


def load(folder: Path, **values: Any) -> HFPagedModel:
    return load_paged_model(
        ShardConfig(model_dir=str(folder), model_id="tiny", shard_uris=["unix:///none"], **values)
    )


class QuantizedRows(FamilyRows):
    """Serves a model in int8; what it is compared with has the dequantized weights."""

    def _load(self) -> HFPagedModel:
        original, self.path = self.path, dequantized_copy(self.path)
        return load(original, quantize="int8")


# Plain, tied and fused linears, weights that lie the other way round, experts.
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "gpt2", "mixtral"])
def test_int8_with_two_adapters(family: str, tmp_path: Path) -> None:
    rows = QuantizedRows(family, tmp_path)
    assert rows.model.linear_backend == "int8"
    assert max(rows.run(schedule) for schedule in SCHEDULES) < RELATIVE_TOLERANCE
    with pytest.raises(LogitsDifferError):
        rows.run(chunked, Fault.LOST_BLOCK)


def test_weights_in_int8_leave_more_memory(tmp_path: Path) -> None:
    folder = make_tiny_model("llama", tmp_path / "model", hidden_size=96, intermediate_size=192)
    plain, quantized = load(folder, linear_backend="panel"), load(folder, quantize="int8")
    packed = [m for m in quantized._model.modules() if isinstance(m, PackedLinear)]
    assert len(packed) == 15
    assert quantized.weight_bytes < 0.55 * plain.weight_bytes


@torch.inference_mode()
def test_the_default_model_from_its_own_blocks_is_the_one_in_float32() -> None:
    folder = default_model_dir(with_blocks=True)
    quantized, plain = load(folder, quantize="gguf"), load(folder, linear_backend="torch")
    modules = dict(plain._model.named_modules())
    linears = [
        (name, module)
        for name, module in quantized._model.named_modules()
        if isinstance(module, PackedLinear)
    ]
    assert len(linears) == 30 * 7 + 1
    assert all(torch.equal(module.weight, modules[name].weight) for name, module in linears)
    assert quantized.weight_bytes < 0.42 * plain.weight_bytes
    draw = random.Random(4)
    rows = [[draw.randrange(49152) for _ in range(length)] for length in (40, 9)]
    runner = PagedRunner(quantized, rows, num_blocks=64)
    chunked(runner)
    expected = stock_logits(folder, rows)
    check_logits(runner, expected)
