"""Whole models in the formats of GPUs, computed by the same operations on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.paged_runner import RELATIVE_TOLERANCE, PagedRunner, check_logits, stock_logits
from tests.helpers.peft_adapters import peft_logits, peft_model
from tests.helpers.quantized_rows import dequantized_copy, load
from tests.helpers.rank_models import read_parts
from tests.helpers.schedules import chunked, ragged
from tests.helpers.thread_ranks import ThreadGroup, run_ranks
from tests.helpers.tiny_models import make_tiny_model

from lorax_contract.config import ShardConfig
from lorax_contract.errors import StartupError
from lorax_shard.linear.packed import PackedLinear, SiblingKernel
from lorax_shard.linear.quantized import install
from lorax_shard.linear.quantized.device import round_rows
from lorax_shard.lora.delta import HostAdapter
from lorax_shard.model.hf_model import HFPagedModel
from lorax_shard.model.rank_model import meet
from lorax_shard.peft.files import AdapterLimits
from lorax_shard.peft.read import read_adapter

# What both formats take; two ranks cut inputs between groups.
SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8, "head_dim": 16}
ROWS = [list(range(1, 30)), [7, 8, 9], [300]]


def adapted(root: Path, of: Path, **options: Any) -> Any:
    """Return PEFT's model of a folder with a random adapter, which is saved."""
    tuned = peft_model(of, seed=7, r=4, lora_alpha=6, **options)
    tuned.save_pretrained(root / "adapter")
    return tuned


class Adapted(PagedRunner):
    def slots(self, order: list[int]) -> list[int | None]:
        return [0] * len(order)


def run(model: HFPagedModel, adapter: HostAdapter | None, schedule: Any) -> PagedRunner:
    kind = PagedRunner
    if adapter is not None:
        assert model.lora is not None
        model.lora.load(0, adapter)
        kind = Adapted
    runner = kind(model, ROWS, num_blocks=64)
    schedule(runner)
    if adapter is not None:
        model.lora.unload(0)
    return runner


def adapter_of(root: Path, model: HFPagedModel) -> HostAdapter:
    assert model.base is not None
    return read_adapter(root / "adapter", model.base, AdapterLimits())


@pytest.mark.parametrize("tied", [True, False])
def test_int4_is_its_dequantized_weights_with_an_adapter_on_top(tied: bool, tmp_path: Path) -> None:
    folder = make_tiny_model("llama", tmp_path / "model", tie_word_embeddings=tied, **SHAPE)
    copy = dequantized_copy(folder, "int4")
    tuned = adapted(tmp_path, copy, target_modules="all-linear")
    model = load(folder, quantize="int4", dtype="float32")
    assert model.linear_backend == "int4"
    linears = [m for m in model._model.modules() if isinstance(m, PackedLinear)]
    assert len(linears) == 15  # the head too, as it is
    assert sum(isinstance(each.kernel, SiblingKernel) for each in linears) == 10
    check_logits(run(model, None, chunked), stock_logits(copy, ROWS))
    check_logits(run(model, adapter_of(tmp_path, model), chunked), peft_logits(tuned, ROWS))


def test_int4_over_two_ranks(tmp_path: Path) -> None:
    folder = make_tiny_model("llama", tmp_path / "model", **SHAPE)
    tuned = adapted(
        tmp_path, dequantized_copy(folder, "int4"), target_modules="all-linear", use_dora=True
    )
    parts = read_parts(config_of(folder, "int4"), 2)
    adapter = adapter_of(tmp_path, parts[0].paged)
    expected = peft_logits(tuned, ROWS)

    def work(group: ThreadGroup) -> float:
        meet(parts[group.rank], group)
        return check_logits(run(parts[group.rank].paged, adapter, chunked), expected)

    assert max(run_ranks(2, work)) < RELATIVE_TOLERANCE
    with pytest.raises(StartupError, match=r"down_proj has groups of 32 .*another --num-shard"):
        read_parts(config_of(folder, "int4"), 3)


def test_fp8_rounds_rows_too_and_every_schedule_gives_the_same(tmp_path: Path) -> None:
    folder = make_tiny_model("llama", tmp_path / "model", **SHAPE)
    copy = dequantized_copy(folder, "fp8")
    tuned = adapted(tmp_path, copy, target_modules="all-linear")
    model = load(folder, quantize="fp8", dtype="float32")
    assert model.linear_backend == "fp8"
    for adapter, stock in ((None, stock_model(copy)), (adapter_of(tmp_path, model), tuned)):
        for linear in _base_linears(stock):
            linear.register_forward_pre_hook(_rounding)
        expected = peft_logits(stock, ROWS)
        for schedule in (ragged, chunked):
            runner = run(model, adapter, schedule)
            # A row on the border of two numbers may be rounded to either.
            scale = max(float(each.abs().max()) for each in expected)
            off = [
                float((got - expected[row][at]).abs().max()) / scale
                for row, logits in enumerate(runner.logits)
                for at, got in logits.items()
            ]
            assert sorted(off)[len(off) // 2] < 1e-5
            assert max(off) < 0.1


def test_fp8_over_ranks_has_the_codes_of_one(tmp_path: Path) -> None:
    folder = make_tiny_model("llama", tmp_path / "model", **SHAPE)
    whole = dict(load(folder, quantize="fp8", dtype="float32")._model.named_modules())
    for part in read_parts(config_of(folder, "fp8"), 2):
        for name, split in part.loaded.plan.splits.items():
            module = part.loaded.model.get_submodule(name)
            if isinstance(module, PackedLinear):
                (span,) = split.spans
                own = whole[name].weight.narrow(split.weight_dim, span.start, len(span))
                assert torch.equal(module.weight, own)


@pytest.mark.parametrize("quantize", ["fp8", "int4"])
def test_they_take_less_memory_and_rows_are_bfloat16(quantize: Any, tmp_path: Path) -> None:
    folder = make_tiny_model("llama", tmp_path / "model", **SHAPE)
    model, plain = (
        load(folder, quantize=quantize),
        load(folder, dtype="bfloat16", linear_backend="torch"),
    )
    assert model.dtype is torch.bfloat16
    embedding = model._model.get_input_embeddings().weight.nbytes
    share = {"fp8": 0.55, "int4": 0.38}[quantize]
    others = 2 * embedding
    assert model.weight_bytes - others < share * (plain.weight_bytes - others)


def test_a_device_that_cannot_is_refused_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_tiny_model("llama", tmp_path / "model", **SHAPE)
    monkeypatch.setattr(install, "refusal", lambda *_: "fp8 needs compute capability 8.9")
    with pytest.raises(StartupError, match=r"capability 8.9; leave --quantize out"):
        load(folder, quantize="fp8")


def config_of(folder: Path, quantize: Any) -> ShardConfig:
    return ShardConfig(
        model_dir=str(folder), model_id="tiny", shard_uris=["unix:///none"], quantize=quantize,
        dtype="float32",
    )  # fmt: skip


def stock_model(folder: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def _base_linears(model: Any) -> list[torch.nn.Module]:
    """Return the model's own linears, the head and those of an adapter left out."""
    return [
        each
        for name, each in model.named_modules()
        if type(each) is torch.nn.Linear and "lora_" not in name and "lm_head" not in name
    ]


def _rounding(_module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    rows = args[0]
    codes, scales = round_rows(rows.reshape(-1, rows.shape[-1]))
    return ((codes.float() * scales).view(rows.shape),)
