"""What is read from an adapter's folder computes what PEFT computes, option by option."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from lorax_shard.adapters.host_base import BaseDescription, describe
from lorax_shard.adapters.host_normal import cast, digest_of, read_normal, write_normal
from lorax_shard.adapters.peft_files import Limits
from lorax_shard.adapters.peft_format import read_adapter
from tests.helpers.naive_delta import apply_adapter
from tests.helpers.peft_folders import load_adapter, load_model, logits_of, save_adapter
from tests.helpers.tiny_models import VOCAB_SIZE, make_tiny_model

IDS = [5, 40, 3, 381, 7, 7, 120, 64, 9]
GROWN = VOCAB_SIZE + 3


@dataclass(frozen=True)
class Names:
    """How a family names its modules."""

    queries: str
    outputs: str
    embedding: str
    layers: str
    more: tuple[str, ...]


LLAMA = Names("q_proj", "o_proj", "embed_tokens", "layers", ("v_proj", "down_proj", "up_proj"))
FAMILIES = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "gemma2": LLAMA,
    "gpt2": Names("c_attn", "c_proj", "wte", "h", ("c_fc",)),
    "mixtral": Names("q_proj", "o_proj", "embed_tokens", "layers", ("k_proj", "v_proj")),
}
Make = Callable[[Names], dict[str, Any]]


def some(names: Names, **more: Any) -> dict[str, Any]:
    return {"r": 4, "lora_alpha": 6, "target_modules": [names.queries, names.outputs], **more}


# Options by the name of what they test; each is made for every family.
CASES: dict[str, Make] = {
    "list": lambda n: some(n, target_modules=[n.queries, *n.more], lora_dropout=0.5),
    "regex": lambda n: some(n, target_modules=rf".*\.{n.layers}\.1\..*({n.queries}|{n.outputs})"),
    "rslora": lambda n: some(n, use_rslora=True),
    "patterns": lambda n: some(
        n,
        rank_pattern={rf"1\.[a-z_]+\.{n.queries}": 7, n.outputs: 2},
        alpha_pattern={n.queries: 3, f"nothing.{n.outputs}": 90},
    ),
    "patterns and rslora": lambda n: some(
        n, use_rslora=True, rank_pattern={n.queries: 9}, alpha_pattern={f"^.*{n.outputs}": 1}
    ),
    "excluded names": lambda n: some(n, exclude_modules=[n.outputs]),
    "excluded by regex": lambda n: some(n, exclude_modules=rf".*\.0\..*{n.queries}"),
    "one layer": lambda n: some(n, layers_to_transform=1),
    "layers": lambda n: some(n, layers_to_transform=[0], layers_pattern=n.layers),
    "layers spare full names": lambda n: some(
        n, target_modules=[n.queries, "lm_head"], layers_to_transform=[0]
    ),
    "fan_in_fan_out": lambda n: some(n, fan_in_fan_out=True, use_dora=True),
    "bias of targets": lambda n: some(n, bias="lora_only"),
    "dora": lambda n: some(n, use_dora=True, target_modules=[n.queries, *n.more]),
    "dora and bias": lambda n: some(n, use_dora=True, bias="lora_only", use_rslora=True),
    "head": lambda n: some(n, target_modules=[n.queries, "lm_head"]),
    "embedding": lambda n: some(n, target_modules=[n.queries, n.embedding]),
    "dora on embedding and head": lambda n: some(
        n, target_modules=[n.embedding, "lm_head"], use_dora=True
    ),
    "saved head": lambda n: some(n, modules_to_save=["lm_head"]),
    "saved embedding": lambda n: some(n, modules_to_save=[n.embedding]),
    "saved linear": lambda n: some(n, target_modules=[n.queries], modules_to_save=[n.outputs]),
    "token rows": lambda n: some(n, trainable_token_indices=[40, 7]),
    "token rows of the head": lambda n: some(n, trainable_token_indices={"lm_head": [40, 7, 2]}),
    "token rows of both": lambda n: some(
        n, trainable_token_indices={n.embedding: [40, 3], "lm_head": [3, 7]}
    ),
    "velora": lambda n: some(n, velora_config={"num_groups": 4}),
    "ensured tying": lambda n: some(
        n, target_modules=[n.queries, n.embedding], ensure_weight_tying=True
    ),
    "ensured tying of saved": lambda n: some(
        n, modules_to_save=[n.embedding], ensure_weight_tying=True
    ),
    **{
        f"init {init}": (lambda n, init=init: some(n, init_lora_weights=init))
        for init in (False, "gaussian", "eva", "orthogonal", "mica")
    },
}
# Those in which it matters that embedding and head are one.
TIED_CASES = [
    name for name in CASES if any(word in name for word in ("head", "embedding", "token", "tying"))
]
# What some families cannot express.
EXTRA: list[tuple[str, str, Make]] = [
    *(
        (family, "all-linear", lambda n: some(n, target_modules="all-linear"))
        for family in ("llama", "qwen2", "gemma2", "gpt2")
    ),
    ("qwen2", "all biases", lambda n: some(n, bias="all", target_modules=[n.queries])),
    ("llama", "all biases", lambda n: some(n, bias="all")),
]
GROWTH: dict[str, Make] = {
    "grown": some,
    "grown, token rows": lambda n: some(n, trainable_token_indices=[VOCAB_SIZE, VOCAB_SIZE + 1, 5]),
    "grown, embedding": lambda n: some(n, target_modules=[n.queries, n.embedding, "lm_head"]),
    "grown, saved": lambda n: some(n, modules_to_save=[n.embedding, "lm_head"]),
}


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


def check(
    model: Path, folder: Path, options: dict[str, Any], rows: int | None = None
) -> torch.Tensor:
    """Compare what is read with PEFT; return how far PEFT is from the base."""
    save_adapter(model, folder, rows=rows, **options)
    ids = IDS if rows is None else [*IDS, VOCAB_SIZE, VOCAB_SIZE + 1]
    expected = logits_of(load_adapter(model, folder, rows=rows), ids)
    adapter = read_adapter(folder, description(model), Limits())
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
