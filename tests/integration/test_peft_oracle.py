"""What is read from an adapter's folder computes what PEFT computes, option by option."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig
from safetensors.torch import load_file, save_file
from tests.helpers.naive_delta import apply_adapter
from tests.helpers.peft_cases import (
    CASES,
    EXTRA,
    FAMILIES,
    GROWN,
    GROWTH,
    LLAMA,
    TIED_CASES,
    Make,
    some,
)
from tests.helpers.peft_folders import (
    load_adapter,
    load_model,
    logits_of,
    quiet,
    randomise,
    save_adapter,
)
from tests.helpers.tiny_models import VOCAB_SIZE, make_tiny_model

from lorax_shard.lora.cpp import CppLora
from lorax_shard.lora.delta import HostAdapter
from lorax_shard.lora.model import install
from lorax_shard.lora.registry import BACKENDS
from lorax_shard.model.describe import describe
from lorax_shard.peft.base import BaseDescription
from lorax_shard.peft.context import make_context
from lorax_shard.peft.errors import AdapterRefusedError
from lorax_shard.peft.files import AdapterLimits
from lorax_shard.peft.normal import cast, read_normal
from lorax_shard.peft.read import read_adapter
from lorax_shard.peft.verify import verify

IDS = [5, 40, 3, 381, 7, 7, 120, 64, 9]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], Path]:
    """Return a function that makes each base model once."""
    root = tmp_path_factory.mktemp("models")

    @cache
    def make(family: str, tied: bool) -> Path:
        path = root / f"{family}-{tied}"
        return make_tiny_model(family, path, tie_word_embeddings=tied)

    return make


@cache
def description(path: Path) -> BaseDescription:
    return BaseDescription.from_json(describe(load_model(path)).to_json())


def through_normal_form(folder: Path, model: Path) -> HostAdapter:
    """Return the adapter as the shard reads it once it was verified."""
    (folder / "normal").mkdir()
    verify(folder, folder / "normal", make_context(description(model), AdapterLimits()))
    return cast(read_normal(folder / "normal"), dtype=torch.float32)


def check(
    model: Path, folder: Path, options: dict[str, Any], rows: int | None = None
) -> torch.Tensor:
    """Compare what is read with PEFT; return how far PEFT is from the base."""
    save_adapter(model, folder, rows=rows, **options)
    ids = IDS if rows is None else [*IDS, VOCAB_SIZE, VOCAB_SIZE + 1]
    expected = logits_of(load_adapter(model, folder, rows=rows), ids)
    adapter = through_normal_form(folder, model)
    assert adapter.vocab_size == (rows or 0)
    got = logits_of(apply_adapter(load_model(model), adapter), ids)
    assert got.shape == expected.shape
    scale = expected.abs().max()
    assert (got - expected).abs().max() <= 1e-4 * scale
    base = logits_of(load_model(model), IDS)
    return (expected[: len(IDS), :VOCAB_SIZE] - base).abs().max() / scale


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", CASES)
def test_options(
    case: str, family: str, models: Callable[[str, bool], Path], tmp_path: Path
) -> None:
    assert check(models(family, False), tmp_path, CASES[case](FAMILIES[family])) > 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("case", TIED_CASES)
def test_options_with_tied_embeddings(
    case: str, family: str, models: Callable[[str, bool], Path], tmp_path: Path
) -> None:
    assert check(models(family, True), tmp_path, CASES[case](FAMILIES[family])) > 1e-3


@pytest.mark.parametrize(("family", "case", "make"), EXTRA, ids=[f"{f} {c}" for f, c, _ in EXTRA])
def test_options_of_some_families(
    family: str, case: str, make: Make, models: Callable[[str, bool], Path], tmp_path: Path
) -> None:
    assert check(models(family, False), tmp_path, make(FAMILIES[family])) > 1e-3


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("case", GROWTH)
def test_added_tokens(
    case: str, tied: bool, models: Callable[[str, bool], Path], tmp_path: Path
) -> None:
    check(models("llama", tied), tmp_path, GROWTH[case](LLAMA), rows=GROWN)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_copy_of_the_base_is_left_out_and_another_weight_kept(
    tied: bool, models: Callable[[str, bool], Path], tmp_path: Path
) -> None:
    model = models("llama", tied)
    save_adapter(model, tmp_path, **some(LLAMA, target_modules=["embed_tokens"]))
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    assert key in tensors
    adapter = read_adapter(tmp_path, description(model), AdapterLimits())
    assert [delta.weight for delta in adapter.modules.values()] == [None]

    tensors[key] = tensors[key] * 1.5
    save_file(tensors, weights)
    adapter = read_adapter(tmp_path, description(model), AdapterLimits())
    assert set(adapter.modules) == {"model.embed_tokens", *(["lm_head"] if tied else [])}
    expected = logits_of(load_adapter(model, tmp_path), IDS)
    got = logits_of(apply_adapter(load_model(model), adapter), IDS)
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


# What PEFT makes of these on a Llama (or another family) is refused in these words.
REFUSED: list[tuple[str, str, dict[str, Any], str]] = [
    ("gpt2", "alora, bias", {"alora_invocation_tokens": [5], "bias": "all"}, "act before its"),
    ("llama", "alora, saved", {"alora_invocation_tokens": [5], "modules_to_save": ["lm_head"]},
     "the adapter has more than A and B for lm_head"),
    ("llama", "alora, tokens", {"alora_invocation_tokens": [5], "trainable_token_indices": [3]},
     "train it without modules_to_save, trainable_token_indices and bias"),
    ("llama", "alora, id", {"alora_invocation_tokens": [5, 384]}, "names token 384; the base model"),
    ("llama", "replication", {"layer_replication": [[0, 2], [0, 1]]}, "layer_replication is not"),
    ("llama", "bdlora", {"use_bdlora": BdLoraConfig(target_modules_bd_a=["q_proj"], nblocks=2,
                                                    match_strict=False)}, "use_bdlora is not"),
    ("llama", "monteclora", {"monteclora_config": MontecloraConfig()}, "monteclora_config is not"),
    ("llama", "kasa", {"kasa_config": KasaConfig()}, "kasa_config is not supported"),
    ("llama", "pissa", {"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is not"),
    ("llama", "olora", {"init_lora_weights": "olora"}, "init_lora_weights='olora' is not"),
    ("llama", "saved block", {"modules_to_save": ["mlp"]},
     "modules_to_save names model.layers.0.mlp, a LlamaMLP"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "options", "text"),
    [(family, options, text) for family, _, options, text in REFUSED],
    ids=[name for _, name, _, _ in REFUSED],
)
def test_what_peft_saves_and_we_do_not_compute_is_refused(
    family: str,
    options: dict[str, Any],
    text: str,
    models: Callable[[str, bool], Path],
    tmp_path: Path,
) -> None:
    model = models(family, False)
    save_adapter(model, tmp_path, **{**some(FAMILIES[family]), **options})
    with pytest.raises(AdapterRefusedError) as caught:
        read_adapter(tmp_path, description(model), AdapterLimits())
    assert text in caught.value.public


def test_another_type_of_adapter_is_refused(
    models: Callable[[str, bool], Path], tmp_path: Path
) -> None:
    model = models("llama", False)
    with quiet():
        config = IA3Config(target_modules=["q_proj"], feedforward_modules=[])
        get_peft_model(load_model(model), config).save_pretrained(tmp_path)
    with pytest.raises(AdapterRefusedError, match="peft_type 'IA3' is not supported"):
        read_adapter(tmp_path, description(model), AdapterLimits())


def test_an_adapter_for_another_family_is_refused(
    models: Callable[[str, bool], Path], tmp_path: Path
) -> None:
    save_adapter(models("llama", False), tmp_path, **some(LLAMA))
    with pytest.raises(AdapterRefusedError, match=r"another model|another base model"):
        read_adapter(tmp_path, description(models("gpt2", False)), AdapterLimits())


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_converted_start_is_computed(
    start: str, models: Callable[[str, bool], Path], tmp_path: Path
) -> None:
    model = models("llama", False)
    with quiet():
        options = some(LLAMA, init_lora_weights=start)
        tuned = get_peft_model(load_model(model), LoraConfig(task_type="CAUSAL_LM", **options))
        tuned.peft_config["default"].init_lora_weights = True
        tuned.save_pretrained(tmp_path / "start")
        tuned.peft_config["default"].init_lora_weights = start
        randomise(tuned, "none", 3)
        expected = logits_of(tuned.eval(), IDS)
        tuned.save_pretrained(
            tmp_path / "end", path_initial_model_for_weight_conversion=str(tmp_path / "start")
        )
    adapter = read_adapter(tmp_path / "end", description(model), AdapterLimits())
    got = logits_of(apply_adapter(load_model(model), adapter), IDS)
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_have_the_types_and_values_that_peft_holds(
    held: torch.dtype,
    saved: torch.dtype,
    models: Callable[[str, bool], Path],
    tmp_path: Path,
) -> None:
    model = models("qwen2", False)
    options = some(LLAMA, use_dora=True, bias="lora_only", modules_to_save=["lm_head"])
    save_adapter(model, tmp_path, trainable_token_indices=[3, 4], **options)
    weights = tmp_path / "adapter_model.safetensors"
    save_file({key: each.to(saved) for key, each in load_file(weights).items()}, weights)
    adapter = cast(read_adapter(tmp_path, description(model), AdapterLimits()), dtype=held)
    peft = load_adapter(model, tmp_path, dtype=held).base_model.model

    query = peft.get_submodule("model.layers.0.self_attn.q_proj")
    head = peft.get_submodule("lm_head").modules_to_save["default"]
    rows = peft.get_submodule("model.embed_tokens").weight
    delta = adapter.modules["model.layers.0.self_attn.q_proj"]
    pairs = [
        (delta.a, query.lora_A["default"].weight),
        (delta.b, query.lora_B["default"].weight),
        (delta.magnitude, query.lora_magnitude_vector["default"].weight),
        (delta.bias, query.base_layer.bias),
        (adapter.modules["lm_head"].weight, head.weight),
        (adapter.modules["model.embed_tokens"].token_rows, rows[[3, 4]]),
    ]
    for ours, theirs in pairs:
        assert ours is not None
        assert ours.dtype is theirs.dtype
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("case", ["plain", "rslora", "dora"])
@pytest.mark.parametrize("saved", [torch.bfloat16, torch.float16])
def test_what_is_kept_in_16_bits_computes_what_peft_computes_of_it(
    saved: torch.dtype, case: str, models: Callable[[str, bool], Path], tmp_path: Path
) -> None:
    """PEFT widens such adapters when it loads them; the kernel when it reads them."""
    cpu = torch.device("cpu")
    if reason := CppLora.probe(cpu, torch.float32):
        pytest.skip(reason)
    model = models("llama", False)
    # A scaling that 16 bits cannot hold.
    more = {"plain": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}[case]
    save_adapter(model, tmp_path, **some(LLAMA, r=3, lora_alpha=7, **more))
    weights = tmp_path / "adapter_model.safetensors"
    save_file({key: each.to(saved) for key, each in load_file(weights).items()}, weights)
    expected = logits_of(load_adapter(model, tmp_path), IDS)

    adapter = cast(
        read_adapter(tmp_path, description(model), AdapterLimits()),
        dtype=torch.float32,
        low_rank_dtype=None,
    )
    served = load_model(model)
    lora = install(served, "cpp", cpu, torch.float32)
    lora.load(0, adapter)
    with lora.step([len(IDS)], [0]):
        got = logits_of(served, IDS)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    base = logits_of(load_model(model), IDS)
    assert (expected - base).abs().max() > 1e-3 * expected.abs().max()


@pytest.mark.parametrize("rank", [4, 8, 12])
def test_w25_every_layer_has_the_scale_of_its_rank_however_often_it_is_loaded(
    rank: int, models: Callable[[str, bool], Path], tmp_path: Path
) -> None:
    """LoRAX pads ranks, and scales by the padded one all layers but the first, or all of them."""
    cpu = torch.device("cpu")
    model = models("llama", False)
    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    save_adapter(model, tmp_path, r=rank, lora_alpha=5, target_modules=linears)
    expected = logits_of(load_adapter(model, tmp_path), IDS)
    adapter = through_normal_form(tmp_path, model)
    for backend in ("torch", "cpu", "cpp"):
        if BACKENDS.probe(backend, cpu, torch.float32):
            continue
        served = load_model(model)
        lora = install(served, backend, cpu, torch.float32)
        for slot in (0, 3, 0):
            lora.load(slot, adapter)
            with lora.step([len(IDS)], [slot]):
                got = logits_of(served, IDS)
            lora.unload(slot)
            assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
