"""Every parameter that PEFT could adapt, in every family of transformers, is computed or refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.helpers.peft_folders import quiet
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lorax_shard.model.describe import describe
from lorax_shard.peft.base import BaseDescription
from lorax_shard.peft.config import parse_config
from lorax_shard.peft.errors import AdapterRefusedError
from lorax_shard.peft.targets import select

COMPUTED = {"experts", "router", "linear", "embedding", "conv1d"}
# Stacks of matrices that only these families compute with, each in its own way.
REFUSED_STACKS = {"LongcatFlashExperts", "InklingSharedExperts", "JetMoeParallelExperts"}
# What older releases called the experts of the families that PEFT was used with.
OLDER = {
    "mixtral": "model.layers.0.block_sparse_moe.experts.*.w1",
    "minimax_m2": "model.layers.0.block_sparse_moe.experts.*.w1",
    "olmoe": "model.layers.0.mlp.experts.*.gate_proj",
    "qwen2_moe": "model.layers.0.mlp.experts.*.gate_proj",
    "qwen3_moe": "model.layers.0.mlp.experts.*.gate_proj",
    "deepseek_v3": "model.layers.3.mlp.experts.*.gate_proj",
    "glm4_moe": "model.layers.1.mlp.experts.*.gate_proj",
}
# Values without which the defaults of a family make no model.
GIVEN: dict[str, dict[str, Any]] = {
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "reformer": {"is_decoder": True},
}
# Those that this release cannot make of any configuration of text alone.
NOT_BUILT = {
    "cohere_compass_text", "dbrx", "gemma3n", "gemma4_assistant", "musicgen", "musicgen_melody",
}  # fmt: skip


def build(family: str) -> nn.Module | None:
    """Return a model of the family's own sizes without memory, of few layers where it can be."""
    for layers in (4, 2, 0):
        try:
            config = CONFIG_MAPPING[family](**GIVEN.get(family, {}))
            text = config.get_text_config()
            if layers:
                text.num_hidden_layers = layers
                if getattr(text, "layer_types", None):
                    text.layer_types = text.layer_types[:layers]
            with quiet(), torch.device("meta"):
                model: nn.Module = AutoModelForCausalLM.from_config(config)
        except Exception:
            continue
        return model
    return None


def kinds_of_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield one parameter of each class, name and number of dimensions, and its module."""
    seen = set()
    for name, parameter in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        kind = (type(module), name.rpartition(".")[2], parameter.dim())
        # A parameter of the whole model cannot be wrapped by PEFT.
        if kind not in seen and "." in name:
            seen.add(kind)
            yield name, module


def treatment(base: BaseDescription, parameter: str) -> str:
    """Return what becomes of a parameter: what it is computed as, or the sentence that refuses it."""
    given: dict[str, Any] = {"peft_type": "LORA", "target_parameters": [parameter]}
    try:
        selection = select(parse_config(json.dumps(given)), base)
    except AdapterRefusedError as error:
        return error.public
    (name,) = selection.low_rank
    assert name in (parameter, parameter.removesuffix(".weight"))
    return base.modules[name].kind


@pytest.mark.parametrize("family", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_every_parameter_is_computed_or_refused_by_name(family: str) -> None:
    model = build(family)
    if model is None:
        assert family in NOT_BUILT
        pytest.skip("its configuration has no defaults that fit together")
    base = BaseDescription.from_json(describe(model).to_json())
    for name, module in kinds_of_parameters(model):
        found, parameter = treatment(base, name), model.get_parameter(name)
        if found in COMPUTED:
            info = base.modules.get(name) or base.modules[name.removesuffix(".weight")]
            assert sorted(parameter.shape) == sorted(
                size for size in (info.num_experts * (found == "experts"), info.in_features,
                                  info.out_features) if size
            )  # fmt: skip
            continue
        assert f"target_parameters names {name}, a parameter of " in found
        assert type(module) not in (nn.Linear, nn.Embedding) or parameter.dim() == 1
        is_stack = parameter.dim() == 3 and re.search("Experts$", type(module).__name__)
        assert not is_stack or type(module).__name__ in REFUSED_STACKS
        assert not type(module).__name__.endswith("Router") or parameter.dim() == 1


@pytest.mark.parametrize("family", OLDER)
def test_older_names_are_those_of_checkpoints(family: str) -> None:
    model = build(family)
    assert model is not None
    infos = [info for info in describe(model).modules.values() if info.kind == "experts"]
    assert infos[0].older[0] == OLDER[family]
    assert [len(info.older) for info in infos[:2]] == [2, 1]
