"""What of the families is refused, and in which words: whole models, and parts of adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from tests.helpers.tiny_models import make_tiny_model, tiny_config

from lorax_contract.config import ShardConfig
from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_shard.model.describe import describe
from lorax_shard.model.families import TESTED_FAMILIES, refusal
from lorax_shard.model.loader import load_paged_model
from lorax_shard.peft.base import BaseDescription
from lorax_shard.peft.config import parse_config
from lorax_shard.peft.errors import AdapterRefusedError
from lorax_shard.peft.files import AdapterLimits
from lorax_shard.peft.read import read_adapter
from lorax_shard.peft.targets import select

_INTERFACE = "does not use transformers' attention interface"
_STATE = "keep a recurrent state"


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("bloom", _INTERFACE),
        ("mpt", _INTERFACE),
        ("falcon", _INTERFACE),
        ("falcon_h1", _STATE),
        ("jamba", _STATE),
        ("mamba", _STATE),
        ("recurrent_gemma", _STATE),
    ],
)
def test_a_class_shows_that_it_cannot_be_served(family: str, reason: str) -> None:
    found = refusal(tiny_config(family))
    assert found is not None
    assert reason in found


@pytest.mark.parametrize("name", ["RoFormer", "Longformer"])
def test_an_encoder_with_an_attention_of_its_own_is_refused(name: str) -> None:
    found = refusal(getattr(transformers, f"{name}Config")())
    assert found == f"the attention of {name}Model {_INTERFACE}"


@pytest.mark.parametrize("family", sorted(TESTED_FAMILIES))
def test_no_tested_family_is_refused(family: str) -> None:
    assert refusal(tiny_config(family)) is None


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("bloom", _INTERFACE),
        ("mpt", _INTERFACE),
        ("falcon", _INTERFACE),
        ("stablelm", "passes no arguments on to StableLmAttention"),
        ("falcon_h1", _STATE),
        ("jamba", _STATE),
        ("mamba", _STATE),
        ("recurrent_gemma", _STATE),
    ],
)
def test_model_is_refused_at_load(family: str, reason: str, tmp_path: Path) -> None:
    path = make_tiny_model(family, tmp_path / "m")
    with pytest.raises(StartupError) as caught:
        load_paged_model(
            ShardConfig(
                model_dir=str(path),
                model_id="tiny",
                shard_uris=["unix:///none"],
                attention_backend="sdpa",
                linear_backend="torch",
            )
        )
    assert caught.value.exit_code is ExitCode.MODEL_UNSUPPORTED
    assert reason in str(caught.value)


def base_of(family: str) -> BaseDescription:
    with torch.device("meta"):
        model: Any = transformers.AutoModelForCausalLM.from_config(tiny_config(family))
    return describe(model)


@pytest.mark.parametrize(
    ("family", "targets", "reason"),
    [
        ("mixtral", ["q_proj", "gate"], "layers.0.mlp.gate, a MixtralTopKRouter; only linears"),
        ("qwen3_moe", ["gate"], "mlp.gate, a Qwen3MoeTopKRouter; only linears"),
        ("gpt_oss", ["router"], "mlp.router, a GptOssTopKRouter; only linears"),
        ("llama4_text", ["router"], "feed_forward.router, a Llama4Router; only linears"),
        ("deepseek_v2", ["gate"], "mlp.gate, a DeepseekV2TopkRouter; only linears"),
        ("mixtral", ["experts"], "mlp.experts, a part of MoE experts; only linears"),
        ("gpt_oss", ["q_proj", "experts"], "mlp.experts, a part of MoE experts"),
        ("mixtral", ["w1", "w2", "w3"], "names nothing in this server's base model"),
        ("phi3", ["q_proj", "k_proj"], "names nothing in this server's base model"),
        ("gpt_neox", ["q_proj"], "names nothing in this server's base model"),
        ("opt", ["embed_positions"], "embed_positions, a OPTLearnedPositionalEmbedding; only"),
        ("llama", ["input_layernorm"], "input_layernorm, a LlamaRMSNorm; only linears"),
    ],
)
def test_targets_that_no_adapter_can_have(family: str, targets: list[str], reason: str) -> None:
    document = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": targets}
    with pytest.raises(AdapterRefusedError) as caught:
        select(parse_config(json.dumps(document)), base_of(family))
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("family", "expert", "sizes", "parameter"),
    [
        ("mixtral", "block_sparse_moe.experts.2.w1", (48, 80), "gate_up_proj"),
        ("qwen3_moe", "mlp.experts.0.down_proj", (40, 48), "down_proj"),
        ("deepseek_v2", "mlp.experts.3.up_proj", (48, 40), "gate_up_proj"),
    ],
)
def test_one_expert_alone_is_adapted(
    family: str, expert: str, sizes: tuple[int, int], parameter: str, tmp_path: Path
) -> None:
    own = expert.rpartition(".")[2]
    base = base_of(family)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["o_proj", own]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    places = {
        name: (info.in_features, info.out_features)
        for name, info in base.modules.items()
        if name.endswith((".o_proj", f".{own}")) and not info.is_parameter
    }
    tensors = {}
    for name, (width, height) in {**places, f"model.layers.1.{expert}": sizes}.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.ones(4, width)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.ones(height, 4)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    modules = read_adapter(tmp_path, base, AdapterLimits()).modules
    changed = f"model.layers.1.mlp.experts.{parameter}"
    assert set(modules) == {*places, changed}
    b = modules[changed].b
    assert b is not None
    assert [bool(each.any()) for each in b] == [f".{number}." in expert for number in range(4)]


@pytest.mark.parametrize(
    ("family", "targets", "names"),
    [
        ("phi3", ["qkv_proj", "gate_up_proj"], {"self_attn.qkv_proj", "mlp.gate_up_proj"}),
        ("gpt_neox", ["query_key_value"], {"attention.query_key_value"}),
        ("gpt_bigcode", ["c_attn"], {"attn.c_attn"}),
        ("gpt2", ["c_attn", "c_proj"], {"attn.c_attn", "attn.c_proj", "mlp.c_proj"}),
        (
            "llama4_text",
            ["q_proj", "down_proj"],
            {"self_attn.q_proj", "feed_forward.shared_expert.down_proj"},
        ),
        ("deepseek_v2", ["kv_b_proj", "q_a_proj"], {"self_attn.kv_b_proj", "self_attn.q_a_proj"}),
        ("mixtral", ["q_proj", "v_proj"], {"self_attn.q_proj", "self_attn.v_proj"}),
    ],
)
def test_targets_of_fused_and_expert_families(
    family: str, targets: list[str], names: set[str]
) -> None:
    document = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": targets}
    base = base_of(family)
    chosen = select(parse_config(json.dumps(document)), base).low_rank
    layers = {name.rpartition(".1.")[2] for name in chosen if ".1." in name}
    assert layers == names
    kinds = {base.modules[name].kind for name in chosen}
    assert kinds == ({"conv1d"} if family == "gpt2" else {"linear"})
