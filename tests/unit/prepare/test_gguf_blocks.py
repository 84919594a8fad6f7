"""The blocks of a GGUF file are kept beside the converted model, in its order of rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tests.helpers.tiny_gguf import write_gguf
from tests.helpers.tiny_models import make_tiny_model

from lorax_contract.config import ShardConfig
from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_shard.gguf_files import BLOCKS_FILE, blocks_folder
from lorax_shard.linear.packed import PackedLinear
from lorax_shard.linear.quantized.gguf_blocks import decode
from lorax_shard.linear.quantized.kernel import load_quantized
from lorax_shard.model.loader import load_paged_model
from lorax_shard.prepare.prepare import prepare

# Queries and keys change the order of their rows on the way; the rest of the file is plain.
TYPES = {
    "token_embd.weight": "Q8_0",
    "blk.0.attn_q.weight": "Q4_0",
    "blk.0.attn_k.weight": "Q4_1",
    "blk.0.attn_v.weight": "Q5_0",
    "blk.0.attn_output.weight": "Q5_1",
    "blk.0.ffn_gate.weight": "Q4_1",
    "blk.0.ffn_up.weight": "Q4_1",
}


def blocks_of(path: Path, cache: Path) -> Path:
    prepared = prepare(
        str(path), revision=None, source="local", cache_dir=cache, trust_remote_code=False,
        progress=lambda event: None, with_blocks=True,
    )  # fmt: skip
    return prepared.model_dir


@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_blocks_are_the_rows_of_the_converted_weights(tmp_path: Path, tied: bool) -> None:
    path = tmp_path / "tiny.gguf"
    types = TYPES | ({} if tied else {"output.weight": "Q4_0"})
    write_gguf(path, tied=tied, types=types)
    folder = blocks_of(path, tmp_path / "cache")
    seen = {}
    with (
        safe_open(blocks_folder(folder) / BLOCKS_FILE, framework="pt") as blocks,
        safe_open(folder / "model.safetensors", framework="pt") as weights,
    ):
        for name, kind in blocks.metadata().items():
            seen[name.removeprefix("model.").removeprefix("layers.0.")] = kind
            weight = decode(blocks.get_tensor(name), kind).dense()
            assert torch.equal(weight, weights.get_tensor(f"{name}.weight"))
    assert seen == {
        "embed_tokens": "Q8_0", "self_attn.q_proj": "Q4_0", "self_attn.k_proj": "Q4_1",
        "self_attn.v_proj": "Q5_0", "self_attn.o_proj": "Q5_1", "mlp.gate_proj": "Q4_1",
        "mlp.up_proj": "Q4_1", **({} if tied else {"lm_head": "Q4_0"}),
    }  # fmt: skip
    before = (blocks_folder(folder) / BLOCKS_FILE).stat().st_mtime_ns
    assert blocks_of(path, tmp_path / "cache") == folder
    assert (blocks_folder(folder) / BLOCKS_FILE).stat().st_mtime_ns == before


@pytest.mark.parametrize("tied", [True, False])
def test_it_is_served_in_its_blocks_and_what_has_none_in_float32(
    tmp_path: Path, tied: bool
) -> None:
    if load_quantized()[0] is None:
        pytest.skip(str(load_quantized()[1]))
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tied=tied, types=TYPES)
    config = ShardConfig(
        model_dir=str(blocks_of(path, tmp_path / "cache")), model_id="tiny",
        shard_uris=["unix:///none"], quantize="gguf", linear_backend="torch",
    )  # fmt: skip
    model = load_paged_model(config)
    plain = load_paged_model(ShardConfig.from_json(config.to_json().replace('"gguf"', '"none"')))
    weights = dict(plain._model.named_modules())
    linears = {n: m for n, m in model._model.named_modules() if isinstance(m, PackedLinear)}
    assert len(linears) == 8
    for name, module in linears.items():
        assert torch.equal(module.weight, weights[name].weight)
    assert model.linear_backend == "gguf"
    assert model.weight_bytes < plain.weight_bytes


def test_a_file_without_blocks_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    with pytest.raises(StartupError, match="holds no quantized weights") as caught:
        blocks_of(path, tmp_path / "cache")
    assert caught.value.exit_code is ExitCode.MODEL_UNSUPPORTED


def test_a_type_without_a_kernel_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorax_shard.linear.quantized import gguf_blocks

    monkeypatch.setattr(gguf_blocks, "BLOCK_TYPES", ("Q4_0",))
    path = tmp_path / "tiny.gguf"
    write_gguf(path, types=TYPES)
    with pytest.raises(StartupError, match=r"blocks of type Q8_0 .*Use --quantize int8") as caught:
        blocks_of(path, tmp_path / "cache")
    assert caught.value.exit_code is ExitCode.MODEL_UNSUPPORTED


def test_a_model_that_is_no_gguf_file_is_refused(tmp_path: Path) -> None:
    folder = make_tiny_model("llama", tmp_path / "model")
    with pytest.raises(StartupError, match="is no GGUF file") as caught:
        blocks_of(folder, tmp_path / "cache")
    assert caught.value.exit_code is ExitCode.USAGE
