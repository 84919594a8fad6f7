"""Encoders with terms of relative positions: far distances, and what is refused of them."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from tests.helpers.encoder_models import load_encoder, make_tiny_encoder

from lorax_contract.config import ShardConfig
from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_shard.attention import ragged, whole
from lorax_shard.model import loader, relative_positions
from lorax_shard.model.describe import describe
from lorax_shard.model.hf_model import HFPagedModel
from lorax_shard.model.loader import load_paged_model
from lorax_shard.model.probe_run import run_ragged
from lorax_shard.peft.config import parse_config
from lorax_shard.peft.errors import AdapterRefusedError
from lorax_shard.peft.targets import select

# The first distances that share a bucket, the last that do not share one with all further ones, and beyond.
LENGTHS = (300, 1, 9, 131, 17, 300, 64, 129)
TABLES = {"mpnet": "relative_attention_bias"}
BACKENDS = (whole.WholeAttention, ragged.RaggedAttention, ragged.RaggedTileAttention)


def config_of(folder: Path) -> ShardConfig:
    return ShardConfig(model_dir=str(folder), model_id="tiny", shard_uris=["unix:///unused"])


def difference(paged: HFPagedModel, folder: Path) -> float:
    """Return how far a ragged batch is from each row alone, as a share of the largest number."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(5, 200, (length,), generator=generator) for length in LENGTHS]
    stock = load_encoder(folder)
    with torch.no_grad():
        wanted = torch.cat([stock(row[None]).last_hidden_state[0] for row in rows])
    found = torch.cat(run_ragged(paged, rows, 4))
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", sorted(TABLES))
def test_far_distances_equal_transformers(
    family: str,
    backend: type[whole.WholeAttention],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if reason := backend.probe(torch.device("cpu"), torch.float32):
        pytest.skip(reason)
    monkeypatch.setattr(loader, "encoder_attention", lambda *_: backend())
    folder = make_tiny_encoder(
        family, tmp_path, max_position_embeddings=514, hidden_size=64, num_attention_heads=2
    )
    paged = load_paged_model(config_of(folder))
    worst = difference(paged, folder)
    print(f"FIGURE {family}, {backend.name} {worst:.1e}")
    assert worst < 1e-4


@pytest.mark.parametrize("family", sorted(TABLES))
def test_terms_that_are_left_out_are_found_by_the_probe(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_tiny_encoder(family, tmp_path)
    own = relative_positions.paged_attention

    def without(*arguments, **named):
        return own(*arguments, **(named | {"bias_by_distance": None}))

    monkeypatch.setattr(relative_positions, "paged_attention", without)
    with pytest.raises(StartupError) as caught:
        load_paged_model(config_of(folder))
    assert caught.value.exit_code is ExitCode.MODEL_MISMATCH


@pytest.mark.parametrize("family", sorted(TABLES))
def test_nothing_is_said_of_attention_that_cannot_be_set(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_tiny_encoder(family, tmp_path, around="SequenceClassification")
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        load_paged_model(config_of(folder))
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert "attention implementation" not in caplog.text


@pytest.mark.parametrize("family", sorted(TABLES))
def test_an_adapter_of_the_table_of_distances_is_refused(family: str, tmp_path: Path) -> None:
    base = describe(load_encoder(make_tiny_encoder(family, tmp_path)))
    for options in (
        {"target_modules": [TABLES[family]]},
        {"target_modules": ["dense"], "modules_to_save": [TABLES[family]]},
    ):
        document = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, **options}
        with pytest.raises(AdapterRefusedError, match="table of distances"):
            select(parse_config(json.dumps(document)), base)
