"""What ``target_parameters`` means in a made-up mixture, and what is refused there."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.small_adapters import EMBEDDING, NORM, QUERY, config, make_base, write

from lorax_shard.lora.arena import stack
from lorax_shard.lora.delta import HostAdapter
from lorax_shard.peft.base import BaseDescription, ModuleInfo
from lorax_shard.peft.config import parse_config
from lorax_shard.peft.context import make_context
from lorax_shard.peft.errors import AdapterRefusedError
from lorax_shard.peft.files import AdapterLimits
from lorax_shard.peft.normal import read_normal
from lorax_shard.peft.read import examine, read_adapter
from lorax_shard.peft.targets import LowRank, select
from lorax_shard.peft.verify import verify

NUM_EXPERTS, WIDTH, INNER, RANK = 3, 6, 5, 2
EXPERTS, ROUTER = "model.layers.0.mlp.experts", "model.layers.0.mlp.gate"
UP, DOWN = f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"
PREFIX = "base_model.model."
BOTH = {"target_modules": None, "target_parameters": ["gate_up_proj", "down_proj"]}


def mixture(*, is_swapped: bool = False) -> BaseDescription:
    """Return the made-up model with a mixture of experts in its first layer."""

    def stack(width_in: int, width_out: int) -> ModuleInfo:
        return ModuleInfo(
            kind="experts", type_name="parameter of ToyExperts", in_features=width_in,
            out_features=width_out, num_experts=NUM_EXPERTS, is_swapped=is_swapped,
        )  # fmt: skip

    base = make_base()
    bias = ModuleInfo(kind="parameter", type_name="parameter of ToyExperts with 2 dimensions")
    modules = {
        EXPERTS: ModuleInfo(kind="other", type_name="ToyExperts"),
        UP: stack(WIDTH, 2 * INNER),
        f"{UP}_bias": bias,
        DOWN: stack(INNER, WIDTH),
        ROUTER: ModuleInfo(
            kind="router", type_name="ToyRouter", in_features=WIDTH, out_features=NUM_EXPERTS,
            has_bias=True,
        ),
    }  # fmt: skip
    return dataclasses.replace(base, modules={**base.modules, **modules})


def factors(name: str, width_in: int, width_out: int, rank: int = RANK) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(width_in)
    return {
        f"{PREFIX}{name}.lora_A.weight": torch.randn(rank, width_in, generator=generator),
        f"{PREFIX}{name}.lora_B.weight": torch.randn(width_out, rank, generator=generator),
    }


def both(rank: int = RANK) -> dict[str, torch.Tensor]:
    """Return what PEFT saves for both parameters: the last of the module is outermost."""
    up = factors(f"{EXPERTS}.base_layer", WIDTH, 2 * INNER, rank * NUM_EXPERTS)
    return up | factors(EXPERTS, INNER, WIDTH, rank * NUM_EXPERTS)


def read(folder: Path, options: dict[str, Any], values: dict[str, torch.Tensor]) -> HostAdapter:
    return read_adapter(write(folder, config(**options), values), mixture(), AdapterLimits())


def refusal(folder: Path, options: dict[str, Any], values: dict[str, torch.Tensor]) -> str:
    with pytest.raises(AdapterRefusedError) as caught:
        read(folder, options, values)
    return caught.value.public


def chosen(**options: Any) -> dict[str, LowRank]:
    return dict(select(parse_config(json.dumps(config(**options))), mixture()).low_rank)


def test_each_expert_gets_its_own_factors(tmp_path: Path) -> None:
    values = both()
    adapter = read(tmp_path, BOTH, values)
    assert list(adapter.modules) == [UP, DOWN]
    for name, key in ((UP, f"{EXPERTS}.base_layer"), (DOWN, EXPERTS)):
        delta = adapter.modules[name]
        a, b = (values[f"{PREFIX}{key}.lora_{letter}.weight"] for letter in "AB")
        assert delta.a is not None
        assert delta.b is not None
        assert delta.a.is_contiguous()
        assert delta.b.is_contiguous()
        assert (delta.rank, delta.scaling) == (RANK, 2.0)
        for expert in range(NUM_EXPERTS):
            # A's rows lie expert by expert, B's columns rank by rank.
            assert torch.equal(delta.a[expert], a[expert * RANK : (expert + 1) * RANK])
            assert torch.equal(delta.b[expert], b[:, expert::NUM_EXPERTS])


def test_one_parameter_alone_is_not_nested(tmp_path: Path) -> None:
    for number, (name, sizes) in enumerate({UP: (WIDTH, 2 * INNER), DOWN: (INNER, WIDTH)}.items()):
        values = factors(EXPERTS, *sizes, RANK * NUM_EXPERTS)
        options = {"target_modules": [], "target_parameters": [name.rpartition(".")[2]]}
        assert list(read(tmp_path / str(number), options, values).modules) == [name]


def test_swapped_experts_have_their_factors_in_exchanged_roles(tmp_path: Path) -> None:
    values = factors(EXPERTS, WIDTH, INNER, RANK * NUM_EXPERTS)
    options = {"target_modules": None, "target_parameters": ["experts.down_proj"]}
    folder = write(tmp_path, config(**options), values)
    delta = read_adapter(folder, mixture(is_swapped=True), AdapterLimits()).modules[DOWN]
    assert delta.a is not None
    assert delta.b is not None
    a, b = (values[f"{PREFIX}{EXPERTS}.lora_{letter}.weight"] for letter in "AB")
    assert torch.equal(delta.a[1], b[:, 1::NUM_EXPERTS].T)
    assert torch.equal(delta.b[1], a[RANK : 2 * RANK].T)


def test_ranks_and_scalings_go_by_the_name_of_the_parameter() -> None:
    found = chosen(
        target_modules=["o_proj"],
        target_parameters=["gate_up_proj", "gate.weight", "q_proj.weight"],
        rank_pattern={"gate_up_proj": 3, "gate.weight": 1, "q_proj": 7},
        alpha_pattern={r".*experts\.gate_up_proj": 6},
    )
    assert found[UP] == LowRank(3, 2.0, of_parameter=True)
    assert found[ROUTER] == LowRank(1, 4.0, of_parameter=True)
    # The pattern is for a module's name, and this is a parameter's.
    assert found[QUERY] == LowRank(RANK, 2.0, of_parameter=True)
    assert found["model.layers.0.attn.o_proj"] == LowRank(RANK, 2.0)
    assert len(found) == 6


def test_options_that_choose_modules_do_not_choose_parameters() -> None:
    found = chosen(
        target_modules=["o_proj"], target_parameters=["q_proj.weight"], layers_to_transform=[0],
        exclude_modules=["q_proj"],
    )  # fmt: skip
    assert set(found) == {
        "model.layers.0.attn.o_proj", "model.layers.0.attn.q_proj", "model.layers.1.attn.q_proj",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"target_parameters": ["gate_up_proj_bias"]},
         f"target_parameters names {UP}_bias, a parameter of ToyExperts with 2 dimensions; only the"),
        ({"target_parameters": ["norm.weight"]},
         f"names {NORM}.weight, a parameter of LayerNorm with one dimension"),
        ({"target_parameters": ["norm.bias"]}, f"names {NORM}.bias, a parameter of LayerNorm"),
        ({"target_parameters": ["gate.bias"]}, f"names {ROUTER}.bias, a parameter of ToyRouter"),
        ({"target_parameters": ["q_proj.bias"]}, "q_proj.bias, a parameter of Linear with one dim"),
        ({"target_parameters": ["q_proj.weight"], "target_modules": ["q_proj"]},
         f"{QUERY}, model.layers.1.attn.q_proj is named by target_modules and by target_parameters"),
        ({"target_parameters": ["down_proj"], "use_dora": True},
         "target_parameters and use_dora exclude each other in PEFT"),
        ({"target_parameters": ["down_proj"], "lora_bias": True}, "target_parameters and lora_bias"),
        ({"target_parameters": ["down_proj"], "alora_invocation_tokens": [3]},
         "target_parameters and alora_invocation_tokens exclude"),
        ({"target_parameters": ["w1"], "target_modules": None},
         "target_parameters ('w1',) names nothing in this server's base model (ToyForCausalLM)"),
        ({"target_parameters": "down_proj"}, "must be a list of at most 20,000 names"),
        ({"target_parameters": [], "target_modules": None}, "target_modules is missing"),
        ({"target_modules": ["gate"]}, f"target_modules names {ROUTER}, a ToyRouter; only"),
        ({"target_modules": ["down_proj"]}, "target_modules ('down_proj',) names nothing"),
        ({"target_parameters": ["embed_tokens.weight"], "trainable_token_indices": [1]},
         f"{EMBEDDING} has LoRA and is in trainable_token_indices too"),
    ],
)  # fmt: skip
def test_refusals(options: dict[str, Any], text: str) -> None:
    with pytest.raises(AdapterRefusedError) as caught:
        chosen(**options)
    assert text in caught.value.public


def test_parameters_are_no_modules_to_save() -> None:
    options = parse_config(json.dumps(config(modules_to_save=["down_proj", "norm"])))
    selection = select(options, mixture())
    assert list(selection.saved) == [NORM]
    assert selection.warnings == (
        "modules_to_save has entries that fit nothing in this base model: down_proj",
    )


def test_what_fits_nothing_is_a_warning() -> None:
    given = config(target_modules=["w1"], target_parameters=["down_proj", "experts.w2"])
    assert select(parse_config(json.dumps(given)), mixture()).warnings == (
        "target_modules names nothing in this base model",
        "target_parameters has entries that fit nothing in this base model: experts.w2",
    )


@pytest.mark.parametrize(
    ("options", "values", "text"),
    [
        (BOTH, factors(EXPERTS, INNER, WIDTH, 6), f"asks for: {UP} (a), {UP} (b)"),
        (BOTH, both(rank=3), f"lora_A.weight has the rank 3; adapter_config.json says 2 for {DOWN}"),
        (BOTH, factors(f"{EXPERTS}.base_layer", WIDTH, 2 * INNER, 8) | factors(EXPERTS, INNER, WIDTH, 8),
         "has the shape [8, 5], where [6, 5] fits"),
        (BOTH, factors(f"{EXPERTS}.base_layer", INNER, WIDTH, 6) | factors(EXPERTS, WIDTH, 2 * INNER, 6),
         "has the shape [6, 6], where [6, 5] fits"),
        (BOTH, factors(f"{EXPERTS}.base_layer", 2 * INNER, WIDTH, 6) | factors(EXPERTS, WIDTH, INNER, 6),
         "experts.lora_A.weight is laid out as earlier releases of PEFT did it"),
        ({"target_parameters": ["down_proj"]}, both(), "parts of MoE experts that adapter_config"),
        ({"target_parameters": ["gate.weight"], "target_modules": None, "bias": "lora_only"},
         factors(ROUTER, WIDTH, NUM_EXPERTS) | {f"{PREFIX}{ROUTER}.base_layer.bias": torch.ones(3)},
         f"it brings more than A and B for {ROUTER}; of experts and routers only"),
        ({"target_parameters": ["gate.weight"], "target_modules": None},
         factors(ROUTER, WIDTH, NUM_EXPERTS) | {f"{PREFIX}{ROUTER}.base_layer.weight": torch.ones(3, 6)},
         f"it brings more than A and B for {ROUTER}"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(
    options: dict[str, Any], values: dict[str, torch.Tensor], text: str, tmp_path: Path
) -> None:
    assert text in refusal(tmp_path, options, values)


def test_limits_on_ranks_hold_for_experts(tmp_path: Path) -> None:
    folder = write(tmp_path, config(**BOTH), both())
    with pytest.raises(AdapterRefusedError, match="gate_up_proj has the rank 2; the limit is 1"):
        read_adapter(folder, mixture(), AdapterLimits(max_rank=1))


def verified(folder: Path) -> dict[str, Any]:
    (folder / "normal").mkdir()
    return verify(folder, folder / "normal", make_context(mixture(), AdapterLimits()))


def test_factors_of_experts_stay_where_they_are(tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", config(**BOTH), both())
    delta = examine(folder, mixture(), AdapterLimits()).adapter.modules[DOWN]
    assert delta.b is not None
    assert not delta.b.is_contiguous()

    facts = verified(folder)
    assert (facts["max_rank"], facts["num_modules"]) == (RANK, 2)
    assert [path.name for path in (folder / "normal").iterdir()] == ["adapter.json"]


def test_the_normal_form_of_experts_is_what_was_read(tmp_path: Path) -> None:
    folder = write(tmp_path, config(**BOTH), both())
    verified(folder)
    again, adapter = (
        read_normal(folder / "normal"),
        read_adapter(folder, mixture(), AdapterLimits()),
    )
    assert again.digest == adapter.digest
    for name, delta in adapter.modules.items():
        stored = again.modules[name]
        for part in ("a", "b"):
            assert torch.equal(getattr(stored, part), getattr(delta, part))
        # As steps read them: nobody copies them again.
        assert stored.a is not None
        assert stored.b is not None
        assert stack(stored.a, stored.b.mT, torch.float32).data_ptr() == stored.a.data_ptr()


@pytest.mark.parametrize("what", ["order", "shape", "value"])
def test_views_of_damaged_documents_are_refused(what: str, tmp_path: Path) -> None:
    folder = write(tmp_path, config(**BOTH), both())
    verified(folder)
    path = folder / "normal/adapter.json"
    changes = {
        "order": ('"order": [1, 2, 0]', '"order": [1, 1, 0]'),
        "shape": (f'"shape": [{WIDTH}, {RANK}', f'"shape": [-{WIDTH}, -{RANK}'),
        "value": ('"order": [1, 2, 0]', '"order": [2, 1, 0]'),
    }
    text = path.read_text()
    assert changes[what][0] in text
    path.write_text(text.replace(*changes[what]))
    with pytest.raises(AdapterRefusedError, match="is damaged"):
        read_normal(folder / "normal")
