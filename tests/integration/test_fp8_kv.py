"""A model over a KV cache of a byte a number: what it gains, what it costs, what it does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.helpers.tiny_models import make_tiny_model

from lorax_contract.config import ShardConfig
from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_shard.model.hf_model import HFPagedModel
from lorax_shard.model.loader import load_paged_model
from lorax_shard.model.probe_run import run_chunked, run_ragged

ROWS = [torch.randint(300, (n,), generator=torch.Generator().manual_seed(n)) for n in (9, 33, 1)]
BLOCK_SIZE = 16
# Logits over a cache in E4M3, whose numbers are off by a sixteenth at most, as a share of the
# largest logit. Measured on these tiny models: 0.014 to 0.133.
TOLERANCE = 0.25
# Other sums may let a number fall the other way when it is rounded; measured: 7e-7. Fresh K and V
# that were not rounded would be as far away as the exact logits.
CHUNK_TOLERANCE = 0.005


def load(folder: Path, backend: str) -> HFPagedModel:
    return load_paged_model(
        ShardConfig(
            model_dir=str(folder), model_id="tiny", shard_uris=["unix:x"],
            attention_backend=backend, block_size=BLOCK_SIZE,
        )
    )  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_logits_stay_near_and_do_not_depend_on_chunks(family: str, tmp_path: Path) -> None:
    model = load(make_tiny_model(family, tmp_path), "sdpa")
    exact, wide = run_ragged(model, ROWS, BLOCK_SIZE), model.block_bytes(BLOCK_SIZE)
    model.store_kv_as("fp8_e4m3")
    assert model.block_bytes(BLOCK_SIZE) * 4 == wide
    rounded = run_ragged(model, ROWS, BLOCK_SIZE)
    chunked = run_chunked(model, ROWS, BLOCK_SIZE)
    for one, other, again in zip(exact, rounded, chunked, strict=True):
        scale = one.abs().max()
        assert 0 < (one - other).abs().max() <= TOLERANCE * scale
        assert (other - again).abs().max() <= CHUNK_TOLERANCE * scale
    model.store_kv_as("auto")
    assert model.block_bytes(BLOCK_SIZE) == wide
    for one, again in zip(exact, run_ragged(model, ROWS, BLOCK_SIZE), strict=True):
        torch.testing.assert_close(one, again)


def test_a_backend_that_cannot_read_it_refuses_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(make_tiny_model("llama", tmp_path), "sdpa")
    monkeypatch.setattr(model._backend, "refuses_cache", lambda *_: "it is not made for it")
    with pytest.raises(StartupError, match="'sdpa' cannot read a KV cache in fp8_e4m3") as caught:
        model.store_kv_as("fp8_e4m3")
    assert caught.value.exit_code is ExitCode.BACKEND_UNAVAILABLE
    assert model.kv_dtype is torch.float32
