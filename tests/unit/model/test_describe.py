"""Describing a base model."""

from __future__ import annotations

import pytest
import torch
import transformers
from tests.helpers.small_adapters import make_base
from tests.helpers.tiny_models import tiny_config
from torch import nn

from lorax_shard.model.describe import describe
from lorax_shard.peft.base import BaseDescription, ModuleInfo


def gpt2(*, tied: bool) -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=30, n_embd=8, n_layer=1, n_head=2, tie_word_embeddings=tied
    )
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def test_a_model_on_the_meta_device_is_described() -> None:
    base = describe(gpt2(tied=True))
    assert base.architecture == "GPT2LMHeadModel"
    assert (base.input_embedding, base.output_head) == ("transformer.wte", "lm_head")
    assert base.vocab_size == 30
    assert base.tied_with("lm_head") == ("transformer.wte",)
    assert base.tied_with("transformer.wpe") == ()
    assert base.modules["transformer.h.0.attn.c_attn"] == ModuleInfo(
        kind="conv1d", type_name="Conv1D", in_features=8, out_features=24, has_bias=True
    )
    assert base.modules["transformer.h.0.attn.c_attn"].weight_shape == (8, 24)
    assert base.modules["lm_head"].weight_shape == (30, 8)
    assert base.modules["transformer.ln_f"] == ModuleInfo(
        kind="norm", type_name="LayerNorm", out_features=8, has_bias=True
    )
    assert not base.modules["transformer.h.0"].replaceable
    assert base.weight_digests == {}
    assert describe(gpt2(tied=False)).tied == ()


def test_a_description_survives_the_way_to_another_process() -> None:
    for base in (describe(gpt2(tied=True)), make_base(tied=True)):
        again = BaseDescription.from_json(base.to_json())
        assert again == base
        assert list(again.modules) == list(base.modules)


def test_experts_are_no_linears() -> None:
    model = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(2, 2)])})
    assert describe(model).modules["experts.0"].type_name == "part of MoE experts"


def test_packed_linears_are_refused() -> None:
    class PackedLinear(nn.Module):
        pass

    with pytest.raises(ValueError, match="0 is packed; describe the model before"):
        describe(nn.Sequential(PackedLinear()))


def test_a_damaged_description_is_an_error() -> None:
    text = make_base().to_json().replace('"embedding"', '"embeddinh"')
    with pytest.raises(ValueError, match="'embeddinh' is unknown"):
        BaseDescription.from_json(text)


def test_parameters_of_experts_are_described_by_what_they_compute() -> None:
    for family, is_swapped in (("qwen3_moe", False), ("gpt_oss", False), ("llama4_text", True)):
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(tiny_config(family))
        found = {n: i for n, i in describe(model).modules.items() if i.kind == "experts"}
        up, down, *_ = found.values()
        assert [name.rpartition(".")[2] for name in found][:2] == ["gate_up_proj", "down_proj"]
        assert up.in_features == down.out_features == 48
        assert up.out_features == 2 * down.in_features
        assert up.is_swapped is is_swapped
        routers = [i for i in describe(model).modules.values() if i.kind == "router"]
        assert routers[0].in_features == 48
        assert routers[0].out_features == up.num_experts
