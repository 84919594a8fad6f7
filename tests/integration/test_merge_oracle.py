"""A merge computes what PEFT's add_weighted_adapter computes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft.utils.merge_utils
import pytest
import torch
from tests.helpers.naive_delta import apply_adapter
from tests.helpers.peft_folders import load_adapter, load_model, logits_of, quiet, save_adapter
from tests.helpers.tiny_models import make_tiny_model

from lorax_contract.adapters import Combination, MajoritySign, MergeSpec
from lorax_shard.lora.delta import HostAdapter
from lorax_shard.model.describe import describe
from lorax_shard.peft.files import AdapterLimits
from lorax_shard.peft.merge import merge, merge_digest
from lorax_shard.peft.merge_math import draw_mask
from lorax_shard.peft.normal import cast
from lorax_shard.peft.read import read_adapter

IDS = [5, 40, 3, 381, 7, 7, 120, 64, 9]
NAMES = ("first", "second", "third")
PLAIN: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "o_proj"]}
Options = list[dict[str, Any]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("model"))


class Adapters:
    """Adapters of one base, in folders as PEFT saves them."""

    def __init__(self, model: Path, root: Path, options: Options) -> None:
        self.model = model
        self.folders = [
            save_adapter(model, root / name, seed=seed, **each)
            for seed, (name, each) in enumerate(zip(NAMES, options))
        ]
        base = describe(load_model(model))
        self.read = [
            cast(read_adapter(folder, base, AdapterLimits()), dtype=torch.float32)
            for folder in self.folders
        ]

    def write_full_names(self) -> None:
        """Have PEFT read the same adapters from lists of the full names of their modules."""
        for folder, adapter in zip(self.folders, self.read, strict=True):
            path = folder / "adapter_config.json"
            changes = {"target_modules": sorted(adapter.modules)} | dict.fromkeys(
                ("layers_to_transform", "layers_pattern", "exclude_modules")
            )
            path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    def peft(self, spec: MergeSpec) -> torch.nn.Module:
        """Return PEFT's model with the merged adapter switched on."""
        tuned = load_adapter(self.model, self.folders[0])
        names = ["default"]
        with quiet():
            for name, folder in zip(NAMES[1:], self.folders[1:]):
                tuned.load_adapter(folder, adapter_name=name)
                names.append(name)
            tuned.add_weighted_adapter(
                names,
                list(spec.weights),
                "merged",
                combination_type=spec.combination.value,
                density=spec.density,
                majority_sign_method=spec.majority_sign.value,
            )
            tuned.set_adapter("merged")
        return tuned.eval()

    def compare(self, spec: MergeSpec) -> None:
        expected = logits_of(self.peft(spec), IDS)
        merged = merge(self.read, spec)
        got = logits_of(apply_adapter(load_model(self.model), merged), IDS)
        assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()
        base = logits_of(load_model(self.model), IDS)
        assert (expected - base).abs().max() > 1e-3 * base.abs().max()


@pytest.fixture
def make(model: Path, tmp_path: Path) -> Callable[..., Adapters]:
    return lambda *options: Adapters(model, tmp_path, list(options))


def spec(combination: str, *weights: float, **more: Any) -> MergeSpec:
    return MergeSpec(weights=weights, combination=Combination(combination), **more)


TWO: Options = [PLAIN, {**PLAIN, "lora_alpha": 1}]
FREQUENCY = MajoritySign.FREQUENCY
CASES: dict[str, tuple[Options, MergeSpec]] = {
    "linear": (TWO, spec("linear", 0.7, 0.4)),
    "linear, weight below zero": (TWO, spec("linear", 1.0, -0.6)),
    "linear, three": ([*TWO, PLAIN], spec("linear", 0.5, 0.5, 2.0)),
    "linear, weight of zero": (TWO, spec("linear", 1.0, 0.0)),
    "cat": (TWO, spec("cat", 0.7, -0.4)),
    "cat of other ranks": ([PLAIN, {**PLAIN, "r": 9}], spec("cat", 0.7, 0.4)),
    "ties": (TWO, spec("ties", 0.7, 0.4, density=0.4)),
    "ties by frequency": ([*TWO, PLAIN], spec("ties", 0.7, 0.4, 0.3, density=0.6,
                                              majority_sign=FREQUENCY)),
    "ties of all": (TWO, spec("ties", 0.7, 0.4, density=1.0)),
    "ties of one": ([PLAIN], spec("ties", 0.7, density=0.4)),
    "other modules": ([PLAIN, {**PLAIN, "target_modules": ["o_proj", "lm_head"]}],
                      spec("linear", 0.7, 0.4)),
    "other modules, cat": ([PLAIN, {**PLAIN, "target_modules": ["up_proj"]}],
                           spec("cat", 0.7, 0.4)),
    "regular expressions": ([{**PLAIN, "target_modules": ".*q_proj"},
                             {**PLAIN, "target_modules": r".*1\..*(k|q)_proj"}],
                            spec("linear", 0.7, 0.4)),
    "embeddings": ([{**PLAIN, "target_modules": ["embed_tokens"]}] * 2, spec("ties", 0.7, 0.4,
                                                                             density=0.5)),
    "patterns": ([{**PLAIN, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"o_proj": 9}}] * 2,
                 spec("linear", 0.7, 0.4)),
    "a second adapter with rsLoRA": ([PLAIN, {**PLAIN, "use_rslora": True}],
                                     spec("linear", 0.7, 0.4)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_merging(case: str, make: Callable[..., Adapters]) -> None:
    options, how = CASES[case]
    make(*options).compare(how)


LAYERS: dict[str, Any] = {**PLAIN, "layers_to_transform": [0]}
PICKED: dict[str, Options] = {
    "first picks layers": [LAYERS, {**PLAIN, "target_modules": ["o_proj", "up_proj"]}],
    "second picks layers": [{**PLAIN, "target_modules": ["k_proj"]}, LAYERS],
    "both pick layers": [LAYERS, {**LAYERS, "layers_to_transform": [1]}],
    "first excludes modules": [
        {**PLAIN, "exclude_modules": r".*\.0\..*q_proj"}, {**PLAIN, "target_modules": ["q_proj"]},
    ],
    "a pattern and a list": [{**PLAIN, "target_modules": r".*1\..*(k|q)_proj"}, LAYERS],
}  # fmt: skip


@pytest.mark.parametrize("combination", ["linear", "cat", "ties"])
@pytest.mark.parametrize("case", PICKED)
def test_adapters_that_pick_modules_merge_to_the_union(
    case: str, combination: str, make: Callable[..., Adapters]
) -> None:
    """PEFT hands the first one's choice on to the merge; of full names there is no choice."""
    adapters = make(*PICKED[case])
    adapters.write_full_names()
    density = 0.4 if combination == "ties" else None
    adapters.compare(spec(combination, 0.7, 0.4, density=density))


@pytest.mark.parametrize("combination", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("density", [0.3, 0.9, 1.0])
def test_merging_with_our_masks_in_pefts_place(
    combination: str,
    density: float,
    make: Callable[..., Adapters],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    adapters = make(*TWO)
    how = spec(combination, 0.7, 0.4, density=density)
    drawn = []

    def pruned(tensor: torch.Tensor, density: float, rescale: bool) -> torch.Tensor:
        assert rescale
        seed = place_of(tensor, adapters.read, how)
        drawn.append(seed)
        return tensor * draw_mask(tuple(tensor.shape), density, seed) / density

    monkeypatch.setattr(peft.utils.merge_utils, "random_pruning", pruned)
    adapters.compare(how)
    # Each tensor of each adapter has a mask of its own.
    assert len(set(drawn)) == len(drawn) == (0 if density == 1 else 2 * 2 * 4)


def place_of(tensor: torch.Tensor, adapters: list[HostAdapter], how: MergeSpec) -> str:
    """Return the seed of the mask for one of the adapters' tensors."""
    digest = merge_digest(how, [adapter.digest for adapter in adapters])
    for number, adapter in enumerate(adapters):
        for name, delta in adapter.modules.items():
            for part in ("a", "b"):
                if torch.equal(getattr(delta, part), tensor):
                    return f"{digest}/{name}/{part}/{number}"
    raise AssertionError("a tensor of none of the adapters")


def test_the_reason_to_refuse_a_first_adapter_with_rslora(make: Callable[..., Adapters]) -> None:
    """PEFT takes the first adapter's rsLoRA over into the merge, whose scaling should be 1."""
    tuned = make({**PLAIN, "use_rslora": True}, PLAIN).peft(spec("linear", 0.7, 0.4))
    query = tuned.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    assert query.scaling["merged"] == math.sqrt(4)
