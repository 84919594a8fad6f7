"""The rooms together: a folder that PEFT saved is fetched in the limited child process, read,
normalised, loaded into slots, and computes what PEFT computes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.helpers.in_loop import in_loop
from tests.helpers.paged_runner import RELATIVE_TOLERANCE, PagedRunner, stock_logits
from tests.helpers.peft_folders import load_adapter, load_model, logits_of, save_adapter
from tests.helpers.tiny_models import make_tiny_model

from lorax_contract.adapters import AdapterRef, AdapterUnavailableError, Reason
from lorax_contract.config import ShardConfig
from lorax_shard.fetching.client import AdapterFetcher, FetchSettings
from lorax_shard.fetching.job import VerifySettings
from lorax_shard.fetching.process import Setup
from lorax_shard.fetching.sources.interface import SourceSettings
from lorax_shard.lora.model import install
from lorax_shard.model.describe import describe
from lorax_shard.model.loader import load_paged_model
from lorax_shard.peft.context import make_context
from lorax_shard.peft.files import AdapterLimits
from lorax_shard.peft.normal import cast, read_normal

ROWS = [[5, 40, 3, 381, 7, 7, 120], [64, 9, 3, 2], [1, 2, 3, 40, 5], [7, 7, 7]]
LINEARS = ["q_proj", "v_proj", "down_proj"]
# One adapter for each row but the last, which is the base's.
ADAPTERS: dict[str, dict[str, Any]] = {
    "magnitudes": {"r": 3, "use_dora": True, "target_modules": [*LINEARS, "embed_tokens"]},
    "rows": {
        "r": 5,
        "use_rslora": True,
        "target_modules": "all-linear",
        "trainable_token_indices": [3, 40],
    },
    "whole": {"r": 2, "target_modules": LINEARS, "modules_to_save": ["lm_head", "norm"]},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("model"), tie_word_embeddings=True)


def context_of(model: Path, **limits: int) -> Mapping[str, Any]:
    return make_context(describe(load_model(model)), AdapterLimits(**limits))


def fetcher(root: Path, context: Mapping[str, Any]) -> AdapterFetcher:
    setup = Setup(
        store_dir=str(root / "store"),
        store_max_bytes=1 << 28,
        sources=SourceSettings(local_roots=(str(root / "local"),)),
        verify=VerifySettings(function="lorax_shard.peft.verify:verify", context=dict(context)),
    )
    return AdapterFetcher(FetchSettings(setup=setup))


@in_loop
async def test_what_is_fetched_and_loaded_computes_as_peft_does(
    model: Path, tmp_path: Path
) -> None:
    context = context_of(model)
    paged = load_paged_model(
        ShardConfig(model_dir=str(model), model_id="tiny", shard_uris=["unix:///unused"])
    )
    lora = install(paged._model, "torch", torch.device("cpu"), torch.float32)
    expected = []
    made = fetcher(tmp_path, context)
    try:
        for slot, (name, options) in enumerate(ADAPTERS.items()):
            folder = save_adapter(model, tmp_path / "local" / name, seed=slot, **options)
            expected.append(logits_of(load_adapter(model, folder), ROWS[slot]))
            with await made.fetch(AdapterRef.of("local", os.fspath(folder))) as fetched:
                assert fetched.facts["max_rank"] == options["r"]
                adapter = read_normal(fetched.folder / fetched.facts["content_digest"])
            lora.load(slot, cast(adapter, dtype=torch.float32))
    finally:
        await made.close()
    expected.append(stock_logits(model, ROWS[3:])[0])

    runner = PagedRunner(paged, ROWS, num_blocks=64)
    lengths = [len(row) for row in ROWS]
    with lora.step(lengths, [0, 1, 2, None]):
        runner.step(dict(enumerate(lengths)))
    for row, wanted in enumerate(expected):
        got = torch.stack([runner.logits[row][at] for at in range(len(wanted))])
        assert (got - wanted).abs().max() <= RELATIVE_TOLERANCE * wanted.abs().max()


@in_loop
async def test_a_refusal_reaches_the_caller_in_its_words(model: Path, tmp_path: Path) -> None:
    folder = save_adapter(model, tmp_path / "local/big", r=9, target_modules=LINEARS)
    made = fetcher(tmp_path, context_of(model, max_rank=8))
    try:
        with pytest.raises(AdapterUnavailableError) as caught:
            await made.fetch(AdapterRef.of("local", os.fspath(folder)))
    finally:
        await made.close()
    assert caught.value.reason is Reason.REFUSED
    assert caught.value.kind.http_status == 422
    assert "has the rank 9; the limit is 8" in caught.value.text


@in_loop
async def test_a_pattern_that_does_not_end_is_refused_by_its_options_name(
    model: Path, tmp_path: Path
) -> None:
    """Matched in a process that the kernel ends: the fetch itself goes on to say why."""
    folder = save_adapter(model, tmp_path / "local/slow", r=2, target_modules=LINEARS)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["target_modules"] = "(([a-z_0-9.])*)*!"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    made = fetcher(tmp_path, context_of(model))
    try:
        with pytest.raises(AdapterUnavailableError) as caught:
            await made.fetch(AdapterRef.of("local", os.fspath(folder)))
    finally:
        await made.close()
    assert caught.value.reason is Reason.REFUSED
    assert (
        "target_modules of adapter_config.json has a pattern that takes more" in caught.value.text
    )


def mlx_tensors(model: torch.nn.Module, names: list[str], *, dora: bool) -> dict[str, torch.Tensor]:
    """Return random factors as mlx-lm lays them out."""
    draw = torch.Generator().manual_seed(4)
    found = {}
    for name in names:
        out_width, in_width = model.get_submodule(name).weight.shape
        if "embed" in name:
            # One row of lora_a for each token.
            out_width, in_width = in_width, out_width
        found[f"{name}.lora_a"] = 0.1 * torch.randn(in_width, 3, generator=draw)
        found[f"{name}.lora_b"] = 0.1 * torch.randn(3, out_width, generator=draw)
        if dora:
            found[f"{name}.m"] = 1 + torch.rand(out_width, generator=draw)
    return found


@torch.no_grad()
def mlx_logits(
    model: torch.nn.Module, tensors: dict[str, torch.Tensor], scale: float, ids: list[int]
) -> torch.Tensor:
    """Return the logits of a stock model whose modules compute as mlx-lm's do."""

    def linear(module: torch.nn.Module, x: torch.Tensor, name: str) -> torch.Tensor:
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        out = x @ module.weight.T + scale * ((x @ a) @ b)
        if f"{name}.m" in tensors:
            adapted = module.weight + (scale * b.T) @ a.T
            out = tensors[f"{name}.m"] / torch.linalg.vector_norm(adapted, dim=1) * out
        return out if module.bias is None else out + module.bias

    def embedding(module: torch.nn.Module, ids: torch.Tensor, name: str) -> torch.Tensor:
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        return module.weight[ids] + scale * (a[ids] @ b)

    def as_linear(module: torch.nn.Module, x: torch.Tensor, name: str) -> torch.Tensor:
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        return x @ module.weight.T + scale * ((x @ b.T) @ a.T)

    for name in {key.rpartition(".")[0] for key in tensors}:
        module = model.get_submodule(name)
        if isinstance(module, torch.nn.Embedding):
            module.forward = partial(embedding, module, name=name)
            # The model has no head of its own: its embedding is it.
            head = model.get_output_embeddings()
            head.forward = partial(as_linear, head, name=name)
        else:
            module.forward = partial(linear, module, name=name)
    return logits_of(model, ids)


@in_loop
@pytest.mark.parametrize("kind", ["lora", "dora"])
async def test_what_mlx_saved_computes_as_mlx_does(model: Path, kind: str, tmp_path: Path) -> None:
    names = [f"model.layers.1.{name}" for name in ("self_attn.q_proj", "mlp.down_proj")]
    if kind == "lora":
        names.append("model.embed_tokens")
    stock = load_model(model)
    tensors = mlx_tensors(stock, names, dora=kind == "dora")
    folder = tmp_path / "local/mlx"
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapters.safetensors")
    parameters = {"rank": 3, "scale": 20.0, "dropout": 0.1, "keys": None}
    (folder / "adapter_config.json").write_text(
        json.dumps({"fine_tune_type": kind, "num_layers": 1, "lora_parameters": parameters})
    )
    made = fetcher(tmp_path, context_of(model))
    try:
        with await made.fetch(AdapterRef.of("local", os.fspath(folder))) as fetched:
            adapter = read_normal(fetched.folder / fetched.facts["content_digest"])
    finally:
        await made.close()
    paged = load_paged_model(
        ShardConfig(model_dir=str(model), model_id="tiny", shard_uris=["unix:///unused"])
    )
    lora = install(paged._model, "torch", torch.device("cpu"), torch.float32)
    lora.load(0, cast(adapter, dtype=torch.float32))
    wanted, base = mlx_logits(stock, tensors, 20.0, ROWS[0]), stock_logits(model, ROWS[:1])[0]
    runner = PagedRunner(paged, ROWS[:1], num_blocks=64)
    with lora.step([len(ROWS[0])], [0]):
        runner.step({0: len(ROWS[0])})
    got = torch.stack([runner.logits[0][at] for at in range(len(wanted))])
    assert (got - wanted).abs().max() <= RELATIVE_TOLERANCE * wanted.abs().max()
    assert (wanted - base).abs().max() > 100 * RELATIVE_TOLERANCE * wanted.abs().max()
