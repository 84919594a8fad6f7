"""An adapter merged into the weights computes what PEFT computes beside them, or is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.helpers.expert_rows import OLDER, make_older
from tests.helpers.paged_runner import RELATIVE_TOLERANCE, PagedRunner
from tests.helpers.peft_adapters import peft_model
from tests.helpers.peft_folders import load_adapter, load_model, logits_of, save_adapter
from tests.helpers.tiny_models import make_tiny_model

from lorax_contract.config import ShardConfig
from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_shard.model.loader import load_paged_model
from lorax_shard.model.merged import merge_adapter

IDS = [5, 40, 3, 381, 7, 7, 120, 3]
LINEARS = ["q_proj", "v_proj", "down_proj"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": "all-linear"}),
    "rslora": ("llama", {"target_modules": LINEARS, "use_rslora": True, "lora_alpha": 3}),
    "dora": ("llama", {"target_modules": [*LINEARS, "embed_tokens"], "use_dora": True}),
    "head": ("llama", {"target_modules": [*LINEARS, "lm_head"]}),
    "embedding": ("llama", {"target_modules": [*LINEARS, "embed_tokens"]}),
    "both": ("llama", {"target_modules": ["lm_head", "embed_tokens"]}),
    "rows": ("llama", {"target_modules": LINEARS, "trainable_token_indices": [3, 40]}),
    "saved head": ("llama", {"target_modules": LINEARS, "modules_to_save": ["lm_head", "norm"]}),
    "saved embedding": ("llama", {"target_modules": LINEARS, "modules_to_save": ["embed_tokens"]}),
    "biases": ("qwen2", {"target_modules": ["q_proj"], "bias": "all"}),
    "experts": ("qwen3_moe", {"target_modules": ["q_proj"], "target_parameters": [
        "experts.gate_up_proj", "experts.down_proj", "gate.weight"]}),
    "transposed": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "transposed dora": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "use_dora": True,
                                 "fan_in_fan_out": True, "bias": "lora_only"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Path]:
    """Models by family and by whether head and embedding share their weight."""
    root = tmp_path_factory.mktemp("models")
    return {
        (family, tied): make_tiny_model(family, root / f"{family}{tied}", tie_word_embeddings=tied)
        for family in ("llama", "qwen2", "gpt2", "qwen3_moe")
        for tied in (False, True)
    }


def served_logits(folder: Path, adapter: Path) -> torch.Tensor:
    """Return the logits of a shard that merges the adapter as it loads."""
    config = ShardConfig(
        model_dir=str(folder),
        model_id="tiny",
        shard_uris=["unix:///unused"],
        adapters=False,
        merge_adapter_dir=str(adapter),
    )
    runner = PagedRunner(load_paged_model(config), [IDS], num_blocks=16)
    runner.step({0: len(IDS)})
    return torch.stack([runner.logits[0][at] for at in range(len(IDS))])


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", CASES)
def test_a_merged_model_computes_what_peft_computes(
    models: dict[tuple[str, bool], Path], tmp_path: Path, name: str, tied: bool
) -> None:
    family, options = CASES[name]
    folder = models[family, tied]
    adapter = save_adapter(folder, tmp_path / "adapter", r=3, **options)
    expected = logits_of(load_adapter(folder, adapter), IDS)
    base = logits_of(load_model(folder), IDS)
    scale = expected.abs().max()
    assert (expected - base).abs().max() > 10 * RELATIVE_TOLERANCE * scale
    got = served_logits(folder, adapter)
    assert (got - expected).abs().max() <= RELATIVE_TOLERANCE * scale


def refusal(folder: Path, adapter: Path) -> str:
    with pytest.raises(StartupError) as caught:
        merge_adapter(load_model(folder), adapter)
    assert caught.value.exit_code is ExitCode.ADAPTER_UNUSABLE
    return str(caught.value)


def test_what_cannot_be_merged_is_refused_in_words(
    models: dict[tuple[str, bool], Path], tmp_path: Path
) -> None:
    folder = models["llama", False]
    grown = save_adapter(
        folder, tmp_path / "grown", rows=390, target_modules=LINEARS,
        modules_to_save=["embed_tokens", "lm_head"],
    )  # fmt: skip
    assert "it adds tokens" in refusal(folder, grown)
    invoked = save_adapter(
        folder, tmp_path / "invoked", target_modules=LINEARS, alora_invocation_tokens=[5]
    )
    assert "it acts on a part of a prompt only" in refusal(folder, invoked)
    other = save_adapter(folder, tmp_path / "other", target_modules=LINEARS)
    path = other / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "peft_type": "LOHA"}))
    assert "LOHA" in refusal(folder, other)
    assert "--merge-adapter-weights" in refusal(folder, tmp_path / "missing")


def test_an_adapter_of_mlx_is_served_and_not_merged(
    models: dict[tuple[str, bool], Path], tmp_path: Path
) -> None:
    folder = models["llama", False]
    name = "model.layers.0.self_attn.q_proj"
    width = load_model(folder).get_submodule(name).weight.shape
    factors = {f"{name}.lora_a": torch.ones(width[1], 2), f"{name}.lora_b": torch.ones(2, width[0])}
    save_file(factors, tmp_path / "adapters.safetensors")
    document = {"num_layers": -1, "lora_parameters": {"rank": 2, "scale": 2.0}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(document))
    assert "mlx-lm saved it, and PEFT merges its own only" in refusal(folder, tmp_path)


def test_an_adapter_by_linears_of_each_expert_is_refused(
    models: dict[tuple[str, bool], Path], tmp_path: Path
) -> None:
    folder, adapter = models["qwen3_moe", False], tmp_path / "adapter"
    tuned = peft_model(
        folder, seed=1, r=2, target_modules=[],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        rank_pattern={"experts.gate_up_proj": 4},
    )  # fmt: skip
    make_older(tuned, adapter, *OLDER["qwen3_moe"])
    with pytest.raises(StartupError, match="linears of each expert.*serve it with --adapter-id"):
        merge_adapter(load_model(folder), adapter)


def test_what_peft_would_leave_out_is_refused(tmp_path: Path) -> None:
    """It takes linears of shared experts for the experts' own, and finds no weights for those."""
    folder, adapter = make_tiny_model("deepseek_v3", tmp_path / "model"), tmp_path / "adapter"
    linears = [f"shared_experts.{each}_proj" for each in ("gate", "up", "down")]
    weights = [f"{linear}.weight" for linear in linears]
    tuned = peft_model(folder, seed=1, r=2, target_modules=[], target_parameters=weights)
    tuned.save_pretrained(adapter)
    merge_adapter(load_model(folder), adapter)
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    config |= {"target_modules": linears, "target_parameters": None}
    path.write_text(json.dumps(config))
    with pytest.raises(StartupError, match="PEFT leaves out .*shared_experts"):
        merge_adapter(load_model(folder), adapter)
