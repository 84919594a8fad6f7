"""The load-time probe refuses what would be served wrongly, and nothing else."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.helpers.thread_ranks import Meeting, ThreadGroup
from tests.helpers.tiny_models import make_tiny_model
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lorax_contract.config import ShardConfig
from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_shard.attention.sdpa import SdpaAttention
from lorax_shard.fused.cpp import CppElementwise
from lorax_shard.model import attention_hook, miniature
from lorax_shard.model.hf_model import HFPagedModel
from lorax_shard.model.loader import load_paged_model


def load(folder: Path, dtype: str = "float32") -> HFPagedModel:
    return load_paged_model(
        ShardConfig(
            model_dir=str(folder),
            model_id="tiny",
            shard_uris=["unix:///none"],
            attention_backend="sdpa",
            linear_backend="torch",
            dtype=dtype,
        )
    )


def mismatch(folder: Path, dtype: str = "float32") -> str:
    with pytest.raises(StartupError) as caught:
        load(folder, dtype)
    assert caught.value.exit_code is ExitCode.MODEL_MISMATCH
    return str(caught.value)


def break_attention(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Make the backend compute with another spec than the layer asked for."""
    attend = SdpaAttention.attend

    def broken(self, query, key, value, layer, spec, metadata):
        return attend(self, query, key, value, layer, spec._replace(**changes), metadata)

    monkeypatch.setattr(SdpaAttention, "attend", broken)


@pytest.mark.parametrize("reach", [16, 300])
def test_ignored_chunks_are_refused(
    reach: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_tiny_model("llama4_text", tmp_path / "m", attention_chunk_size=reach)
    load(path)
    break_attention(monkeypatch, chunk=None)
    assert f"attention_chunk_size {reach}" in mismatch(path)


@pytest.mark.parametrize("reach", [11, 300])
def test_temperature_of_other_positions_is_refused(
    reach: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_tiny_model("llama4_text", tmp_path / "m", floor_scale=reach)
    load(path)
    monkeypatch.setattr(
        attention_hook,
        "_temperature_correction",
        lambda _, step, device: torch.ones(1, device=device),
    )
    assert f"floor_scale {reach}" in mismatch(path)


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
@pytest.mark.parametrize("window", [20, 300])
def test_ignored_window_is_refused(
    family: str, window: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_tiny_model(family, tmp_path / "m", sliding_window=window)
    load(path)
    break_attention(monkeypatch, window=None)
    assert f"sliding_window {window}" in mismatch(path)


@pytest.mark.parametrize(
    ("family", "change"), [("llama", {"scaling": 0.3}), ("gemma2", {"softcap": None})]
)
def test_other_scores_are_refused(
    family: str, change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_attention(monkeypatch, **change)
    assert "one ragged batch" in mismatch(make_tiny_model(family, tmp_path / "m"))


def test_nan_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self, query, key, value, layer, spec, metadata):
        return torch.full((*query.shape[:2], value.shape[2]), float("nan"))

    monkeypatch.setattr(SdpaAttention, "attend", broken)
    assert "nan away" in mismatch(make_tiny_model("llama", tmp_path / "m"))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("family", ["gpt_oss", "granitemoe", "mixtral", "qwen3_moe"])
def test_routers_that_rounding_turns_over_are_no_reason(
    family: str, seed: int, tmp_path: Path
) -> None:
    load(make_tiny_model(family, tmp_path / "m", seed=seed), "bfloat16")


@pytest.mark.parametrize("change", [{"scaling": 0.1}, {"window": None}, {"sinks": None}])
def test_a_mixture_in_16_bits_is_still_probed(
    change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_attention(monkeypatch, **change)
    mismatch(make_tiny_model("gpt_oss", tmp_path / "m"), "bfloat16")


def test_nan_of_a_mixture_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attend = SdpaAttention.attend

    def broken(self, query, key, value, layer, spec, metadata):
        found = attend(self, query, key, value, layer, spec, metadata)
        found[0] = float("nan")
        return found

    monkeypatch.setattr(SdpaAttention, "attend", broken)
    assert "nan away" in mismatch(make_tiny_model("mixtral", tmp_path / "m"), "bfloat16")


def test_long_rope_is_served_up_to_its_threshold(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = make_tiny_model(
        "phi3",
        tmp_path / "m",
        original_max_position_embeddings=24,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 4,
            "long_factor": [3.0] * 4,
            "original_max_position_embeddings": 24,
        },
    )
    with caplog.at_level(logging.WARNING):
        assert load(path).max_positions == 24
    assert "sequences end there" in caplog.text


def test_untested_families_are_served_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = make_tiny_model("helium", tmp_path / "m")
    with caplog.at_level(logging.WARNING):
        load(path)
    assert "helium is not on the list of tested families" in caplog.text


def test_positions_shorter_than_the_probes_rows(tmp_path: Path) -> None:
    assert (
        load(make_tiny_model("gpt2", tmp_path / "m", max_position_embeddings=8)).max_positions == 8
    )


def test_miniature_keeps_class_and_layer_kinds_and_is_small() -> None:
    config = transformers.Gemma2Config(
        vocab_size=1000,
        hidden_size=96,
        intermediate_size=3000,
        num_hidden_layers=9,
        num_attention_heads=12,
        num_key_value_heads=6,
        head_dim=16,
        sliding_window=4096,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.inference_mode():
        small = miniature.build(model, model.device)
    assert type(small) is type(model)
    assert small.config.num_hidden_layers == 2
    assert set(small.config.layer_types) == {"sliding_attention", "full_attention"}
    assert small.config.sliding_window == 8
    assert small.config.num_attention_heads == 4
    assert model.config.num_hidden_layers == 9
    assert model.config.sliding_window == 4096
    assert sum(p.numel() for p in small.parameters()) < 200_000


def break_norms(monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> None:
    """Make the kernel of norms wrong, or fail, for as many rows as no trial has."""
    rms_norm = CppElementwise.rms_norm

    def broken(self, x, weight, norm):
        if x.shape[-2] <= 20:
            return rms_norm(self, x, weight, norm)
        if error is not None:
            raise error
        return rms_norm(self, x, weight, norm) * 1.5

    monkeypatch.setattr(CppElementwise, "rms_norm", broken)


class AloneInGroup(ThreadGroup):
    """A rank without others, that loads as one of several does."""

    def __init__(self) -> None:
        super().__init__(Meeting(1), rank=0)

    def wait_for_all(self, what: str, timeout_s: float) -> None:
        """Nobody else comes."""


@pytest.mark.skipif(
    CppElementwise.probe(torch.device("cpu"), torch.float32) is not None,
    reason="the kernels cannot run here",
)
@pytest.mark.parametrize("group", [None, AloneInGroup()], ids=["whole", "a rank"])
@pytest.mark.parametrize("error", [None, RuntimeError("no memory")])
def test_fused_work_that_differs_costs_the_model_that_only(
    error: Exception | None,
    group: AloneInGroup | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = make_tiny_model("llama", tmp_path / "m")
    config = ShardConfig(model_dir=str(path), model_id="tiny", shard_uris=["unix:///none"])

    computing: list[str] = []

    def norm() -> type:
        paged = load_paged_model(config, group)
        computing.append(paged.elementwise_backend)
        return type(paged._model.get_submodule("model.norm"))

    assert norm() is not LlamaRMSNorm
    assert "left to its own code" not in caplog.text
    break_norms(monkeypatch, error)
    assert norm() is LlamaRMSNorm
    # What is told of it is what computes.
    assert computing == ["cpp", "torch"]
    assert "the elementwise work of LlamaForCausalLM is left to its own code" in caplog.text
