"""Quantized checkpoints compute what their formats' definitions say, on any number of ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.helpers.coded_models import FORMATS, store_coded
from tests.helpers.expert_rows import ExpertRows
from tests.helpers.family_rows import FamilyRows
from tests.helpers.paged_runner import RELATIVE_TOLERANCE
from tests.helpers.quantized_rows import load
from tests.helpers.rank_models import read_parts
from tests.helpers.schedules import chunked
from tests.helpers.tiny_models import make_tiny_model

from lorax_contract.config import ShardConfig
from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_shard.model.hf_model import HFPagedModel
from lorax_shard.model.loader import load_paged_model

# What the formats' groups, blocks and words divide.
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "head_dim": 8}


class CodedRows(FamilyRows):
    """Serves a checkpoint of a format; what it is compared with has its numbers."""

    def __init__(self, name: str, root: Path) -> None:
        self._format = name
        super().__init__("llama", root, **SHAPE)

    def _load(self) -> HFPagedModel:
        coded = store_coded(self.path, self._format)
        self.config = ShardConfig(
            model_dir=str(coded), model_id="tiny", shard_uris=["unix:///none"]
        )
        return load_paged_model(self.config)


@pytest.mark.parametrize("name", FORMATS)
def test_each_number_is_that_of_the_formats_definition(name: str, tmp_path: Path) -> None:
    folder = make_tiny_model("llama", tmp_path / "model", **SHAPE)
    before = load_file(folder / "model.safetensors")
    coded = store_coded(folder, name)
    expected = load_file(folder / "model.safetensors")
    model = load(coded, linear_backend="torch")
    projections = [key for key in expected if key.endswith("_proj.weight")]
    assert len(projections) == 14
    for key, numbers in expected.items():
        torch.testing.assert_close(_tensor(model._model, key), numbers, rtol=2e-7, atol=1e-9)
    for key in projections:
        # The numbers are near the model's own, so that nothing here compares noise with noise.
        off = (expected[key] - before[key]).norm() / before[key].norm()
        assert 0 < off < 0.15


@pytest.mark.parametrize("name", FORMATS)
def test_ranks_read_their_parts_of_the_codes(name: str, tmp_path: Path) -> None:
    folder = make_tiny_model("llama", tmp_path / "model", **SHAPE)
    coded = store_coded(folder, name)
    expected = load_file(folder / "model.safetensors")
    config = ShardConfig(
        model_dir=str(coded), model_id="tiny", shard_uris=["unix:///none"], linear_backend="torch"
    )
    # Three ranks cut groups, blocks and words in two.
    for part in read_parts(config, 3):
        for place, split in part.loaded.plan.splits.items():
            key, (span,) = f"{place}.weight", split.spans
            own = expected[key].narrow(split.weight_dim, span.start, len(span))
            got = _tensor(part.loaded.model, key)
            torch.testing.assert_close(got, own, rtol=2e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["fp8 blocks", "pack-quantized", "gptq", "awq"])
def test_adapters_act_on_top_on_one_rank_and_two(name: str, tmp_path: Path) -> None:
    rows = CodedRows(name, tmp_path)
    assert rows.run(chunked) < RELATIVE_TOLERANCE
    assert rows.run_ranks(chunked, 2) < RELATIVE_TOLERANCE


def test_experts_in_mxfp4(tmp_path: Path) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 96}
    folder = make_tiny_model("gpt_oss", tmp_path / "model", **shape)
    expected = load_file(folder / "model.safetensors")
    coded = _store_mxfp4(folder, expected)
    model = load(coded, linear_backend="torch")
    experts = [key for key in expected if key.endswith(("gate_up_proj", "down_proj"))]
    assert len(experts) == 4
    for key in experts:
        assert torch.equal(_tensor(model._model, key), expected[key])
    config = ShardConfig(model_dir=str(coded), model_id="tiny", shard_uris=["unix:///none"])
    for part in read_parts(config, 2):
        for key in experts:
            place, _, name = key.rpartition(".")
            dim, spans = part.loaded.plan.splits[place].parameters[name]
            own = torch.cat([expected[key].narrow(dim, s.start, len(s)) for s in spans], dim)
            assert torch.equal(_tensor(part.loaded.model, key), own)


class FourBitExpertRows(ExpertRows):
    """Serves a mixture whose experts are codes; what it is compared with has their numbers."""

    def __init__(self, root: Path) -> None:
        super().__init__("gpt_oss", root, hidden_size=64, intermediate_size=96)

    def _load(self) -> HFPagedModel:
        weights = load_file(self.path / "model.safetensors")
        coded = _store_mxfp4(self.path, weights)
        save_file(weights, self.path / "model.safetensors", metadata={"format": "pt"})
        self.config = ShardConfig(
            model_dir=str(coded), model_id="tiny", shard_uris=["unix:///none"]
        )
        return load_paged_model(self.config)


def test_adapters_on_experts_in_mxfp4(tmp_path: Path) -> None:
    rows = FourBitExpertRows(tmp_path)
    assert rows.run(chunked) < RELATIVE_TOLERANCE
    assert rows.run_ranks(chunked, 3) < RELATIVE_TOLERANCE


def _store_mxfp4(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    """Write experts in four bits, code by code, and put what they stand for into ``weights``."""
    table = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    table += [-each for each in table]
    stored = {}
    for key in list(weights):
        if not key.endswith(("gate_up_proj", "down_proj")):
            stored[key] = weights[key]
            continue
        experts, num_in, num_out = weights[key].shape
        blocks = torch.zeros(experts, num_out, num_in // 32, 16, dtype=torch.uint8)
        scales = torch.zeros(experts, num_out, num_in // 32, dtype=torch.uint8)
        draw = torch.Generator().manual_seed(len(stored))
        for place in torch.cartesian_prod(*map(torch.arange, scales.shape)).tolist():
            expert, output, group = place
            power = int(torch.randint(-6, -2, (), generator=draw))
            codes = torch.randint(0, 16, (32,), generator=draw).tolist()
            scales[expert, output, group] = power + 127
            for i in range(16):
                blocks[expert, output, group, i] = codes[2 * i] + 16 * codes[2 * i + 1]
            for i, code in enumerate(codes):
                weights[key][expert, group * 32 + i, output] = table[code] * 2.0**power
        stored |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
    target = Path(shutil.copytree(folder, folder.with_name("coded")))
    save_file(stored, target / "model.safetensors", metadata={"format": "pt"})
    _say(target, {"quant_method": "mxfp4"})
    return target


def test_a_quantized_checkpoint_may_be_rounded_once_more(tmp_path: Path) -> None:
    folder = make_tiny_model("llama", tmp_path / "model", **SHAPE)
    model = load(store_coded(folder, "awq"), quantize="int8")
    assert model.linear_backend == "int8"


@pytest.mark.parametrize(
    ("name", "damage", "text"),
    [
        ("gptq", "scales", r"gate_proj\.scales is not in the files"),
        ("fp8 blocks", "weight_scale_inv", r"have no scale for it"),
        ("pack-quantized", "weight_shape", "which says how many inputs"),
        ("bitsandbytes 8 bits", "SCB", "have no .*SCB"),
    ],
)
def test_codes_that_lack_a_part_are_refused_by_name(
    name: str, damage: str, text: str, tmp_path: Path
) -> None:
    coded = store_coded(make_tiny_model("llama", tmp_path / "model", **SHAPE), name)
    tensors = load_file(coded / "model.safetensors")
    del tensors[f"model.layers.0.mlp.gate_proj.{damage}"]
    save_file(tensors, coded / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StartupError, match=text) as caught:
        load(coded)
    assert caught.value.exit_code is ExitCode.MODEL_UNSUPPORTED


def test_scales_that_fit_no_group_are_refused(tmp_path: Path) -> None:
    coded = store_coded(make_tiny_model("llama", tmp_path / "model", **SHAPE), "fp8 blocks")
    _say(coded, {"quant_method": "fp8", "weight_block_size": [64, 64]})
    with pytest.raises(StartupError, match="are not groups of 64"):
        load(coded)


def test_memory_is_that_of_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorax_shard.model import weights

    folder = make_tiny_model("llama", tmp_path / "model", **SHAPE)
    coded = store_coded(folder, "gptq")
    needed = 4 * sum(each.numel() for each in load_file(folder / "model.safetensors").values())
    monkeypatch.setattr(weights, "free_bytes", lambda _device: needed - 1)
    with pytest.raises(StartupError, match="memory are free"):
        load(coded)
    monkeypatch.setattr(weights, "free_bytes", lambda _device: needed)
    load(coded)


def _tensor(model: Any, key: str) -> torch.Tensor:
    """Return a weight by its name, also one that a kernel holds."""
    place, _, name = key.rpartition(".")
    found: torch.Tensor = getattr(model.get_submodule(place), name)
    return found


def _say(folder: Path, config: dict[str, Any]) -> None:
    document = json.loads((folder / "config.json").read_text())
    document["quantization_config"] = config
    (folder / "config.json").write_text(json.dumps(document))
