"""Models compute their experts by our kernel as transformers computes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from tests.helpers.tiny_models import tiny_config, widen

from lorax_shard.mixture.install import install
from lorax_shard.mixture.narrow import round_experts
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
    product = CpuPairs.multiply

    def counting(pairs: CpuPairs, *args: Any, **kwargs: Any) -> torch.Tensor:
        counted.append(len(pairs.experts))
        return product(pairs, *args, **kwargs)

    monkeypatch.setattr(CpuPairs, "multiply", counting)
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
def test_other_numbers_are_computed_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("qwen3_moe")
    counted = count_products(monkeypatch)
    install(model, CPU, torch.bfloat16)
    model(IDS)
    install(model, CPU, torch.float32)
    expected = make_model("qwen3_moe").to(torch.bfloat16)
    halved = model.to(torch.bfloat16)
    torch.testing.assert_close(halved(IDS).logits, expected(IDS).logits, atol=0.05, rtol=0.05)
    assert counted == []


def expert_types(model: Any) -> set[torch.dtype]:
    return {parameter.dtype for name, parameter in model.named_parameters() if parameter.dim() == 3}


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_matrices_are_kept_in_the_16_bits_that_hold_them(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(family)
    round_experts(model, dtype)
    expected = model(IDS).logits
    install(model, CPU, torch.float32)
    assert expert_types(model) == {dtype}
    counted = count_products(monkeypatch)
    found = model(IDS).logits
    assert counted
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, atol=2e-6 * scale, rtol=1e-4)


def test_a_number_that_16_bits_do_not_hold_keeps_all_wide() -> None:
    model = make_model("mixtral")
    round_experts(model, torch.bfloat16)
    experts = model.model.layers[0].mlp.experts
    with torch.no_grad():
        experts.down_proj[-1, 0, 0] = 1.0 + 2.0**-20
    install(model, CPU, torch.float32)
    assert experts.down_proj.dtype is torch.float32
    assert experts.gate_up_proj.dtype is torch.bfloat16
