"""Adapters on experts and routers compute what changed weights compute, family by family."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from tests.helpers.tiny_models import tiny_config, widen
from torch import nn

from lorax_shard.lora.delta import HostAdapter, ModuleDelta
from lorax_shard.lora.errors import AdapterMismatchError
from lorax_shard.lora.experts import ExpertsPatch
from lorax_shard.lora.model import LoraModel, install
from lorax_shard.lora.registry import BACKENDS
from lorax_shard.lora.sites import Kind, Site, find_sites

CPU = torch.device("cpu")
FAMILIES = (
    "deepseek_v2", "deepseek_v3", "gpt_oss", "granitemoe", "llama4_text", "mixtral", "olmoe",
    "qwen2_moe", "qwen3_moe",
)  # fmt: skip
IDS = torch.tensor([[5, 40, 3, 381, 7, 7, 120, 64, 9, 17, 200, 33]])
MIXED = (Kind.EXPERTS, Kind.ROUTER)


@pytest.fixture(params=["cpp", "cpu", "torch", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if reason := BACKENDS.probe(name, CPU, torch.float32):
        pytest.skip(reason)
    return name


def make_model(family: str) -> nn.Module:
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32)
    widen(model, 1)
    return model.eval()


def make_delta(site: Site, rank: int, generator: torch.Generator) -> ModuleDelta:
    def numbers(*shape: int) -> torch.Tensor:
        stack = (site.num_experts,) if site.kind is Kind.EXPERTS else ()
        return torch.randn(*stack, *shape, generator=generator) * 0.2

    a, b = numbers(rank, site.in_features), numbers(site.out_features, rank)
    return ModuleDelta(a=a, b=b, scaling=0.7)


def make_adapter(model: nn.Module, rank: int, kinds: Sequence[Kind] = MIXED) -> HostAdapter:
    generator = torch.Generator().manual_seed(rank)
    modules = {
        name: make_delta(site, rank + number % 2, generator)
        for number, (name, site) in enumerate(find_sites(model).items())
        if site.kind in kinds and not site.is_head
    }
    return HostAdapter(digest=f"rank {rank}", modules=modules)


def changed(model: nn.Module, adapter: HostAdapter) -> nn.Module:
    """Return a copy of the model with the adapter's changes in its weights."""
    model, sites = copy.deepcopy(model), find_sites(model)
    with torch.no_grad():
        for name, delta in adapter.modules.items():
            assert delta.a is not None
            assert delta.b is not None
            change = delta.scaling * delta.b @ delta.a
            is_stack = sites[name].kind is Kind.EXPERTS
            weight = model.get_parameter(name if is_stack else f"{name}.weight")
            weight += change.mT if sites[name].is_transposed else change
    return model


@torch.inference_mode()
def logits(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    found: torch.Tensor = model(ids, use_cache=False).logits[0]
    return found


def step_logits(
    model: nn.Module, lora: LoraModel, runs: Sequence[tuple[torch.Tensor, int | None]]
) -> list[torch.Tensor]:
    """Compute each run by itself where attention is concerned, all with one step's slots."""
    found = []
    for ids, slot in runs:
        with lora.step([ids.shape[1]], [slot]):
            found.append(logits(model, ids))
    return found


def first_experts(model: nn.Module) -> Any:
    return next(each for each in model.modules() if type(each).__name__.endswith("Experts"))


def largest(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_and_routers_compute_as_with_changed_weights(family: str, backend: str) -> None:
    model = make_model(family)
    adapters = [make_adapter(model, 3), make_adapter(model, 17, [Kind.EXPERTS])]
    expected = [logits(changed(model, adapter)) for adapter in adapters]
    base = logits(model)
    lora = install(model, backend, CPU, torch.float32)
    for slot, adapter in zip((4, 1), adapters, strict=True):
        lora.load(slot, adapter)
    found = step_logits(model, lora, [(IDS, 4), (IDS, None), (IDS, 1)])
    assert largest(found[0], expected[0]) < 2e-5
    assert torch.equal(found[1], base)
    assert largest(found[2], expected[1]) < 2e-5
    assert min(largest(each, base) for each in expected) > 1e-2
    for slot in (4, 1):
        lora.unload(slot)
    assert all("forward" not in vars(module) for module in model.modules())


@torch.inference_mode()
@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
def test_rows_of_a_step_compute_with_their_own(family: str, backend: str) -> None:
    model = make_model(family)
    adapters = [make_adapter(model, 2), make_adapter(model, 5)]
    of_slot = {None: first_experts(copy.deepcopy(model))}
    of_slot |= {n: first_experts(changed(model, each)) for n, each in enumerate(adapters)}
    lora = install(model, backend, CPU, torch.float32)
    for slot, adapter in enumerate(adapters):
        lora.load(slot, adapter)
    x = torch.randn(9, 48)
    index = torch.stack([torch.randperm(of_slot[None].num_experts)[:2] for _ in range(9)])
    weights = torch.rand(9, 2)
    runs, slots = [2, 3, 1, 3], [0, None, 1, 0]
    with lora.step(runs, slots):
        found = first_experts(model)(x, index, weights)
    parts = zip(slots, x.split(runs), index.split(runs), weights.split(runs), strict=True)
    expected = [of_slot[slot](*inputs) for slot, *inputs in parts]
    assert largest(found, torch.cat(expected)) < 1e-5


def test_what_does_not_fit_is_refused_in_words() -> None:
    model = make_model("qwen3_moe")
    lora = install(model, "torch", CPU, torch.float32)
    whole = make_adapter(model, 2)
    name = next(each for each in whole.modules if each.endswith("down_proj"))
    delta = whole.modules[name]
    assert delta.a is not None
    assert delta.b is not None
    for wrong, told in (
        (replace(delta, a=delta.a[:3]), r"its A of '.*down_proj' is 3 x 2 x 40"),
        (replace(delta, b=delta.b.mT), r"its B of '.*down_proj' is 4 x 2 x 48"),
        (replace(delta, b=None), "only one of A and B"),
        (replace(delta, magnitude=torch.ones(48)), "more than A and B"),
    ):
        with pytest.raises(AdapterMismatchError, match=told):
            lora.load(0, replace(whole, modules={name: wrong}))
        assert lora.slots == {}


def test_experts_that_cannot_be_loaded_leave_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("qwen3_moe")
    lora = install(model, "torch", CPU, torch.float32)
    load, calls = ExpertsPatch.load_part, []

    def failing(self: ExpertsPatch, slot: int, name: str, weights: object) -> None:
        calls.append(name)
        if len(calls) == 3:
            raise MemoryError
        load(self, slot, name, weights)  # type: ignore[arg-type]

    monkeypatch.setattr(ExpertsPatch, "load_part", failing)
    with pytest.raises(MemoryError):
        lora.load(0, make_adapter(model, 2))
    assert lora.slots == {}
    assert all("forward" not in vars(module) for module in model.modules())
    calls.clear()
    monkeypatch.setattr(ExpertsPatch, "load_part", load)
    lora.load(0, make_adapter(model, 2))


@torch.inference_mode()
@pytest.mark.parametrize("name", ["cpp", "triton"])
def test_slots_that_are_read_at_a_replay(name: str) -> None:
    """As graphs hold a step: launches that were made once compute with what stands there then."""
    if reason := BACKENDS.probe(name, CPU, torch.float32):
        pytest.skip(reason)
    model = make_model("qwen3_moe")
    whole = make_adapter(model, 4)
    expected = {0: changed(model, whole), None: copy.deepcopy(model)}
    lora = install(model, name, CPU, torch.float32)
    with lora.fixed(2, 8):
        with lora.fixed_step(torch.full((12,), -1)):
            assert largest(logits(model), logits(expected[None])) < 2e-5
        version = lora.fixed_version
        lora.load(0, whole)
        assert lora.is_fixed(0)
        assert lora.fixed_version == version
        with lora.fixed_step(torch.zeros(12, dtype=torch.int64)):
            assert largest(logits(model), logits(expected[0])) < 2e-5
    lora.load(1, make_adapter(model, 16))
    assert not lora.is_fixed(1)
