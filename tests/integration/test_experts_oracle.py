"""What is read of adapters on experts and routers changes weights as PEFT changes them."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import save_file
from tests.helpers.peft_folders import logits_of, quiet, randomise
from tests.helpers.tiny_models import tiny_config, widen

from lorax_shard.lora.cpp import CppLora
from lorax_shard.lora.delta import HostAdapter, ModuleDelta
from lorax_shard.lora.model import install
from lorax_shard.model.describe import describe
from lorax_shard.peft.base import BaseDescription
from lorax_shard.peft.context import make_context
from lorax_shard.peft.files import AdapterLimits
from lorax_shard.peft.normal import cast, read_normal
from lorax_shard.peft.verify import verify

FAMILIES = (
    "deepseek_v2", "deepseek_v3", "gpt_oss", "granitemoe", "llama4_text", "mixtral", "olmoe",
    "qwen2_moe", "qwen3_moe",
)  # fmt: skip
IDS = [5, 40, 3, 381, 7, 7, 120, 64, 9]
PLAIN: dict[str, Any] = {"r": 2, "lora_alpha": 3, "target_modules": []}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
ROUTERS = ["gate.weight", "router.weight"]
CASES: dict[str, dict[str, Any]] = {
    "experts": {"target_parameters": EXPERTS},
    "first": {"target_parameters": EXPERTS[:1]},
    "last": {"target_parameters": EXPERTS[1:], "lora_dropout": 0.0},
    "routers": {"target_parameters": ROUTERS},
    "all": {"target_parameters": [*EXPERTS, *ROUTERS, "o_proj.weight"], "r": 4},
    "and attention": {"target_parameters": EXPERTS, "target_modules": ["o_proj"]},
    "patterns": {
        "target_parameters": EXPERTS,
        "rank_pattern": {"experts.down_proj": 5, r"1\..*gate_up_proj": 3},
        "alpha_pattern": {r".*\.down_proj": 1},
    },
    "rslora": {
        "target_parameters": EXPERTS, "use_rslora": True, "rank_pattern": {"gate_up_proj": 9},
    },
}  # fmt: skip


def make_model(family: str) -> Any:
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32)
    widen(model, 1)
    return model.eval()


def tuned(family: str, options: dict[str, Any]) -> Any:
    """Return PEFT's model with an adapter of random weights."""
    torch.manual_seed(1)
    with quiet():
        config = peft.LoraConfig(task_type="CAUSAL_LM", **{**PLAIN, **options})
        model = peft.get_peft_model(make_model(family), config)
    randomise(model, "none", 1)
    return model


def description(family: str) -> BaseDescription:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(tiny_config(family))
    return BaseDescription.from_json(describe(model).to_json())


def stored(folder: Path, base: BaseDescription) -> HostAdapter:
    """Return the adapter in a folder as the shard reads it once it was verified."""
    (folder / "normal").mkdir()
    verify(folder, folder / "normal", make_context(base, AdapterLimits()))
    return read_normal(folder / "normal")


def weight_changes(model: Any) -> dict[str, torch.Tensor]:
    """Return what PEFT adds to each weight, out x in, by the names that deltas have."""
    inner = model.base_model.model
    is_in_first = inner.config.model_type in ("gpt_oss", "llama4_text")
    found = {}
    for name, module in inner.named_modules():
        if isinstance(module, LoraLayer):
            plain = name.replace(".base_layer", "")
            if isinstance(module, ParamWrapper) and module.parameter_name != "weight":
                plain = f"{plain}.{module.parameter_name}"
            change = module.get_delta_weight("default").detach()
            found[plain] = change.mT if is_in_first and change.dim() > 2 else change
    return found


def product(delta: ModuleDelta) -> torch.Tensor:
    """Return scaling B A, of each expert if there are some."""
    assert delta.a is not None
    assert delta.b is not None
    return (delta.scaling * (delta.b.double() @ delta.a.double())).float()


def differences(expected: dict[str, torch.Tensor], adapter: HostAdapter) -> list[str]:
    """Return the names of the weights that the adapter changes otherwise."""
    assert set(adapter.modules) == set(expected)
    return [
        name
        for name, change in expected.items()
        if (got := product(adapter.modules[name])).shape != change.shape
        or not torch.allclose(got, change, atol=1e-5)
    ]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", CASES)
def test_target_parameters(case: str, family: str, tmp_path: Path) -> None:
    model = tuned(family, CASES[case])
    model.save_pretrained(tmp_path)
    expected = weight_changes(model)
    assert expected
    assert all(change.abs().max() > 0.1 for change in expected.values())
    assert differences(expected, stored(tmp_path, description(family))) == []


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("qwen3_moe", ["q_proj", "gate_proj", "up_proj", "down_proj", "gate"]),
        ("mixtral", "all-linear"),
    ],
)
def test_what_peft_converts_from_modules_to_parameters(
    family: str, targets: Any, tmp_path: Path
) -> None:
    """PEFT itself turns the projections of older configurations into target_parameters."""
    model = tuned(family, {"target_modules": targets})
    model.save_pretrained(tmp_path)
    expected = weight_changes(model)
    assert any(name.endswith("gate_up_proj") for name in expected)
    assert differences(expected, stored(tmp_path, description(family))) == []


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", ["all", "patterns"])
def test_what_is_read_is_served(case: str, family: str, tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    if reason := CppLora.probe(cpu, torch.float32):
        pytest.skip(reason)
    model = tuned(family, CASES[case])
    model.save_pretrained(tmp_path)
    expected = logits_of(model, IDS)
    served = make_model(family)
    base = logits_of(served, IDS)
    assert (expected - base).abs().max() > 1e-2 * expected.abs().max()
    lora = install(served, "cpp", cpu, torch.float32)
    lora.load(0, cast(stored(tmp_path, description(family)), dtype=torch.float32))
    with lora.step([len(IDS)], [0]):
        got = logits_of(served, IDS)
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


def _order(delta: ModuleDelta) -> dict[str, torch.Tensor]:
    assert delta.a is not None
    return {"a": delta.a.flip(0)}


def _sides(delta: ModuleDelta) -> dict[str, torch.Tensor]:
    assert delta.a is not None
    assert delta.b is not None
    return {"a": delta.b.transpose(1, 2), "b": delta.a.transpose(1, 2)}


def _scale(delta: ModuleDelta) -> dict[str, torch.Tensor]:
    assert delta.b is not None
    b = delta.b.clone()
    b[1] *= 2
    return {"b": b}


@pytest.mark.parametrize("fault", [_order, _sides, _scale])
def test_a_planted_fault_is_seen(fault: Any, tmp_path: Path) -> None:
    model = tuned("mixtral", CASES["experts"])
    model.save_pretrained(tmp_path)
    adapter = stored(tmp_path, description("mixtral"))
    name = "model.layers.1.mlp.experts.down_proj"
    broken = dataclasses.replace(adapter.modules[name], **fault(adapter.modules[name]))
    modules = {**adapter.modules, name: broken}
    changes = weight_changes(model)
    assert differences(changes, dataclasses.replace(adapter, modules=modules)) == [name]


def test_peft_merges_no_parameters(tmp_path: Path) -> None:
    """So that there is nothing to compare merges of experts with."""
    tuned("mixtral", CASES["experts"]).save_pretrained(tmp_path)
    with quiet():
        model = peft.PeftModel.from_pretrained(make_model("mixtral"), str(tmp_path))
        with pytest.raises(ValueError, match="does not support targeting nn.Parameter"):
            model.add_weighted_adapter(["default"], [1.0], "merged")


# --- linears of experts, as older releases had them ---------------------------------------------

OLDER = {
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2"), "gate"),
    "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj"), "gate"),
}


def write_older(folder: Path, family: str, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Write an adapter on all linears of all experts; return its tensors."""
    block, linears, router = OLDER[family]
    base = description(family)
    generator = torch.Generator().manual_seed(3)
    rank = options["r"]
    values: dict[str, torch.Tensor] = {}

    def add(name: str, width_in: int, width_out: int) -> None:
        key = f"base_model.model.{name}.lora_"
        values[f"{key}A.weight"] = torch.randn(rank, width_in, generator=generator) * 0.3
        values[f"{key}B.weight"] = torch.randn(width_out, rank, generator=generator) * 0.3

    for layer in range(2):
        place = f"model.layers.{layer}.{block}"
        up = base.modules[f"model.layers.{layer}.mlp.experts.gate_up_proj"]
        for expert in range(up.num_experts):
            for linear in linears[:2]:
                add(f"{place}.experts.{expert}.{linear}", up.in_features, up.out_features // 2)
            add(f"{place}.experts.{expert}.{linears[2]}", up.out_features // 2, up.in_features)
        add(f"{place}.{router}", up.in_features, up.num_experts)
        query = base.modules[f"model.layers.{layer}.self_attn.q_proj"]
        add(f"model.layers.{layer}.self_attn.q_proj", query.in_features, query.out_features)
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", **options}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(values, folder / "adapter_model.safetensors")
    return values


@pytest.mark.parametrize("family", OLDER)
def test_older_exports_are_what_peft_makes_of_them(family: str, tmp_path: Path) -> None:
    options = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "gate", *OLDER[family][1]]}
    write_older(tmp_path, family, options)
    with quiet():
        model = peft.PeftModel.from_pretrained(make_model(family), str(tmp_path))
    expected = weight_changes(model)
    assert len(expected) == 2 * 4
    assert all(change.abs().max() > 0.1 for change in expected.values())
    assert differences(expected, stored(tmp_path, description(family))) == []


@pytest.mark.parametrize("family", OLDER)
def test_older_exports_by_hand(family: str, tmp_path: Path) -> None:
    """With rsLoRA, each linear has the scaling that it was trained with; PEFT's has another."""
    block, linears, _ = OLDER[family]
    options = {
        "r": 2, "lora_alpha": 3, "use_rslora": True,
        "target_modules": rf".*({'|'.join(linears)}|q_proj|\.gate)",
        "alpha_pattern": {rf"experts\.1\.{linears[1]}": 5},
    }  # fmt: skip
    values = write_older(tmp_path, family, options)
    adapter = stored(tmp_path, description(family))
    for expert in range(4):
        key = f"base_model.model.model.layers.1.{block}.experts.{expert}"
        gate, up, down = (
            (5 if (expert, place) == (1, 1) else 3)
            / math.sqrt(2)
            * values[f"{key}.{linear}.lora_B.weight"]
            @ values[f"{key}.{linear}.lora_A.weight"]
            for place, linear in enumerate(linears)
        )
        for name, wanted in (("gate_up_proj", torch.cat([gate, up])), ("down_proj", down)):
            delta = adapter.modules[f"model.layers.1.mlp.experts.{name}"]
            assert delta.a is not None
            assert delta.b is not None
            got = delta.scaling * delta.b[expert] @ delta.a[expert]
            assert torch.allclose(got, wanted, atol=1e-5)


def test_what_peft_drops_is_kept(tmp_path: Path) -> None:
    """PEFT takes gate_proj for that of the experts only; the shared expert's is in the file."""
    name = "model.layers.0.mlp.shared_expert.gate_proj"
    info = description("qwen2_moe").modules[name]
    values = {
        f"base_model.model.{name}.lora_A.weight": torch.ones(2, info.in_features),
        f"base_model.model.{name}.lora_B.weight": torch.ones(info.out_features, 2),
    }
    config = {"peft_type": "LORA", "r": 2, "target_modules": [name]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(values, tmp_path / "adapter_model.safetensors")
    assert list(stored(tmp_path, description("qwen2_moe")).modules) == [name]
