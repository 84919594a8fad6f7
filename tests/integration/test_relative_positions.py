"""Encoders with terms of relative positions: far distances, options, and what is refused of them."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.helpers.drive_engine import serve
from tests.helpers.encoder_models import load_encoder, make_tiny_encoder
from tests.helpers.encoder_world import EncoderWorld, check_vectors, specs_of, whole_scheduler
from tests.helpers.rank_models import read_parts

from lorax_contract.config import ShardConfig
from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_shard.attention import ragged, whole
from lorax_shard.model import disentangled, loader, mpnet
from lorax_shard.model.describe import describe
from lorax_shard.model.families import refusal
from lorax_shard.model.hf_model import HFPagedModel
from lorax_shard.model.loader import load_paged_model
from lorax_shard.model.probe_run import run_ragged
from lorax_shard.peft.config import parse_config
from lorax_shard.peft.errors import AdapterRefusedError
from lorax_shard.peft.targets import select

# The first distances that share a bucket, the last that do not share one with all further ones, and beyond.
LENGTHS = (300, 1, 9, 131, 17, 300, 64, 129)
TABLES = {
    "deberta": "rel_embeddings", "deberta-v2": "rel_embeddings", "mpnet": "relative_attention_bias",
}  # fmt: skip
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mpnet": ("mpnet", {}),
    "deberta": ("deberta", {}),
    "deberta with fewer distances": ("deberta", {"max_relative_positions": 100}),
    "deberta without positions of its own": ("deberta", {"position_biased_input": False}),
    "v3": ("deberta-v2", {"position_biased_input": False, "position_buckets": 256}),
    "v2 without norm": ("deberta-v2", {"norm_rel_ebd": "none"}),
    "v2 without buckets": ("deberta-v2", {"position_buckets": -1, "max_relative_positions": 100}),
    "v2, keys apart": ("deberta-v2", {"share_att_key": False}),
    "v2, c2p": ("deberta-v2", {"pos_att_type": "c2p", "share_att_key": False}),
    "v2, p2c": ("deberta-v2", {"pos_att_type": "p2c"}),
    "v2, neither": ("deberta-v2", {"pos_att_type": []}),
    "v2 without distances": ("deberta-v2", {"relative_attention": False}),
    "v2 with a convolution": ("deberta-v2", {"conv_kernel_size": 3, "conv_act": "gelu"}),
    "v2 of narrow tokens": ("deberta-v2", {"embedding_size": 24}),
}
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
@pytest.mark.parametrize("variant", VARIANTS)
def test_far_distances_equal_transformers(
    variant: str,
    backend: type[whole.WholeAttention],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if reason := backend.probe(torch.device("cpu"), torch.float32):
        pytest.skip(reason)
    monkeypatch.setattr(loader, "encoder_attention", lambda *_: backend())
    family, options = VARIANTS[variant]
    folder = make_tiny_encoder(
        family, tmp_path, max_position_embeddings=514, hidden_size=64, num_attention_heads=2,
        **options,
    )  # fmt: skip
    worst = difference(load_paged_model(config_of(folder)), folder)
    print(f"FIGURE {variant}, {backend.name} {worst:.1e}")
    assert worst < 1e-4


def served(world: EncoderWorld) -> float:
    """Serve base rows and rows of all adapters; return the largest difference."""
    engine = world.engine(load_paged_model(world.config))
    texts = world.texts(tuple(range(len(world.folders) + 1)))
    asked = specs_of(texts)
    answers = serve(engine, whole_scheduler(len(world.folders)), asked, at_once=True)
    return check_vectors(world, texts, asked, answers)


@pytest.mark.parametrize("share_att_key", [False, True])
def test_adapters_of_what_distances_pass_through_equal_peft(
    share_att_key: bool, tmp_path: Path
) -> None:
    names = ["key_proj", "query_proj"]
    if not share_att_key:
        names = [f"pos_{name}" for name in names]
    adapters: list[dict[str, Any]] = [
        {"target_modules": names, "r": 4},
        {"target_modules": names[:1], "r": 2, "use_dora": True, "bias": "lora_only"},
        {"target_modules": names[1:], "r": 3, "modules_to_save": ["encoder.LayerNorm"]},
    ]
    world = EncoderWorld("deberta-v2", tmp_path, adapters, share_att_key=share_att_key)
    print(f"FIGURE {served(world):.1e}")


@pytest.mark.parametrize("family", sorted(TABLES))
def test_terms_that_are_left_out_are_found_by_the_probe(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_tiny_encoder(family, tmp_path)
    for module in (disentangled, mpnet):
        own = module.paged_attention

        def without(*arguments, own=own, **named):
            return own(*arguments, **(named | {"relative_bias": None}))

        monkeypatch.setattr(module, "paged_attention", without)
    with pytest.raises(StartupError) as caught:
        load_paged_model(config_of(folder))
    assert caught.value.exit_code is ExitCode.MODEL_MISMATCH


@pytest.mark.parametrize("family", sorted(TABLES))
def test_far_distances_that_are_wrong_are_found_by_the_probe(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_tiny_encoder(family, tmp_path, max_position_embeddings=514)
    reach, bias_of = disentangled._reach, mpnet.RelativeBias

    def nearer(by_distance: torch.Tensor) -> torch.Tensor:
        # As if none were farther than this.
        centre = by_distance.shape[-1] // 2
        distances = (torch.arange(by_distance.shape[-1]) - centre).clamp(-40, 40)
        return by_distance[..., distances + centre]

    def reached(*arguments):
        found = reach(*arguments)
        return found._replace(places=nearer(found.places))

    monkeypatch.setattr(disentangled, "_reach", reached)
    monkeypatch.setattr(mpnet, "RelativeBias", lambda table: bias_of(nearer(table)))
    with pytest.raises(StartupError, match="a row of 137 tokens") as caught:
        load_paged_model(config_of(folder))
    assert caught.value.exit_code is ExitCode.MODEL_MISMATCH


@pytest.mark.parametrize("family", sorted(TABLES))
def test_nothing_is_said_of_attention_that_cannot_be_set_or_of_padding(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_tiny_encoder(family, tmp_path, around="SequenceClassification")
    pads = [torch.tensor([0, 1, 5, 0]), torch.tensor([1, 1])]
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        run_ragged(load_paged_model(config_of(folder)), pads, 4)
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    for words in ("attention implementation", "attention_mask"):
        assert words not in caplog.text


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


def test_heads_that_mix_their_scores_are_refused(tmp_path: Path) -> None:
    words = "its heads mix their scores (talking_head)"
    config = transformers.DebertaConfig(relative_attention=True, talking_head=True)
    assert refusal(config) == words
    folder = make_tiny_encoder("deberta", tmp_path, talking_head=True)
    with pytest.raises(StartupError, match=re.escape(words)) as caught:
        load_paged_model(config_of(folder))
    assert caught.value.exit_code is ExitCode.MODEL_UNSUPPORTED


def test_a_deberta_whose_projections_are_one_is_not_spread(tmp_path: Path) -> None:
    world = EncoderWorld("deberta", tmp_path, [])
    with pytest.raises(StartupError, match="no plan to spread a deberta over ranks") as caught:
        read_parts(world.config, 2)
    assert caught.value.exit_code is ExitCode.MODEL_UNSUPPORTED
