"""Adapters of the linears of experts, read as changes of the parameters that these became."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.small_adapters import config, write
from tests.unit.peft.test_parameters import (
    DOWN,
    EXPERTS,
    INNER,
    NUM_EXPERTS,
    PREFIX,
    ROUTER,
    UP,
    WIDTH,
    factors,
    mixture,
)

from lorax_shard.lora.delta import HostAdapter, ModuleDelta
from lorax_shard.peft.base import BaseDescription
from lorax_shard.peft.errors import AdapterRefusedError
from lorax_shard.peft.files import AdapterLimits
from lorax_shard.peft.read import read_adapter

OLD = "model.layers.0.block_sparse_moe"
Tensors = dict[str, torch.Tensor]
SIZES = {"w1": (WIDTH, INNER), "w3": (WIDTH, INNER), "w2": (INNER, WIDTH)}
TARGETS = {"target_modules": ["w1", "w2", "w3"]}


def base(*, is_interleaved: bool = False) -> BaseDescription:
    """Return the made-up mixture with the names that Mixtral had."""
    found = mixture()
    older = {
        UP: (f"{OLD}.experts.*.w1", f"{OLD}.experts.*.w3"),
        DOWN: (f"{OLD}.experts.*.w2",),
        ROUTER: (f"{OLD}.gate",),
    }
    modules = {
        name: dataclasses.replace(
            info, older=older.get(name, ()), is_interleaved=is_interleaved and name == UP
        )
        for name, info in found.modules.items()
    }
    return dataclasses.replace(found, modules=modules)


def export(ranks: dict[tuple[int, str], int] | None = None) -> Tensors:
    """Return random factors of every linear of every expert; of the given rank, or 2."""
    generator = torch.Generator().manual_seed(5)
    values = {}
    for expert in range(NUM_EXPERTS):
        for linear, (width_in, width_out) in SIZES.items():
            rank = (ranks or {}).get((expert, linear), 2)
            key = f"{PREFIX}{OLD}.experts.{expert}.{linear}.lora_"
            values[f"{key}A.weight"] = torch.randn(rank, width_in, generator=generator)
            values[f"{key}B.weight"] = torch.randn(width_out, rank, generator=generator)
    return values


def read(folder: Path, options: dict[str, Any], values: Tensors, **kind: bool) -> HostAdapter:
    folder = write(folder, config(**options), values)
    return read_adapter(folder, base(**kind), AdapterLimits())


def refusal(folder: Path, options: dict[str, Any], values: Tensors) -> str:
    with pytest.raises(AdapterRefusedError) as caught:
        read(folder, options, values)
    return caught.value.public


def change(values: Tensors, expert: int, linear: str, scaling: float = 2.0) -> torch.Tensor:
    """Return scaling B A of one linear; zeros if it is not there."""
    key = f"{PREFIX}{OLD}.experts.{expert}.{linear}.lora_"
    if f"{key}A.weight" not in values:
        return torch.zeros(SIZES[linear][::-1])
    return scaling * values[f"{key}B.weight"] @ values[f"{key}A.weight"]


def product(delta: ModuleDelta, expert: int) -> torch.Tensor:
    assert delta.a is not None
    assert delta.b is not None
    return delta.scaling * delta.b[expert].float() @ delta.a[expert].float()


def check(adapter: HostAdapter, values: Tensors, scalings: dict[tuple[int, str], float]) -> None:
    for expert in range(NUM_EXPERTS):
        gate, up, down = (
            change(values, expert, linear, scalings.get((expert, linear), 2.0))
            for linear in ("w1", "w3", "w2")
        )
        both = torch.cat([gate, up])
        assert torch.allclose(product(adapter.modules[UP], expert), both, atol=1e-5)
        assert torch.allclose(product(adapter.modules[DOWN], expert), down, atol=1e-5)


def test_linears_of_experts_become_parameters(tmp_path: Path) -> None:
    values = export()
    adapter = read(tmp_path, TARGETS, values)
    assert set(adapter.modules) == {UP, DOWN}
    assert [adapter.modules[name].rank for name in (UP, DOWN)] == [4, 2]
    assert {delta.scaling for delta in adapter.modules.values()} == {2.0}
    check(adapter, values, {})
    # Gate's ranks reach no output of up.
    b = adapter.modules[UP].b
    assert b is not None
    assert not b[:, INNER:, :2].any()
    assert not b[:, :INNER, 2:].any()


def test_outputs_in_turns(tmp_path: Path) -> None:
    values = export()
    delta = read(tmp_path, TARGETS, values, is_interleaved=True).modules[UP]
    for expert in range(NUM_EXPERTS):
        got = product(delta, expert)
        assert torch.allclose(got[0::2], change(values, expert, "w1"), atol=1e-5)
        assert torch.allclose(got[1::2], change(values, expert, "w3"), atol=1e-5)


def test_types_of_the_file_are_kept(tmp_path: Path) -> None:
    values = {key: each.bfloat16() for key, each in export().items()}
    delta = read(tmp_path, TARGETS, values).modules[UP]
    assert delta.a is not None
    assert delta.b is not None
    assert (delta.a.dtype, delta.b.dtype) == (torch.bfloat16, torch.bfloat16)


def test_ranks_and_scalings_of_their_own(tmp_path: Path) -> None:
    ranks = {(0, "w1"): 3, (2, "w3"): 1, (1, "w2"): 4}
    values = {key: each.half() for key, each in export(ranks).items()}
    options = TARGETS | {
        "rank_pattern": {r"experts\.0\.w1": 3, r"experts\.2\.w3": 1, r"1\.w2": 4},
        "alpha_pattern": {r"experts\.2\.w2": 1, r"0\.w1": 7},
    }
    adapter = read(tmp_path, options, values)
    assert [adapter.modules[name].rank for name in (UP, DOWN)] == [3 + 2, 4]
    up = adapter.modules[UP]
    assert up.a is not None
    assert up.b is not None
    assert (up.a.dtype, up.b.dtype, up.scaling) == (torch.float16, torch.float32, 1.0)
    scalings = {(0, "w1"): 7 / 3, (2, "w3"): 4.0, (1, "w2"): 1.0, (2, "w2"): 0.5}
    check(adapter, {key: each.float() for key, each in values.items()}, scalings)


def test_rslora_divides_by_the_root_of_each_linear(tmp_path: Path) -> None:
    values = export()
    adapter = read(tmp_path, TARGETS | {"use_rslora": True}, values)
    every = [(expert, linear) for expert in range(NUM_EXPERTS) for linear in SIZES]
    check(adapter, values, dict.fromkeys(every, 4 / math.sqrt(2)))


def test_experts_that_are_not_there_get_nothing(tmp_path: Path) -> None:
    values = {key: each for key, each in export().items() if ".experts.1." not in key}
    values = {key: each for key, each in values.items() if ".2.w1" not in key}
    check(read(tmp_path, TARGETS, values), values, {})


def test_routers_were_linears(tmp_path: Path) -> None:
    for name in (f"{OLD}.gate", ROUTER):
        values = factors(name, WIDTH, NUM_EXPERTS)
        options = {"target_modules": "all-linear", "exclude_modules": ".*attn.*"}
        adapter = read(tmp_path / name, options, export() | values)
        assert set(adapter.modules) == {UP, DOWN, ROUTER}
        assert torch.equal(adapter.modules[ROUTER].a, values[f"{PREFIX}{name}.lora_A.weight"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "values", "text"),
    [
        (TARGETS, {k.replace("experts.2", "experts.3"): v for k, v in export().items()},
         f"weights for {OLD}.experts.3.w1, and this server's base model has 3 experts there"),
        (TARGETS, {k: v for k, v in export().items() if "1.w3.lora_B" not in k},
         f"asks for: {OLD}.experts.1.w3 (b)"),
        ({"target_modules": ["w1", "w3"]}, export(), "does not ask for: base_model.model.model.lay"),
        (TARGETS, export({(1, "w2"): 3}), "experts.1.w2.lora_A.weight has the rank 3; adapter_conf"),
        (TARGETS, {k.replace("block_sparse_moe", "mlp"): v for k, v in export().items()},
         "names nothing in this server's base model"),
        (TARGETS | {"target_modules": ["w1", "q_proj"]},
         {k.replace("block_sparse_moe", "mlp"): v for k, v in export().items()},
         "parts of MoE experts that adapter_config.json does not name, or that"),
        (TARGETS | {"use_dora": True}, export(), f"({OLD}.experts.0.w1 and 8 more) with use_dora"),
        (TARGETS | {"lora_bias": True}, export(), "with lora_bias, which PEFT does not compute"),
        (TARGETS | {"alora_invocation_tokens": [3]}, export(), "with alora_invocation_tokens"),
        ({"target_modules": ["w1", "w3"], "modules_to_save": ["0.w2"]},
         {k: v for k, v in export().items() if ".w2." not in k}
         | {f"{PREFIX}{OLD}.experts.0.w2.lora_A.weight": torch.ones(2, INNER)},
         f"weights are missing that adapter_config.json asks for: {OLD}.experts.0.w2 (weight)"),
        (TARGETS | {"target_parameters": ["down_proj"]},
         export() | factors(EXPERTS, INNER, WIDTH, 2 * NUM_EXPERTS),
         f"it changes {DOWN} as a parameter, and the linears of its experts too"),
    ],
)  # fmt: skip
def test_refusals(options: dict[str, Any], values: Tensors, text: str, tmp_path: Path) -> None:
    assert text in refusal(tmp_path, options, values)


def test_a_linear_that_is_replaced_is_refused(tmp_path: Path) -> None:
    options = {"target_modules": ["w1", "w3"], "modules_to_save": ["0.w2"]}
    values = {key: each for key, each in export().items() if ".w2." not in key}
    values[f"{PREFIX}{OLD}.experts.0.w2.weight"] = torch.ones(WIDTH, INNER)
    assert f"more than A and B for {OLD}.experts.0.w2" in refusal(tmp_path, options, values)


def test_limits_hold_for_the_ranks_of_both_parts_together(tmp_path: Path) -> None:
    folder = write(tmp_path, config(**TARGETS), export())
    with pytest.raises(AdapterRefusedError, match="have the rank 4 together; the limit is 3"):
        read_adapter(folder, base(), AdapterLimits(max_rank=3))


def test_nan_in_one_expert_is_refused(tmp_path: Path) -> None:
    values = export()
    key = f"{PREFIX}{OLD}.experts.2.w3.lora_B.weight"
    values[key][0, 0] = math.nan
    assert f"weights are NaN or infinite in {key}" in refusal(tmp_path, TARGETS, values)


# --- tensors of all experts -----------------------------------------------------------------


def stacks(names: tuple[str, str, str], *, is_shared: bool = True) -> Tensors:
    """Return factors of all experts; shared are those that see and make what all layers see."""
    generator = torch.Generator().manual_seed(6)
    gate, up, down = names
    few = 1 if is_shared else NUM_EXPERTS
    shapes = {
        f"{gate}.lora_A": (few, 2, WIDTH), f"{gate}.lora_B": (NUM_EXPERTS, INNER, 2),
        f"{up}.lora_A": (few, 2, WIDTH), f"{up}.lora_B": (NUM_EXPERTS, INNER, 2),
        f"{down}.lora_A": (NUM_EXPERTS, 2, INNER), f"{down}.lora_B": (few, WIDTH, 2),
    }  # fmt: skip
    return {
        f"{PREFIX}{EXPERTS}.{name}.weight": torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }


def stack_change(values: Tensors, name: str, expert: int) -> torch.Tensor:
    a, b = (values[f"{PREFIX}{EXPERTS}.{name}.lora_{letter}.weight"] for letter in "AB")
    return 2.0 * b[expert % len(b)] @ a[expert % len(a)]


@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize("names", [("w1", "w3", "w2"), ("gate_proj", "up_proj", "down_proj")])
@pytest.mark.parametrize("targets", ["all-linear", "own", "usual"])
def test_tensors_of_all_experts(
    targets: str, names: tuple[str, str, str], is_shared: bool, tmp_path: Path
) -> None:
    lists = {"own": list(names), "usual": ["gate_proj", "up_proj", "down_proj"]}
    values = stacks(names, is_shared=is_shared)
    options = {"target_modules": lists.get(targets, targets)}
    if targets == "all-linear":
        options["exclude_modules"] = ".*attn.*"
    adapter = read(tmp_path, options, values)
    assert set(adapter.modules) == {UP, DOWN}
    for expert in range(NUM_EXPERTS):
        gate, up, down = (stack_change(values, name, expert) for name in names)
        both = torch.cat([gate, up])
        assert torch.allclose(product(adapter.modules[UP], expert), both, atol=1e-5)
        assert torch.allclose(product(adapter.modules[DOWN], expert), down, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        (
            (2, WIDTH),
            "has the shape [2, 6]; A and B of all experts must have three dimensions, the",
        ),
        ((2, 2, WIDTH), "the first of them 3, or 1 where experts share it"),
        ((3, 2, WIDTH + 1), "has the shape [2, 7], where [2, 6] fits"),
        ((3, 5, WIDTH), "has the rank 5; adapter_config.json says 2"),
    ],
)
def test_tensors_of_all_experts_that_do_not_fit(
    shape: tuple[int, ...], text: str, tmp_path: Path
) -> None:
    values = stacks(("w1", "w3", "w2"))
    values[f"{PREFIX}{EXPERTS}.w1.lora_A.weight"] = torch.ones(shape)
    assert text in refusal(tmp_path, {"target_modules": ["w1", "w2", "w3"]}, values)
