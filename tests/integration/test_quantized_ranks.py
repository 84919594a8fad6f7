"""Quantized weights spread over ranks: the numbers of one rank, and adapters on top of them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.paged_runner import RELATIVE_TOLERANCE, PagedRunner, check_logits
from tests.helpers.peft_adapters import peft_logits, peft_model
from tests.helpers.quantized_rows import NarrowRows, QuantizedRows, dequantized_copy, load
from tests.helpers.rank_models import read_parts
from tests.helpers.schedules import chunked
from tests.helpers.thread_ranks import ThreadGroup, run_ranks
from tests.helpers.tiny_gguf import write_gguf
from tests.helpers.tiny_models import VOCAB_SIZE, make_tiny_model

from lorax_contract.config import ShardConfig
from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_shard.linear.packed import PackedLinear
from lorax_shard.linear.quantized.kernel import load_quantized
from lorax_shard.lora.delta import HostAdapter
from lorax_shard.model.hf_model import HFPagedModel
from lorax_shard.model.rank_model import RankPart, meet
from lorax_shard.parallel.plan import Role
from lorax_shard.peft.files import AdapterLimits
from lorax_shard.peft.read import read_adapter
from lorax_shard.prepare.prepare import prepare

pytestmark = pytest.mark.skipif(load_quantized()[0] is None, reason=str(load_quantized()[1]))

PROMPT = [5, 40, 3, 81, 7, 7, 120]
NUM_NEW = 12


# Plain, tied and fused linears, weights that lie the other way round, experts beside linears.
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "gpt2", "mixtral"])
def test_int8_over_ranks_with_two_adapters(family: str, tmp_path: Path) -> None:
    rows = QuantizedRows(family, tmp_path)
    for world_size in (2, 3):
        assert rows.run_ranks(chunked, world_size) < RELATIVE_TOLERANCE


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_bfloat16_over_ranks_with_two_adapters(family: str, tmp_path: Path) -> None:
    rows = NarrowRows(family, tmp_path)
    for world_size in (2, 3):
        assert rows.run_ranks(chunked, world_size) < RELATIVE_TOLERANCE


# What DoRA divides by where a rank has some inputs, or some ids, of the module only.
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_norms_are_those_of_the_dequantized_weights(family: str, tmp_path: Path) -> None:
    folder = make_tiny_model(family, tmp_path / "model", tie_word_embeddings=True)
    modules = {"llama": ["o_proj", "down_proj", "embed_tokens"], "gpt2": ["c_proj", "c_fc", "wte"]}
    tuned = peft_model(
        dequantized_copy(folder), seed=5, r=4, lora_alpha=6, use_dora=True,
        target_modules=modules[family],
    )  # fmt: skip
    tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    config = _config(folder, "int8")
    parts = read_parts(config, 2)
    assert parts[0].paged.base is not None
    adapter = read_adapter(tmp_path / "adapter", parts[0].paged.base, AdapterLimits())
    draw = random.Random(6)
    rows = [[draw.randrange(VOCAB_SIZE) for _ in range(length)] for length in (20, 7, 1)]
    expected = peft_logits(tuned, rows)

    def work(group: ThreadGroup) -> None:
        paged = _with_adapter(parts, group, adapter)
        runner = _Adapted(paged, rows, num_blocks=64)
        chunked(runner)
        check_logits(runner, expected)

    run_ranks(2, work)


@pytest.mark.parametrize("quantize", ["int8", "bfloat16"])
def test_a_rank_has_the_codes_of_one_rank(quantize: str, tmp_path: Path) -> None:
    folder = make_tiny_model("llama", tmp_path / "model")
    whole = dict(load(folder, quantize=quantize)._model.named_modules())
    for part in read_parts(_config(folder, quantize), 3):
        assert part.paged.linear_backend == quantize
        num_rows = 0
        for name, module in part.loaded.model.named_modules():
            if isinstance(module, PackedLinear):
                split = part.loaded.plan.splits[name]
                num_rows += split.role is Role.ROW
                (span,) = split.spans
                own = whole[name].weight.narrow(split.weight_dim, span.start, len(span))
                assert torch.equal(module.weight, own)
        assert num_rows == 4


# Codes of 32 inputs: 64 of them are cut in two; a head of eight falls on no border.
TYPES = {
    "token_embd.weight": "Q8_0",
    "blk.0.attn_q.weight": "Q4_0",
    "blk.0.attn_v.weight": "Q5_0",
    "blk.0.ffn_gate.weight": "Q4_1",
    "blk.0.ffn_down.weight": "Q5_1",
}


@pytest.mark.parametrize("tied", [True, False])
def test_blocks_are_cut_at_their_borders(tied: bool, tmp_path: Path) -> None:
    folder = _gguf_folder(tmp_path, TYPES, tied=tied)
    config = _config(folder, "gguf")
    one = load(folder, quantize="gguf")
    tuned = peft_model(folder, seed=3, r=4, lora_alpha=6, target_modules="all-linear")
    tuned.save_pretrained(tmp_path / "adapter")
    assert one.base is not None
    assert one.lora is not None
    adapter = read_adapter(tmp_path / "adapter", one.base, AdapterLimits())
    one.lora.load(0, adapter)
    expected = _greedy(one)
    logits = peft_logits(tuned, [expected])
    assert expected[len(PROMPT) :] == logits[0].argmax(dim=1).tolist()[len(PROMPT) - 1 : -1]
    parts = read_parts(config, 2)
    packed = [m for m in parts[0].loaded.model.modules() if isinstance(m, PackedLinear)]
    assert parts[0].paged.linear_backend == "gguf"
    assert len(packed) == 8
    for tokens in run_ranks(2, lambda group: _greedy(_with_adapter(parts, group, adapter))):
        assert tokens == expected


def test_blocks_that_would_be_cut_in_two_are_refused_by_name(tmp_path: Path) -> None:
    folder = _gguf_folder(tmp_path, TYPES | {"blk.0.attn_output.weight": "Q4_0"}, tied=True)
    with pytest.raises(
        StartupError, match=r"self_attn\.o_proj has blocks of 32 .*--num-shard"
    ) as e:
        read_parts(_config(folder, "gguf"), 2)
    assert e.value.exit_code is ExitCode.MODEL_UNSUPPORTED


@pytest.mark.parametrize("quantize", ["int8", "bfloat16"])
def test_ranks_give_the_tokens_of_one(quantize: str, tmp_path: Path) -> None:
    folder = make_tiny_model("llama", tmp_path / "model")
    tuned = peft_model(folder, seed=4, r=4, lora_alpha=6, target_modules="all-linear")
    tuned.save_pretrained(tmp_path / "adapter")
    one = load(folder, quantize=quantize)
    assert one.base is not None
    assert one.lora is not None
    adapter = read_adapter(tmp_path / "adapter", one.base, AdapterLimits())
    one.lora.load(0, adapter)
    expected = _greedy(one)
    assert len(set(expected[len(PROMPT) :])) > 2
    for world_size in (2, 3):
        parts = read_parts(_config(folder, quantize), world_size)
        for tokens in run_ranks(
            world_size, lambda g, p=parts: _greedy(_with_adapter(p, g, adapter))
        ):
            assert tokens == expected


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_experts_are_stored_in_bfloat16_too(family: str, tmp_path: Path) -> None:
    folder = make_tiny_model(family, tmp_path / "model")
    tuned = peft_model(folder, seed=4, r=4, lora_alpha=6, target_modules=["o_proj"])
    tuned.save_pretrained(tmp_path / "adapter")
    one = load(folder, quantize="bfloat16")
    assert one.base is not None
    assert one.lora is not None
    adapter = read_adapter(tmp_path / "adapter", one.base, AdapterLimits())
    one.lora.load(0, adapter)
    parts = read_parts(_config(folder, "bfloat16"), 2)
    for model in (one._model, *(part.loaded.model for part in parts)):
        kept = {
            parameter.dtype
            for name, parameter in model.named_parameters()
            if name.endswith(("experts.gate_up_proj", "experts.down_proj"))
        }
        assert kept == {torch.bfloat16}
    expected = _greedy(one)
    for tokens in run_ranks(2, lambda group: _greedy(_with_adapter(parts, group, adapter))):
        assert tokens == expected


class _Adapted(PagedRunner):
    """Computes all rows with the adapter in slot 0."""

    def slots(self, order: list[int]) -> list[int | None]:
        return [0] * len(order)


def _greedy(model: HFPagedModel) -> list[int]:
    """Return the prompt and the likeliest tokens after it, with the adapter in slot 0."""
    runner = _Adapted(model, [list(PROMPT)], num_blocks=16)
    runner.step({0: len(PROMPT)})
    for _ in range(NUM_NEW):
        runner.rows[0].append(int(runner.logits[0][runner.done[0] - 1].argmax()))
        runner.step({0: 1})
    return runner.rows[0]


def _with_adapter(parts: list[RankPart], group: ThreadGroup, adapter: HostAdapter) -> HFPagedModel:
    paged = parts[group.rank].paged
    assert paged.lora is not None
    paged.lora.load(0, adapter)
    meet(parts[group.rank], group)
    return paged


def _config(folder: Path, quantize: Any) -> ShardConfig:
    return ShardConfig(
        model_dir=str(folder), model_id="tiny", shard_uris=["unix:///none"], quantize=quantize
    )


def _gguf_folder(root: Path, types: dict[str, str], *, tied: bool) -> Path:
    path = root / "tiny.gguf"
    write_gguf(path, tied=tied, types=types)
    return prepare(
        str(path), revision=None, source="local", cache_dir=root / "cache",
        trust_remote_code=False, progress=lambda event: None, with_blocks=True,
    ).model_dir  # fmt: skip
