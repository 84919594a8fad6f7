"""fp8 and int4 on a GPU: products, whole models, adapters on top, and graphs of decode steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.tiny_models import make_tiny_model

from lorax_contract.config import ShardConfig
from lorax_shard.linear.packed import PackedLinear
from lorax_shard.linear.quantized.device import (
    DevicePacker,
    fits,
    refusal,
    round_rows,
)
from lorax_shard.linear.quantized.formats import FP8, INT4, Format, to_fp8, to_int4
from lorax_shard.model.loader import load_paged_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch can use"),
]
SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8, "head_dim": 16}
DTYPE = torch.bfloat16


@pytest.fixture(params=[FP8, INT4], ids=lambda each: each.name)
def format_(request: pytest.FixtureRequest) -> Format:
    chosen: Format = request.param
    reason = refusal(chosen, torch.device("cuda"), DTYPE)
    if reason is not None and "capability" in reason:
        pytest.skip(reason)
    assert reason is None
    return chosen


@pytest.mark.parametrize("shape", [(16, 32), (48, 96), (1024, 576), (4096, 4096)])
def test_it_computes_the_product_of_its_numbers(format_: Format, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    assert fits(format_, torch.Size(shape))
    weight = torch.randn(shape, device="cuda")
    made = to_int4(weight) if format_ is INT4 else to_fp8(weight)
    bias = torch.randn(shape[0], device="cuda", dtype=DTYPE)
    kernel = DevicePacker(DTYPE).pack(made, bias)
    dense = made.dense()
    torch.testing.assert_close(kernel.dense().float(), dense, rtol=1e-2, atol=1e-2)
    for rows in (1, 7, 64, 257):
        x = torch.randn(rows, shape[1], device="cuda", dtype=DTYPE)
        seen = x.float()
        if format_ is FP8:
            codes, scales = round_rows(x)
            seen = codes.float() * scales
        expected = seen @ dense.T + bias.float()
        off = (kernel(x).float() - expected).norm() / expected.norm()
        assert off < 1e-2


def test_a_replayed_product_is_the_launched_one(format_: Format) -> None:
    torch.manual_seed(1)
    weight = torch.randn(64, 128, device="cuda")
    made = to_int4(weight) if format_ is INT4 else to_fp8(weight)
    kernel = DevicePacker(DTYPE).pack(made, None)
    x = torch.randn(5, 128, device="cuda", dtype=DTYPE)
    expected = kernel(x).clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = kernel(x)
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected)


def test_a_model_is_served_in_it(format_: Format, tmp_path: Path) -> None:
    folder = make_tiny_model("llama", tmp_path, **SHAPE)
    quantize: Any = format_.name
    model = load_paged_model(
        ShardConfig(
            model_dir=str(folder), model_id="tiny", shard_uris=["unix:/unused"], device="cuda",
            quantize=quantize,
        )
    )  # fmt: skip
    assert model.dtype is DTYPE
    assert model.linear_backend == format_.name
    linears = [m for m in model._model.modules() if isinstance(m, PackedLinear)]
    assert len(linears) == 14
    assert all(each.weight.is_cuda for each in linears)
