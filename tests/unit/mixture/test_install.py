"""Models compute their experts by our kernel as transformers computes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from tests.helpers.tiny_models import tiny_config, widen

from lorax_shard.mixture.install import install
from lorax_shard.mixture.pairs import CpuPairs, probe

pytestmark = pytest.mark.skipif(probe() is not None, reason=str(probe()))

CPU = torch.device("cpu")
FAMILIES = (
    "deepseek_v2", "deepseek_v3", "gpt_oss", "granitemoe", "mixtral", "olmoe", "qwen2_moe",
    "qwen3_moe",
)  # fmt: skip
IDS = torch.tensor([[5, 40, 3, 381, 7, 7, 120, 64, 9, 17, 200, 33]])


def make_model(family: str) -> Any:
    config = tiny_config(family)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    widen(model, 1)
    return model.eval()


def count_products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    counted: list[int] = []
    product = CpuPairs._product

    def counting(pairs: CpuPairs, *args: Any) -> torch.Tensor:
        counted.append(len(pairs.experts))
        return product(pairs, *args)

    monkeypatch.setattr(CpuPairs, "_product", counting)
    return counted


@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_s_experts_compute_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(family)
    expected = model(IDS).logits
    install(model, CPU, torch.float32)
    counted = count_products(monkeypatch)
    found = model(IDS).logits
    assert counted, "no product was computed by the kernel"
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, atol=2e-6 * scale, rtol=1e-4)


@torch.inference_mode()
def test_other_numbers_stay_with_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("qwen3_moe")
    counted = count_products(monkeypatch)
    install(model, CPU, torch.bfloat16)
    model(IDS)
    install(model, CPU, torch.float32)
    expected = make_model("qwen3_moe").to(torch.bfloat16)
    halved = model.to(torch.bfloat16)
    assert halved(IDS).logits.shape == expected(IDS).logits.shape
    assert counted == []
