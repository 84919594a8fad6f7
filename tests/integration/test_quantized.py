"""Adapters on a quantized base, against transformers and PEFT that hold the dequantized weights."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.default_model import default_model_dir
from tests.helpers.paged_runner import (
    RELATIVE_TOLERANCE,
    Fault,
    LogitsDifferError,
    PagedRunner,
    check_logits,
    stock_logits,
)
from tests.helpers.peft_adapters import peft_logits, peft_model
from tests.helpers.quantized_rows import QuantizedRows, dequantized_copy, load
from tests.helpers.schedules import SCHEDULES, chunked
from tests.helpers.tiny_models import VOCAB_SIZE, make_tiny_model

from lorax_shard.linear.packed import PackedLinear
from lorax_shard.linear.quantized.formats import to_int8
from lorax_shard.linear.quantized.install import quantize
from lorax_shard.linear.quantized.kernel import load_quantized
from lorax_shard.peft.files import AdapterLimits
from lorax_shard.peft.read import read_adapter

pytestmark = pytest.mark.skipif(load_quantized()[0] is None, reason=str(load_quantized()[1]))


# Plain, tied and fused linears, weights that lie the other way round, experts.
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "gpt2", "mixtral"])
def test_int8_with_two_adapters(family: str, tmp_path: Path) -> None:
    rows = QuantizedRows(family, tmp_path)
    assert rows.model.linear_backend == "int8"
    assert max(rows.run(schedule) for schedule in SCHEDULES) < RELATIVE_TOLERANCE
    with pytest.raises(LogitsDifferError):
        rows.run(chunked, Fault.LOST_BLOCK)


# Norms of the dequantized weights, a head of its own, and all linears.
@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True, "target_modules": ["q_proj", "o_proj", "down_proj"]},
        {"modules_to_save": ["lm_head"], "target_modules": "all-linear"},
        {"trainable_token_indices": {"embed_tokens": [3, 5]}, "target_modules": ["v_proj"]},
    ],
    ids=["dora", "head", "tokens"],
)
def test_int8_with_an_adapter_of_each_kind(options: dict[str, Any], tmp_path: Path) -> None:
    folder = make_tiny_model("llama", tmp_path / "model")
    tuned = peft_model(dequantized_copy(folder), seed=5, r=4, lora_alpha=6, **options)
    tuned.save_pretrained(tmp_path / "adapter")
    model = load(folder, quantize="int8")
    assert model.base is not None
    assert model.lora is not None
    model.lora.load(0, read_adapter(tmp_path / "adapter", model.base, AdapterLimits()))
    draw = random.Random(6)
    rows = [[draw.randrange(VOCAB_SIZE) for _ in range(length)] for length in (20, 7, 1)]
    runner = _AdaptedRunner(model, rows, num_blocks=64)
    chunked(runner)
    check_logits(runner, peft_logits(tuned, rows))


class _AdaptedRunner(PagedRunner):
    def slots(self, order: list[int]) -> list[int | None]:
        return [0] * len(order)


def test_an_adapter_is_merged_before_weights_are_rounded(tmp_path: Path) -> None:
    folder = make_tiny_model("llama", tmp_path / "model")
    tuned = peft_model(folder, seed=7, r=4, lora_alpha=6, target_modules="all-linear")
    tuned.save_pretrained(tmp_path / "adapter")
    model = load(
        folder, quantize="int8", merge_adapter_dir=str(tmp_path / "adapter"), adapters=False
    )
    merged = tuned.merge_and_unload()
    quantize(merged, to_int8)
    rows = [list(range(1, 30)), [7, 8, 9]]
    runner = PagedRunner(model, rows, num_blocks=64)
    chunked(runner)
    with torch.inference_mode():
        check_logits(runner, [merged(torch.tensor([row])).logits[0] for row in rows])


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
